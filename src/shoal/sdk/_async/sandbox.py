"""A sandbox from its creation to its end."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import os
from collections.abc import (
    Iterable,
    Mapping,
    Sequence,
)
from types import NoneType, TracebackType
from typing import Self

import msgspec

from shoal._compat import override
from shoal.errors import (
    DeadlineExceededError,
    ExecFailedError,
    ImageNotFoundError,
    InvalidArgumentError,
    NotFoundError,
    SandboxGoneError,
    ShoalError,
)
from shoal.sdk._async.files import AsyncFiles
from shoal.sdk._async.node import AsyncNode
from shoal.sdk._async.ports import (
    TOKEN_TTL,
    AsyncForward,
    by_address,
    entrance,
    port_number,
    port_url,
    sign,
)
from shoal.sdk._async.process import (
    MAX_OUTPUT_BYTES,
    AsyncProcess,
    argv_of,
    exec_list,
    failure,
    first_soon,
    kill_quietly,
    send_input,
)
from shoal.sdk._client import (
    CLEANUP_DEADLINE,
    START_DEADLINE,
    Address,
    Client,
    client,
    default_address,
    patiently,
    quote,
)
from shoal.sdk._exec import (
    LAST_RECEIPT_LEAST,
    RECEIPT_LEAST,
    Access,
    Capped,
    ExecStream,
    check_exec_id,
    new_exec_id,
)
from shoal.sdk._frames import Kind
from shoal.types import (
    ExecExit,
    ExecRequest,
    ExecResult,
    ExecStatus,
    Network,
    PtySize,
    Ready,
    Runtime,
    SandboxAccess,
    SandboxInfo,
    SandboxPage,
    SandboxSpec,
)

GRACE = 30.0
"""Seconds beyond a command's own timeout after which its answer is no longer waited for."""
_CREATES_AT_ONCE = 64


class AsyncSandbox:
    """A sandbox: an isolated, short-lived machine for code that nobody has read yet.

        async with await AsyncSandbox.create() as sb:
            result = await sb.run("python3 -c 'print(6*7)'")
            print(result.stdout)

    It ends when the `with` block is left, when `terminate` is called, or by its own timeout.
    """

    def __init__(self, address: Address, answer: SandboxAccess) -> None:
        self._access = Access(address, answer.sandbox.id, answer.access_token)
        self._url_template = answer.url_template
        self._info = answer.sandbox
        self._made_in = os.getpid()

    @classmethod
    async def create(
        cls,
        image: str = "base",
        *,
        cpu: float | None = None,
        memory_mib: int | None = None,
        disk_mib: int | None = None,
        pids: int | None = None,
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
        network: Network | None = None,
        runtime: Runtime | None = None,
        user: str | None = None,
        workdir: str | None = None,
        command: str | Sequence[str] | None = None,
        ready: Ready | int | None = None,
        public_ports: Iterable[int] = (),
        start_timeout: float = START_DEADLINE,
    ) -> AsyncSandbox:
        """Bring up a sandbox and wait until it is ready for commands.

        With no node configured (`SHOAL_URL`) this machine's own is started, and the first use of `base` builds it.

        Args:
            image: Name, `name:tag` or `sha256:` digest of an image that the node has.
            cpu: CPUs it may use at most; fractions allowed. None: the node's default, which is 1.
            memory_mib: Memory limit in MiB; never swapped. None: the node's default, 512.
            disk_mib: Hard limit in MiB on what it writes. None: the node's default, 1024.
            pids: Processes and threads at most. None: the node's default, 512.
            timeout: Seconds until it is ended, whatever it does. None: the node's default, 300.
            env: Environment of every command, on top of the image's.
            labels: Words of yours, to list and select by.
            network: `none`, which is the default: a loopback interface and nothing else.
            runtime: The wall around it; `native` is the default.
            user: Default user of commands, by name or id; None: the image's, else root.
            workdir: Default working directory of commands; None: the image's, else `/`.
            command: Main command, started when it is up: a shell command line, or program and arguments. It
                runs detached, and `attach("main")` finds it.
            ready: What to wait for besides: a port that something listens on, or what a `Ready` says.
            public_ports: Ports that anybody may reach without a token.
            start_timeout: Seconds to wait for it to come up; `ready` has a timeout of its own, which is added.

        Raises:
            ImageNotFoundError: The node has no such image.
            ResourceExhaustedError: It does not fit now; nothing was reserved.
            StartFailedError: It could not be brought up, or `command` did not start or ended before it was
                ready; nothing is left of it.
            StartTimeoutError: It was not ready in time; nothing is left of it.
            HostUnsupportedError: This machine cannot run sandboxes; the hint says what is missing.
            DeadlineExceededError: `start_timeout` passed; what may still come up is ended.
        """
        asked: dict[str, object] = {
            "image": image,
            "cpu": cpu,
            "memory_mib": memory_mib,
            "disk_mib": disk_mib,
            "pids": pids,
            "timeout": timeout,
            "env": dict(env) if env else None,
            "labels": dict(labels) if labels else None,
            "network": network,
            "runtime": runtime,
            "user": user,
            "workdir": workdir,
            "command": None if command is None else argv_of(command, ()),
            "ready": Ready.on_port(ready) if isinstance(ready, int) else ready,
            "public_ports": [port_number(port) for port in public_ports] or None,
        }
        # What is not asked for is the node's to choose.
        return await cls._create(
            {key: value for key, value in asked.items() if value is not None}, start_timeout
        )

    @classmethod
    async def _create(cls, spec: dict[str, object], start_timeout: float) -> AsyncSandbox:
        try:
            msgspec.convert(spec, SandboxSpec)
        except msgspec.ValidationError as error:
            raise InvalidArgumentError(f"not a sandbox: {error}") from error
        here = client(default_address())
        try:
            return await cls._request(here, spec, start_timeout)
        except ImageNotFoundError:
            if spec["image"] != "base" or not here.address.embedded:
                raise
        async with here.base_lock:
            node = AsyncNode()
            if not any(image.name.partition(":")[0] == "base" for image in await node.images()):
                await node.build_base()
        return await cls._request(here, spec, start_timeout)

    @classmethod
    async def _request(
        cls, here: Client, spec: dict[str, object], start_timeout: float
    ) -> AsyncSandbox:
        ready = spec.get("ready")
        patience = start_timeout + (ready.timeout if isinstance(ready, Ready) else 0.0)
        call = here.own(
            here.call(SandboxAccess, "POST", "/v1/sandboxes", body=spec, deadline=patience + GRACE)
        )
        try:
            async with asyncio.timeout(patience):
                answer = await asyncio.shield(call)
        except (TimeoutError, asyncio.CancelledError) as error:
            # The node may be half way: whatever comes of it is ended, so that nothing is left behind.
            here.own(_end_when_up(here, call))
            if isinstance(error, TimeoutError):
                raise DeadlineExceededError(
                    f"the sandbox did not come up within {patience:g} s"
                ) from error
            raise
        return cls(here.address, answer)

    @classmethod
    async def create_many(
        cls, specs: Iterable[SandboxSpec], *, start_timeout: float = START_DEADLINE
    ) -> builtins.list[AsyncSandbox | ShoalError]:
        """Bring up many sandboxes at once.

        Args:
            specs: What each shall be.
            start_timeout: Seconds to wait for each, from when it is its turn.

        Returns:
            For each spec, in order, the sandbox or the error that kept it from coming up.
        """
        turns = asyncio.Semaphore(_CREATES_AT_ONCE)

        async def one(spec: SandboxSpec) -> AsyncSandbox | ShoalError:
            async with turns:
                try:
                    return await cls._create(_sparse(spec), start_timeout)
                except ShoalError as error:
                    return error

        tasks = [asyncio.create_task(one(spec)) for spec in specs]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            for sandbox in done:
                if isinstance(sandbox, AsyncSandbox):
                    here = sandbox._access.client
                    here.own(_end(here, sandbox.id))
            raise

    @classmethod
    async def connect(cls, sandbox_id: str) -> AsyncSandbox:
        """Get hold of a running sandbox by its id.

        Raises:
            SandboxNotFoundError: No sandbox has this id.
            SandboxGoneError: It has ended; `details["reason"]` tells why.
        """
        here = client(default_address())
        answer = await here.call(
            SandboxAccess, "POST", f"/v1/sandboxes/{quote(sandbox_id)}/connect", again=True
        )
        return cls(here.address, answer)

    @classmethod
    async def list(
        cls, *, labels: Mapping[str, str] | None = None, all: bool = False
    ) -> builtins.list[SandboxInfo]:
        """List sandboxes, newest first.

        Args:
            labels: Only those that have all of these.
            all: Also those that ended within the last day.
        """
        query = [("label", f"{key}={value}") for key, value in (labels or {}).items()]
        if all:
            query.append(("all", "true"))
        here = client(default_address())
        page = await here.call(SandboxPage, "GET", "/v1/sandboxes", query=query)
        return page.sandboxes

    @property
    def id(self) -> str:
        """Its id: `sb-` and 26 characters."""
        return self._access.sandbox

    @property
    def files(self) -> AsyncFiles:
        """Its file system."""
        return AsyncFiles(self._access)

    async def info(self) -> SandboxInfo:
        """Ask what the node knows about it now; also for a day after its end."""
        self._info = await self._access.client.call(
            SandboxInfo, "GET", f"/v1/sandboxes/{quote(self.id)}"
        )
        return self._info

    async def run(
        self,
        command: str | Sequence[str],
        *args: str,
        stdin: bytes | str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout: float | None = None,
        check: bool = False,
        max_output_bytes: int = MAX_OUTPUT_BYTES,
    ) -> ExecResult:
        """Run a command, wait for it and return everything it printed.

            await sb.run("ls | wc -l")               # one string: a shell runs it
            await sb.run("python3", "-c", program)   # or program and arguments, untouched
            await sb.run(["git", "status"])

        If the caller is cancelled, the command is killed.

        Args:
            command: A shell command line, or the program, or program and arguments.
            args: Arguments, when `command` is a program.
            stdin: What the command reads; None: nothing.
            env: Environment on top of the sandbox's.
            cwd: Working directory.
            user: User, by name or id.
            timeout: Seconds after which it is killed; the outcome is then `timed_out`.
            check: Raise if it does not exit with code 0.
            max_output_bytes: Bound on stdout and on stderr, each; beyond it the middle is dropped and
                `truncated` is set.

        Raises:
            ExecFailedError: With `check`, the command failed; `result` has its output.
            SandboxGoneError: The sandbox has ended, or ended meanwhile.
            SandboxLostError: The infrastructure lost it.
        """
        if max_output_bytes < 0:
            raise InvalidArgumentError(f"max_output_bytes is {max_output_bytes}")
        exec_id = new_exec_id()
        request = ExecRequest(
            argv=argv_of(command, args),
            exec_id=exec_id,
            env=dict(env or {}),
            cwd=cwd,
            user=user,
            stdin=stdin is not None,
            timeout=timeout,
        )
        stream = ExecStream(self._access, request, exec_id)
        outputs = {Kind.STDOUT: Capped(max_output_bytes), Kind.STDERR: Capped(max_output_bytes)}
        feeder: asyncio.Task[None] | None = None
        end: ExecExit | None = None
        try:
            async with (
                asyncio.timeout(None if timeout is None else timeout + GRACE),
                contextlib.aclosing(stream.frames()) as frames,
            ):
                async for item in first_soon(frames):
                    if isinstance(item, tuple):
                        outputs[item[0]].add(item[1])
                        stream.consume(least=RECEIPT_LEAST)
                    elif isinstance(item, ExecExit):
                        end = item
                    elif stdin is not None and feeder is None:
                        feeder = self._access.client.own(self._feed(exec_id, stdin))
        except BaseException as error:
            if not isinstance(error, ShoalError):
                await kill_quietly(self._access, exec_id)
            if isinstance(error, TimeoutError):
                raise DeadlineExceededError(
                    f"the command's end was not told within {timeout} s + {GRACE:g} s"
                ) from error
            raise
        finally:
            if feeder is not None:
                feeder.cancel()
        if feeder is not None and feeder.done() and not feeder.cancelled():
            feeder.result()
        assert end is not None  # noqa: S101 - the stream ends with an exit or raises
        stream.consume(least=LAST_RECEIPT_LEAST)
        result = ExecResult(
            outcome=end.outcome,
            exit_code=end.exit_code,
            stdout_bytes=outputs[Kind.STDOUT].value(),
            stderr_bytes=outputs[Kind.STDERR].value(),
            signal=end.signal,
            errno=end.errno,
            stage=end.stage,
            usage=end.usage,
            truncated=stream.lost > 0 or any(output.dropped for output in outputs.values()),
        )
        if check and not result.ok:
            raise ExecFailedError(failure(request.argv, end), result=result)
        return result

    async def _feed(self, exec_id: str, stdin: bytes | str) -> None:
        """Send all of stdin. A command that reads only some of it, or ends first, is no error."""
        data = stdin.encode() if isinstance(stdin, str) else bytes(stdin)
        try:
            await send_input(self._access, exec_id, data, offset=0, eof=True, deadline=None)
        except ShoalError:
            pass
        except Exception:
            # It would wait for the rest for ever.
            await kill_quietly(self._access, exec_id)
            raise

    async def exec(
        self,
        command: str | Sequence[str],
        *args: str,
        stdin: bool = False,
        pty: bool | PtySize = False,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout: float | None = None,
        exec_id: str | None = None,
        detached: bool = False,
    ) -> AsyncProcess:
        """Start a command and return at once with a handle on it.

        Args:
            command: As in `run`.
            args: As in `run`.
            stdin: Give it a pipe that `process.stdin` fills; otherwise it reads nothing.
            pty: Give it a terminal (and stdin); stderr then comes with stdout.
            env: Environment on top of the sandbox's.
            cwd: Working directory.
            user: User, by name or id.
            timeout: Seconds after which it is killed.
            exec_id: Id of your choice, of letters, digits and `_.-`; a second call with the same one gets the same
                process.
            detached: It outlives every connection and is never held back by output that nobody reads: of that
                the oldest is dropped. The handle reads nothing before it is asked to.

        Raises:
            SandboxGoneError: The sandbox has ended.
        """
        size = pty if isinstance(pty, PtySize) else PtySize() if pty else None
        request = ExecRequest(
            argv=argv_of(command, args),
            exec_id=new_exec_id() if exec_id is None else check_exec_id(exec_id),
            env=dict(env or {}),
            cwd=cwd,
            user=user,
            stdin=stdin or size is not None,
            pty=size,
            timeout=timeout,
            detached=detached,
        )
        process = AsyncProcess(self._access, request.exec_id or "", request)
        await (process._launch(request) if detached else process._begin())
        return process

    async def attach(self, exec_id: str) -> AsyncProcess:
        """Get hold of a process by its exec id; output that nobody has read yet comes first.

        Raises:
            ExecNotFoundError: The sandbox knows no such exec.
        """
        process = AsyncProcess(self._access, check_exec_id(exec_id), None)
        await process._begin()
        return process

    async def execs(self) -> builtins.list[ExecStatus]:
        """List the commands that the sandbox knows, oldest first."""
        return await exec_list(self._access)

    def url(self, port: int) -> str:
        """The URL of a port, without a path; nothing is asked of the node.

        A request there needs the port's token unless the port is public: see `port_headers` for programs and
        `browser_url` for a browser. Where names below `localhost` do not resolve, use `local_url`.

        Raises:
            ConflictError: The node listens on no TCP port; `forward` works without.
        """
        return port_url(self._url_template, self.id, port)

    def local_url(self, port: int) -> str:
        """The same with an address in the place of the name, for programs on this machine whose resolver does not
        know names below `localhost`. It is one for all ports: what tells them apart is `port_headers`.

            urlopen(Request(sb.local_url(8000), headers=sb.port_headers(8000)))

        Raises:
            ConflictError: The node listens on no TCP port; `forward` works without.
        """
        return by_address(self.url(port))

    def port_token(self, port: int, *, ttl: float = TOKEN_TTL) -> str:
        """A token that opens this one port of this sandbox, and nothing else of it.

        It is made here, out of the sandbox's own access token; nothing is asked of the node.

        Args:
            port: Which.
            ttl: Seconds that it is good for; it cannot be taken back before.
        """
        return sign(self._access, port, ttl)

    def port_headers(self, port: int, *, ttl: float = TOKEN_TTL) -> dict[str, str]:
        """Headers that let any HTTP client in, by `url(port)` or by the node's plain TCP address.

        Args:
            port: Which.
            ttl: Seconds that they are good for.
        """
        return {
            "X-Shoal-Sandbox": self.id,
            "X-Shoal-Port": str(port),
            "X-Shoal-Token": self.port_token(port, ttl=ttl),
        }

    def browser_url(self, port: int, path: str = "/", *, ttl: float = TOKEN_TTL) -> str:
        """A URL to open in a browser, once: it leaves a cookie there and goes on to `path`.

        The token is in the URL's fragment, which a browser keeps to itself, so no log gets to see it.

        Args:
            port: Which.
            path: Where to go on to: an absolute path, with its query if it has one.
            ttl: Seconds that the browser is let in for.

        Raises:
            ConflictError: The node listens on no TCP port.
        """
        return entrance(self.url(port), self.port_token(port, ttl=ttl), path)

    async def wait_for_port(self, port: int, *, timeout: float = 30.0) -> None:
        """Wait until something listens on a port.

        Args:
            port: Which.
            timeout: Seconds to wait at most.

        Raises:
            DeadlineExceededError: Nothing did in time.
            SandboxGoneError: The sandbox has ended, or ended meanwhile.
        """
        clock = asyncio.get_running_loop().time
        end = clock() + timeout

        async def once() -> None:
            await self._access.client.call(
                NoneType,
                "GET",
                self._access.path(f"ports/{port_number(port)}/wait"),
                query={"timeout": f"{max(0.0, end - clock()):.3f}"},
                token=self._access.token,
                deadline=timeout + GRACE,
                stream=True,
                again=False,
            )

        await patiently(once)

    async def publish(self, port: int) -> SandboxInfo:
        """Let anybody who reaches the node reach this port without a token; does nothing if it is so already."""
        return await self._set_public("PUT", port)

    async def unpublish(self, port: int) -> SandboxInfo:
        """Ask for a token on this port again; connections that are open stay. Does nothing if it is so already."""
        return await self._set_public("DELETE", port)

    async def _set_public(self, method: str, port: int) -> SandboxInfo:
        path = f"/v1/sandboxes/{quote(self.id)}/ports/{port_number(port)}"
        self._info = await self._access.client.call(SandboxInfo, method, path, again=True)
        return self._info

    def forward(self, port: int, *, local_port: int = 0, host: str = "127.0.0.1") -> AsyncForward:
        """Make a port of the sandbox a TCP port of this machine, while a block lasts.

            async with sb.forward(5432) as forward:
                connect("127.0.0.1", forward.port)

        Raw bytes, any protocol over TCP, and no TCP port of the node is needed. Whoever reaches the local port
        reaches the sandbox's.

        Args:
            port: The sandbox's. Nothing needs to listen yet.
            local_port: This machine's; 0: one that is free.
            host: Address of this machine to listen on.

        Raises:
            OSError: The local port is taken; raised where the block is entered.
        """
        return AsyncForward(self._access, port_number(port), host, local_port)

    async def terminate(self) -> None:
        """End the sandbox and wait until it is gone. Does nothing if it has ended already."""
        await _end(self._access.client, self.id)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if os.getpid() != self._made_in:
            return  # a forked child that leaves the block leaves its parent's sandbox alone
        # Owned by the client: leaving the block must end the sandbox even if the leaver is cancelled.
        here = self._access.client
        ending = here.own(_end(here, self.id, deadline=CLEANUP_DEADLINE))
        try:
            await asyncio.shield(ending)
        except ShoalError:
            if error is None:
                raise

    @override
    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"


def _sparse(spec: SandboxSpec) -> dict[str, object]:
    """What a spec asks for, less what it leaves at the default."""
    plain = SandboxSpec()
    fields = {name: getattr(spec, name) for name in spec.__struct_fields__}
    return {"image": spec.image} | {
        name: value for name, value in fields.items() if value != getattr(plain, name)
    }


async def sandbox_info(sandbox_id: str) -> SandboxInfo:
    """What the node knows about a sandbox, alive or ended."""
    here = client(default_address())
    return await here.call(SandboxInfo, "GET", f"/v1/sandboxes/{quote(sandbox_id)}")


async def end_sandbox(sandbox_id: str) -> None:
    """End a sandbox by its id.

    Raises:
        SandboxNotFoundError: There never was one.
    """
    here = client(default_address())
    with contextlib.suppress(SandboxGoneError):
        await here.call(NoneType, "DELETE", f"/v1/sandboxes/{quote(sandbox_id)}", again=True)


async def _end(here: Client, sandbox_id: str, *, deadline: float = START_DEADLINE) -> None:
    with contextlib.suppress(NotFoundError, SandboxGoneError):
        path = f"/v1/sandboxes/{quote(sandbox_id)}"
        await here.call(NoneType, "DELETE", path, deadline=deadline, again=True)


async def _end_when_up(here: Client, call: asyncio.Task[SandboxAccess]) -> None:
    with contextlib.suppress(ShoalError):
        answer = await call
        await _end(here, answer.sandbox.id)
