"""The client: sandboxes as Python objects, async (written) and sync (generated from it)."""

from __future__ import annotations

from shoal.sdk._async import (
    AsyncFiles,
    AsyncFileWatch,
    AsyncForward,
    AsyncNode,
    AsyncProcess,
    AsyncSandbox,
    AsyncStreamReader,
    AsyncStreamWriter,
)
from shoal.sdk._sync import (
    Files,
    FileWatch,
    Forward,
    Node,
    Process,
    Sandbox,
    StreamReader,
    StreamWriter,
)

__all__ = [
    "AsyncFileWatch",
    "AsyncFiles",
    "AsyncForward",
    "AsyncNode",
    "AsyncProcess",
    "AsyncSandbox",
    "AsyncStreamReader",
    "AsyncStreamWriter",
    "FileWatch",
    "Files",
    "Forward",
    "Node",
    "Process",
    "Sandbox",
    "StreamReader",
    "StreamWriter",
]
