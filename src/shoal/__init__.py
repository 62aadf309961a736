"""Shoal: isolated, short-lived machines for code that nobody has read yet.

    import shoal

    with shoal.Sandbox.create() as sb:
        print(sb.run("python3 -c 'print(6*7)'").stdout)

This is the only public door. Names load when they are first used, so `import shoal` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str
    from shoal import errors, types
    from shoal.errors import ShoalError
    from shoal.sdk import (
        AsyncFiles,
        AsyncFileWatch,
        AsyncForward,
        AsyncNode,
        AsyncProcess,
        AsyncSandbox,
        AsyncStreamReader,
        AsyncStreamWriter,
        Files,
        FileWatch,
        Forward,
        Node,
        Process,
        Sandbox,
        StreamReader,
        StreamWriter,
    )
    from shoal.types import (
        ExecResult,
        FileEvent,
        FileInfo,
        ImageInfo,
        NodeInfo,
        Outcome,
        PtySize,
        Ready,
        Reason,
        SandboxInfo,
        SandboxSpec,
        Status,
        Usage,
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
    "ExecResult",
    "FileEvent",
    "FileInfo",
    "FileWatch",
    "Files",
    "Forward",
    "ImageInfo",
    "Node",
    "NodeInfo",
    "Outcome",
    "Process",
    "PtySize",
    "Ready",
    "Reason",
    "Sandbox",
    "SandboxInfo",
    "SandboxSpec",
    "ShoalError",
    "Status",
    "StreamReader",
    "StreamWriter",
    "Usage",
    "__version__",
    "errors",
    "types",
]

_ROOMS = {
    "shoal.sdk": (
        "AsyncFiles AsyncFileWatch AsyncForward AsyncNode AsyncProcess AsyncSandbox AsyncStreamReader "
        "AsyncStreamWriter Files FileWatch Forward Node Process Sandbox StreamReader StreamWriter"
    ),
    "shoal.types": (
        "ExecResult FileEvent FileInfo ImageInfo NodeInfo Outcome PtySize Ready Reason SandboxInfo SandboxSpec "
        "Status Usage"
    ),
    "shoal.errors": "ShoalError",
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names.split()}


def __getattr__(name: str) -> object:
    if name in ("errors", "types"):
        return importlib.import_module(f"shoal.{name}")
    if name == "__version__":
        from importlib import metadata

        return metadata.version("shoal")
    if (room := _HOME.get(name)) is None:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(room), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
