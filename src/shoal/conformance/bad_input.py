"""BA: what makes no sense is answered at once with a typed word for it, and harms nothing."""

from __future__ import annotations

import contextlib
import errno
import math
from collections.abc import Iterator

import anyio

from shoal.conformance._expect import Unmet, holds, refused, same
from shoal.conformance._help import read_until
from shoal.conformance._suite import Trial, check
from shoal.errors import (
    ExecNotFoundError,
    InvalidArgumentError,
    PathError,
    PathNotFoundError,
    ShoalError,
)
from shoal.sdk import AsyncSandbox
from shoal.types import ExecResult, PtySize

_PATIENCE = 10.0


@check("BA-01")
async def deadlines(t: Trial) -> None:
    """A deadline of 0, below 0 or not a number is refused; an infinite one is refused or is none."""
    sandbox = await t.sandbox()
    for deadline in (0, -1, -0.0, math.nan, -math.inf):
        with refused(f"run with a deadline of {deadline}", InvalidArgumentError):
            await sandbox.run("touch /ran", timeout=deadline)
        with refused(f"a sandbox with a timeout of {deadline}", InvalidArgumentError):
            await t.sandbox(timeout=deadline)
    same("ran", await sandbox.files.exists("/ran"), False)
    for deadline in (math.inf, 1e300):
        with contextlib.suppress(InvalidArgumentError):
            end = await sandbox.run("echo fine", timeout=deadline)
            same(f"output with a deadline of {deadline}", end.stdout, "fine\n")
    end = await sandbox.run("sleep 5", timeout=0.001)
    same("a deadline of a millisecond", end.outcome, "timed_out")


@check("BA-02")
async def environment(t: Trial) -> None:
    """A variable with NUL, or whose name is empty or has `=`, is refused and nothing runs."""
    sandbox = await t.sandbox()
    for env in ({"A\0B": "x"}, {"A": "x\0y"}, {"A=B": "x"}, {"": "x"}):
        await _not_run(sandbox, f"env {env}", env=env)
        with refused(f"a sandbox with {env}", InvalidArgumentError):
            await t.sandbox(env=env)


@check("BA-03")
async def arguments(t: Trial) -> None:
    """No argument at all, an empty program or a NUL in one is refused and nothing runs."""
    sandbox = await t.sandbox()
    with refused("no argument", InvalidArgumentError):
        await sandbox.run([])
    with refused("a NUL", InvalidArgumentError):
        await sandbox.run(["touch", "/ran\0"])
    with _typed("an empty program"):
        end = await sandbox.run([""])
        same("an empty program", (end.outcome, end.errno), ("not_started", errno.ENOENT))


@check("BA-04", deadline=60)
async def too_long(t: Trial) -> None:
    """Arguments beyond the kernel's limits are `not_started` with E2BIG, or refused; just below they run."""
    sandbox = await t.sandbox()
    one = 131_071  # MAX_ARG_STRLEN is 128 KiB with the NUL
    end = await sandbox.run(["sh", "-c", "echo ${#1}", "sh", "x" * one])
    same("the longest argument", end.stdout, f"{one}\n")
    for name, argv in (
        ("one argument too long", ["true", "x" * (one + 1)]),
        ("too many together", ["true", *["x" * 100_000] * 80]),
    ):
        with contextlib.suppress(InvalidArgumentError):
            end = await sandbox.run(argv)
            got = (end.outcome, end.errno, end.stage)
            same(name, got, ("not_started", errno.E2BIG, "exec"))
    same("the next command", (await sandbox.run("echo fine")).stdout, "fine\n")


@check("BA-05")
async def directory(t: Trial) -> None:
    """A directory that is not there, is a file, is closed to the user or is no path: `not_started` at `cwd`."""
    sandbox = await t.sandbox()
    await sandbox.files.write("/app/file", b"")
    await sandbox.run("mkdir -m 700 /app/closed; ln -s loop /app/loop", user="0", check=True)
    for cwd, user, number in (
        ("/no/such", None, errno.ENOENT),
        ("/app/file", None, errno.ENOTDIR),
        ("/app/closed", "65534", errno.EACCES),
        ("/app/loop", None, errno.ELOOP),
        ("/" + "x" * 300, None, errno.ENAMETOOLONG),
    ):
        end = await sandbox.run("touch /ran", cwd=cwd, user=user)
        got = (end.outcome, end.errno, end.stage)
        same(f"cwd {cwd[:20]}", got, ("not_started", number, "cwd"))
    for cwd in ("relative", "", "/a\0b"):
        await _not_run(sandbox, f"cwd {cwd!r}", cwd=cwd)


@check("BA-06")
async def user(t: Trial) -> None:
    """A user or group that is not there or no id is `not_started` at `user`, or refused."""
    sandbox = await t.sandbox()
    end = await sandbox.run("touch /ran", user="no-such-user")
    same("an unknown name", (end.outcome, end.stage, end.errno is None), _AT_USER)
    names = ("0:no-such-group", ":", "0:", ":0", "-1", "4294967295", "99999999999", "+0", "0x0")
    for name in (*names, " 0", "0\0", "0:0:0", "root\n"):
        await _not_run(sandbox, f"user {name!r}", user=name)


_AT_USER = ("not_started", "user", False)


@check("BA-07")
async def closed_stdin(t: Trial) -> None:
    """Input for a process that closed it or ended is an error of the write; the process is unharmed."""
    sandbox = await t.sandbox()
    end = await sandbox.run("exec <&-; echo closed; sleep 0.3; exit 6", stdin=b"x" * (8 << 20))
    same("run", (end.outcome, end.exit_code, end.stdout), ("exited", 6, "closed\n"))
    process = await sandbox.exec("exec <&-; echo closed; sleep 1; exit 7", stdin=True)
    await read_until(process, b"closed\n")
    with refused("a write to a closed stdin", ShoalError):
        for _ in range(64):
            await process.stdin.write(b"x" * 65536)
    same("code", await process.wait(10), 7)
    with refused("a write after the end", ShoalError):
        await process.stdin.write(b"x")
    await process.stdin.close()


@check("BA-08", deadline=60)
async def paths_that_are_something_else(t: Trial) -> None:
    """Reading or writing a directory, FIFO, device, socket or link loop is a path error at once, never a wait."""
    sandbox = await t.sandbox()
    files = sandbox.files
    await sandbox.run(
        "mkdir -p /app/dir; cd /app; mkfifo fifo; ln -s loop loop; ln -s two one; ln -s one two;"
        "ln -s /dev/zero zero; ln -s fifo to-fifo",
        check=True,
    )
    for path, number in (
        ("/app/dir", errno.EISDIR),
        ("/app/fifo", None),
        ("/app/to-fifo", None),
        ("/dev/zero", None),
        ("/dev/ptmx", None),
        ("/app/zero", None),
        ("/app/loop", errno.ELOOP),
        ("/app/one", errno.ELOOP),
    ):
        with _at_once(f"read of {path}"):
            got = await _path_error(f"read of {path}", files.read(path))
        holds(number in (None, got), f"errno {number} for {path}", got)
    with _at_once("write to a directory"):
        await _path_error("write to a directory", files.write("/app/dir", b""))
    with _at_once("list of a FIFO"):
        await _path_error("list of a FIFO", files.list("/app/fifo"))
    for path in ("/app/loop/x", "/app/one/x"):
        for name, call in (
            ("write", files.write(path, b"")),
            ("stat", files.stat(path)),
            ("list", files.list(path)),
            ("make_dir", files.make_dir(path)),
            ("remove", files.remove(path)),
        ):
            with _at_once(f"{name} through a loop"):
                await _path_error(f"{name} through a loop", call)
    same("the loop itself", (await files.stat("/app/loop")).kind, "symlink")
    with _at_once("download of a FIFO"), contextlib.suppress(PathError):
        left_out = await files.download("/app/fifo", t.directory() / "fifo")
        holds(len(left_out) == 1, "the FIFO left out", left_out)


@check("BA-09")
async def paths_that_are_none(t: Trial) -> None:
    """A relative path, an empty one or one with NUL is refused; one too long, or through a file, is a path error."""
    sandbox = await t.sandbox()
    files = sandbox.files
    await files.write("/app/file", b"")
    for path in ("relative", "", ".", "../x", "/app/a\0b"):
        for name, call in (
            ("read", files.read(path)),
            ("write", files.write(path, b"")),
            ("list", files.list(path)),
            ("stat", files.stat(path)),
            ("remove", files.remove(path)),
        ):
            with refused(f"{name} of {path!r}", InvalidArgumentError):
                await call
    for path, number in (
        ("/" + "x" * 256, errno.ENAMETOOLONG),
        ("/" + "y/" * 2046 + "yy", None),  # 4,095 bytes: a path, of directories that are not there
        ("/" + "z/" * 2047 + "z", errno.ENAMETOOLONG),  # 4,096
        ("/app/file/x", errno.ENOTDIR),
    ):
        try:
            await files.read(path)
        except PathNotFoundError as error:
            holds(number in (None, errno.ENOTDIR), f"errno {number}", error)
        except PathError as error:
            same(f"errno of {path[:12]}…", error.details.get("errno"), number)
        else:
            raise Unmet(f"expected an error for {path[:12]}…\ngot a file")
        with refused(f"write of {path[:12]}…", PathError, PathNotFoundError):
            await files.write(path, b"", parents=False)


@check("BA-10")
async def exec_ids(t: Trial) -> None:
    """An exec id that is empty, a path or a step of one, too long or not plain is refused."""
    sandbox = await t.sandbox()
    for name in ("", "a/b", ".", "..", "a b", "ü", "x" * 1000, "a\0", "a\nb", "a?b"):
        with refused(f"exec id {name[:20]!r}", InvalidArgumentError):
            await sandbox.exec("touch /ran", exec_id=name)
        with refused(f"attach to {name[:20]!r}", InvalidArgumentError, ExecNotFoundError):
            await sandbox.attach(name)
    same("ran", await sandbox.files.exists("/ran"), False)


@check("BA-11")
async def signals(t: Trial) -> None:
    """A signal that does not exist is refused, and the process lives on."""
    sandbox = await t.sandbox()
    process = await sandbox.exec(["sleep", "100"])
    for signal in ("NOPE", "", "SIG", "SIGSIGTERM", -1, 65, 1000):
        with refused(f"signal {signal!r}", InvalidArgumentError):
            await process.signal(signal)
    same("running", await process.poll(), None)


@check("BA-12")
async def numbers(t: Trial) -> None:
    """Ranges, depths, sizes and ports that cannot be are refused."""
    sandbox = await t.sandbox()
    files = sandbox.files
    await files.write("/app/file", b"data")
    for name, call in (
        ("offset -1", lambda: files.read("/app/file", offset=-1)),
        ("length -1", lambda: files.read("/app/file", length=-1)),
        ("depth 0", lambda: files.list("/app", depth=0)),
        ("depth -1", lambda: files.list("/app", depth=-1)),
        ("mode 0o100000", lambda: files.write("/app/x", b"", mode=0o100000)),
        ("mode -1", lambda: files.chmod("/app/file", -1)),
        ("port 0", lambda: sandbox.wait_for_port(0)),
        ("port 65536", lambda: sandbox.wait_for_port(65536)),
        ("publish 0", lambda: sandbox.publish(0)),
        ("a cap below 0", lambda: sandbox.run("true", max_output_bytes=-1)),
        ("a terminal of 0 rows", lambda: sandbox.exec("true", pty=PtySize(rows=0, cols=80))),
        ("one too wide", lambda: sandbox.exec("true", pty=PtySize(rows=1, cols=70_000))),
    ):
        with refused(name, InvalidArgumentError):
            await call()
    for port in (0, 65536, -1):
        with refused(f"url of port {port}", InvalidArgumentError):
            sandbox.url(port)


@check("BA-13", deadline=60)
async def specs(t: Trial) -> None:
    """A sandbox whose limits, image or names make no sense is refused, and nothing is left of it."""
    for name, options in (
        ("cpu 0", {"cpu": 0}),
        ("cpu NaN", {"cpu": math.nan}),
        ("memory -1", {"memory_mib": -1}),
        ("disk 0", {"disk_mib": 0}),
        ("pids 0", {"pids": 0}),
        ("a relative workdir", {"workdir": "x"}),
        ("an unknown network", {"network": "no-such"}),
        ("port 0 public", {"public_ports": [0]}),
    ):
        with refused(name, InvalidArgumentError):
            await t.sandbox(**options)
    left = await AsyncSandbox.list(labels=t.label)
    same("sandboxes left", left, [])


@check("BA-14")
async def owners(t: Trial) -> None:
    """A user that the image does not know is refused as such wherever files are given to one, and nothing is made."""
    sandbox = await t.sandbox()
    files = sandbox.files
    await files.write("/app/file", b"data")
    for user in ("no-such-user", "0:no-such-group", "65536", ":"):
        for name, call in (
            ("write", lambda user=user: files.write("/app/new", b"", user=user)),
            ("mkdir", lambda user=user: files.make_dir("/app/new", user=user)),
            ("upload", lambda user=user: files.upload(__file__, "/app/new/x", user=user)),
            ("chown", lambda user=user: files.chown("/app/file", user)),
        ):
            try:
                await call()
            except InvalidArgumentError as error:
                holds(user in error.message, f"{name} to name the user {user!r}", error.message)
            except ShoalError as error:
                raise Unmet(f"{name}: expected InvalidArgumentError\ngot {error!r}") from error
            else:
                raise Unmet(f"{name} for {user!r}: expected InvalidArgumentError\ngot no error")
    same("made", await files.exists("/app/new"), False)


async def _not_run(sandbox: AsyncSandbox, what: str, **options: object) -> None:
    """It is refused, or `not_started` with an errno."""
    with _typed(what):
        end: ExecResult = await sandbox.run("touch /ran", **options)  # type: ignore[arg-type]
        holds(end.outcome == "not_started" and bool(end.errno), f"{what} not to start", end)
    holds(not await sandbox.files.exists("/ran"), f"nothing to run with {what}", "a run")


@contextlib.contextmanager
def _typed(what: str) -> Iterator[None]:
    """The block may say that the argument makes no sense, and raise nothing else."""
    try:
        yield
    except InvalidArgumentError:
        pass
    except (ShoalError, ValueError, TypeError) as error:
        raise Unmet(
            f"{what}: expected InvalidArgumentError or an outcome\ngot {type(error).__name__}: {error}"
        ) from error


@contextlib.contextmanager
def _at_once(what: str) -> Iterator[None]:
    with anyio.move_on_after(_PATIENCE) as limit:
        yield
    if limit.cancelled_caught:
        raise Unmet(f"expected {what} to end at once\ngot no end within {_PATIENCE:g} s")


async def _path_error(what: str, call: object) -> int:
    """The errno that a path is refused with."""
    try:
        await call  # type: ignore[misc]  # one of the file calls
    except PathError as error:
        return int(error.details.get("errno", 0))
    except ShoalError as error:
        raise Unmet(f"{what}: expected PathError\ngot {type(error).__name__}: {error}") from error
    raise Unmet(f"{what}: expected PathError\ngot no error")
