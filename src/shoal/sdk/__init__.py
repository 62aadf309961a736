"""The client: sandboxes as Python objects, async (written) and sync (generated from it)."""

from __future__ import annotations

from shoal.sdk._async import (
    AsyncFiles,
    AsyncNode,
    AsyncProcess,
    AsyncSandbox,
    AsyncStreamReader,
    AsyncStreamWriter,
)
from shoal.sdk._sync import Files, Node, Process, Sandbox, StreamReader, StreamWriter

__all__ = [
    "AsyncFiles",
    "AsyncNode",
    "AsyncProcess",
    "AsyncSandbox",
    "AsyncStreamReader",
    "AsyncStreamWriter",
    "Files",
    "Node",
    "Process",
    "Sandbox",
    "StreamReader",
    "StreamWriter",
]
