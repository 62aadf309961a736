"""A sandbox as the backend of LangChain's deep agents.

    from deepagents import create_deep_agent
    from shoal.integrations.langchain import ShoalSandbox

    with shoal.Sandbox.create(memory_mib=1024, timeout=3600) as sandbox:
        agent = create_deep_agent(model=…, backend=ShoalSandbox(sandbox))

Searching and editing come from `BaseSandbox`, which runs Python in the sandbox: the image needs `python3`.
"""

from __future__ import annotations

import errno

from deepagents.backends.protocol import (
    ExecuteResponse,
    FileDownloadResponse,
    FileOperationError,
    FileUploadResponse,
)
from deepagents.backends.sandbox import BaseSandbox

from shoal._compat import override
from shoal.integrations._guest import (
    DEADLINE,
    ENV,
    exit_code,
    os_error,
    read_argv,
    remark,
    write_argv,
)
from shoal.sdk import Sandbox

MAX_DOWNLOAD_BYTES = 1 << 30
"""Largest file that `download_files` holds in memory."""

_MERGED = 'exec /bin/sh -c "$1" 2>&1'
_CODES: dict[int | None, FileOperationError] = {
    errno.ENOENT: "file_not_found",
    errno.EACCES: "permission_denied",
    errno.EPERM: "permission_denied",
    errno.EROFS: "permission_denied",
    errno.EISDIR: "is_directory",
    errno.ENOTDIR: "invalid_path",
    errno.ENAMETOOLONG: "invalid_path",
}


class ShoalSandbox(BaseSandbox):
    """A backend on a sandbox, which stays its caller's: who made it ends it."""

    def __init__(self, sandbox: Sandbox, *, timeout: float = 1800.0) -> None:
        """Stand on a sandbox.

        Args:
            sandbox: Whose default user and directory commands get.
            timeout: Seconds for a command that names none.
        """
        self.sandbox = sandbox
        self._timeout = timeout

    @property
    @override
    def id(self) -> str:
        """The sandbox's id."""
        return self.sandbox.id

    @override
    def execute(self, command: str, *, timeout: int | None = None) -> ExecuteResponse:
        """Run a shell command.

        Args:
            command: What a shell reads.
            timeout: Seconds until it is killed (exit code 124); 0: never; None: the backend's default.

        Returns:
            stdout and stderr in the order in which they were written.
        """
        seconds = self._timeout if timeout is None else timeout
        # A shell of its own, so that a syntax error in the command is part of its output too.
        result = self.sandbox.run(
            ["/bin/sh", "-c", _MERGED, "sh", command], timeout=seconds or None
        )
        output = "\n".join(text for text in (result.stdout, remark(result, "the command")) if text)
        return ExecuteResponse(output, exit_code(result), result.truncated)

    @override
    def upload_files(self, files: list[tuple[str, bytes]]) -> list[FileUploadResponse]:
        """Write files as the sandbox's user, with the directories above them."""
        return [FileUploadResponse(path, self._upload(path, data)) for path, data in files]

    def _upload(self, path: str, data: bytes) -> FileOperationError | str | None:
        if not path.startswith("/"):
            return "invalid_path"
        result = self.sandbox.run(write_argv(path), stdin=data, env=ENV, timeout=DEADLINE)
        return None if result.ok else _code(os_error(result, path))

    @override
    def download_files(self, paths: list[str]) -> list[FileDownloadResponse]:
        """Read files as the sandbox's user."""
        return [self._download(path) for path in paths]

    def _download(self, path: str) -> FileDownloadResponse:
        if not path.startswith("/"):
            return FileDownloadResponse(path, error="invalid_path")
        limit = MAX_DOWNLOAD_BYTES
        result = self.sandbox.run(
            read_argv(path, limit + 1), env=ENV, timeout=DEADLINE, max_output_bytes=limit + 1
        )
        if not result.ok:
            return FileDownloadResponse(path, error=_code(os_error(result, path)))
        if len(result.stdout_bytes) > limit:
            return FileDownloadResponse(path, error=f"larger than {limit} bytes")
        return FileDownloadResponse(path, result.stdout_bytes)


def _code(error: OSError) -> FileOperationError | str:
    return _CODES.get(error.errno) or str(error)
