"""Inspect's samples in Shoal's sandboxes: `inspect eval task.py --sandbox shoal`, one sandbox a sample.

Installed with `shoal[inspect]`, Inspect finds it by itself. Settings go into a `ShoalConfig`, or into a YAML file with
the same fields (`shoal.yaml` beside the task, or `--sandbox shoal:file.yaml`). Inspect's asyncio backend, which is its
default, is the one that works.
"""

from __future__ import annotations

import errno
import posixpath
import shlex
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import yaml
from inspect_ai.util import (
    ExecResult,
    OutputLimitExceededError,
    SandboxConnection,
    SandboxEnvironment,
    SandboxEnvironmentConfigType,
    SandboxEnvironmentLimits,
    SandboxUnavailableError,
    sandboxenv,
)
from pydantic import BaseModel

from shoal import errors, types
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
from shoal.sdk import AsyncNode, AsyncSandbox

T = TypeVar("T")

_LABELS = {"made-by": "inspect_ai"}
_GONE = (
    errors.SandboxGoneError,
    errors.SandboxNotFoundError,
    errors.SandboxLostError,
    errors.NodeUnavailableError,
)


class ShoalConfig(BaseModel, frozen=True, extra="forbid"):
    """What each sample's sandbox shall be; None: the node's default."""

    image: str = "base"
    """Name, `name:tag` or `sha256:` digest of an image that the node has."""
    cpu: float | None = None
    """CPUs it may use at most."""
    memory_mib: int | None = None
    disk_mib: int | None = None
    pids: int | None = None
    """Processes and threads at most."""
    timeout: float = 6 * 3600.0
    """Seconds until it is ended even if Inspect is not there any more to do so. Longer than any sample takes."""
    env: dict[str, str] = {}
    labels: dict[str, str] = {}
    network: types.Network | None = None
    user: str | None = None
    """Who commands run as, by name or id; None: the image's, else root."""
    workdir: str | None = None
    """Where relative paths begin, absolute; made, and given to `user`, if it is not there. None: the image's, else `/`."""


@sandboxenv(name="shoal")
class ShoalSandboxEnvironment(SandboxEnvironment):
    """One sample's sandbox."""

    def __init__(self, sandbox: AsyncSandbox, workdir: str) -> None:
        super().__init__()
        self.sandbox = sandbox
        self._workdir = workdir

    @override
    @classmethod
    def config_files(cls) -> list[str]:
        """The file beside a task that is taken by itself."""
        return ["shoal.yaml"]

    @override
    @classmethod
    def config_deserialize(cls, config: dict[str, Any]) -> BaseModel:
        """The configuration out of a log."""
        return ShoalConfig.model_validate(config)

    @override
    @classmethod
    async def sample_init(
        cls,
        task_name: str,
        config: SandboxEnvironmentConfigType | None,
        metadata: dict[str, str],
    ) -> dict[str, SandboxEnvironment]:
        """Bring up a sandbox for one sample, or leave nothing."""
        asked = _config(config)
        async with AsyncExitStack() as undo:
            sandbox = await undo.enter_async_context(
                await AsyncSandbox.create(
                    asked.image,
                    cpu=asked.cpu,
                    memory_mib=asked.memory_mib,
                    disk_mib=asked.disk_mib,
                    pids=asked.pids,
                    timeout=asked.timeout,
                    env=asked.env,
                    labels=asked.labels | _LABELS,
                    network=asked.network,
                    user=asked.user,
                    workdir=asked.workdir,
                )
            )
            workdir = asked.workdir
            if workdir is None:
                workdir = (await AsyncNode().image(asked.image)).workdir or "/"
            elif not await sandbox.files.exists(workdir):
                await sandbox.files.make_dir(workdir, user=asked.user)
            undo.pop_all()
        return {"default": cls(sandbox, workdir)}

    @override
    @classmethod
    async def sample_cleanup(
        cls,
        task_name: str,
        config: SandboxEnvironmentConfigType | None,
        environments: dict[str, SandboxEnvironment],
        interrupted: bool,
    ) -> None:
        """End the sample's sandbox."""
        for environment in environments.values():
            await environment.as_type(ShoalSandboxEnvironment).sandbox.terminate()

    @override
    @classmethod
    async def cli_cleanup(cls, id: str | None) -> None:
        """End a sandbox by its id, or all that Inspect has left behind on the node."""
        ids = [id] if id else [info.id for info in await AsyncSandbox.list(labels=_LABELS)]
        for name in ids:
            try:
                sandbox = await AsyncSandbox.connect(name)
            except errors.SandboxGoneError:
                continue
            await sandbox.terminate()

    @override
    async def exec(
        self,
        cmd: list[str],
        input: str | bytes | None = None,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        user: str | None = None,
        timeout: int | None = None,
        timeout_retry: bool = True,
        concurrency: bool = True,
    ) -> ExecResult[str]:
        """Run a command. It is never run twice, and takes no process of this machine that needed throttling."""
        directory = posixpath.join(self._workdir, cwd) if cwd is not None else None
        result = await _reached(
            self.sandbox.run(
                cmd,
                stdin=input,
                env=env,
                cwd=directory,
                user=user,
                timeout=timeout,
                max_output_bytes=SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE,
            )
        )
        if result.outcome is types.Outcome.TIMED_OUT:
            raise TimeoutError(f"{cmd[0]} was killed after {timeout} s")
        if result.outcome is types.Outcome.LOST:
            raise SandboxUnavailableError(f"{cmd[0]} was lost")
        said = remark(result, cmd[0], {"user": user, "cwd": directory})
        if result.errno == errno.EACCES and result.stage in (None, "exec"):
            raise PermissionError(errno.EACCES, "Permission denied", cmd[0])
        if result.truncated:
            raise OutputLimitExceededError(
                SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE_STR, result.stdout + result.stderr
            )
        stderr = "\n".join(text for text in (result.stderr, said) if text)
        return ExecResult(result.ok, exit_code(result), result.stdout, stderr)

    @override
    async def write_file(self, file: str, contents: str | bytes) -> None:
        """Write a file as the sandbox's user."""
        result = await _reached(
            self.sandbox.run(write_argv(file), stdin=contents, env=ENV, timeout=DEADLINE)
        )
        if not result.ok:
            raise os_error(result, file)

    @overload
    async def read_file(self, file: str, text: Literal[True] = True) -> str: ...

    @overload
    async def read_file(self, file: str, text: Literal[False]) -> bytes: ...

    @override
    async def read_file(self, file: str, text: bool = True) -> str | bytes:
        """Read a file as the sandbox's user."""
        limit = SandboxEnvironmentLimits.MAX_READ_FILE_SIZE
        # One byte more tells a file of just that size from one that is larger.
        result = await _reached(
            self.sandbox.run(
                read_argv(file, limit + 1),
                env=ENV,
                timeout=DEADLINE,
                max_output_bytes=limit + 1,
            )
        )
        if not result.ok:
            raise os_error(result, file)
        data = result.stdout_bytes
        if len(data) > limit:
            raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_READ_FILE_SIZE_STR, None)
        return data.decode() if text else data

    @override
    async def connection(self, *, user: str | None = None) -> SandboxConnection:
        """How a person gets into it."""
        try:
            info = await self.sandbox.info()
        except _GONE as error:
            raise ConnectionError(str(error)) from error
        if info.status is not types.Status.RUNNING:
            raise ConnectionError(f"the sandbox {info.id} is {info.status}")
        words = ["shoal", "shell", *(["--user", user] if user is not None else []), info.id]
        return SandboxConnection(type="shoal", command=shlex.join(words), container=info.id)

    @override
    def default_polling_interval(self) -> float:
        """Seconds between two looks at what a tool in the sandbox asks for; a look is cheap."""
        return 0.2


def _config(config: SandboxEnvironmentConfigType | None) -> ShoalConfig:
    """The settings, whatever form they came in.

    Raises:
        ValueError: They are not valid.
        TypeError: They are another provider's.
    """
    if isinstance(config, str):
        return ShoalConfig.model_validate(yaml.safe_load(Path(config).read_text()) or {})
    if config is None:
        return ShoalConfig()
    if not isinstance(config, ShoalConfig):
        raise TypeError(f"not a ShoalConfig: {type(config).__name__}")
    return config


async def _reached(call: Awaitable[T]) -> T:
    """A call's answer.

    Raises:
        SandboxUnavailableError: The sandbox or its node is not there.
        TimeoutError: It did not come in time.
    """
    try:
        return await call
    except errors.DeadlineExceededError as error:
        raise TimeoutError(str(error)) from error
    except _GONE as error:
        raise SandboxUnavailableError(str(error)) from error
