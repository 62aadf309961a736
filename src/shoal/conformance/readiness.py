"""RE: a sandbox with a command of its own, and when it counts as ready."""

from __future__ import annotations

import time
from typing import Any

from shoal import types
from shoal.conformance._expect import holds, refused, same
from shoal.conformance._http import fetch, server
from shoal.conformance._suite import Trial, check
from shoal.errors import InvalidArgumentError, ShoalError, StartFailedError, StartTimeoutError
from shoal.sdk import AsyncSandbox


@check("RE-01")
async def main_command(t: Trial) -> None:
    """A sandbox's own command runs as the exec `main`, detached, and its end does not end the sandbox."""
    sandbox = await t.sandbox(command=["sh", "-c", "echo up; exit 3"], env={"A": "b"})
    main = await sandbox.attach("main")
    same("output", await main.stdout.read(), b"up\n")
    same("code", await main.wait(10), 3)
    same("the sandbox", (await sandbox.run("echo alive")).stdout, "alive\n")


@check("RE-02")
async def main_shell(t: Trial) -> None:
    """A sandbox's own command may be one string for a shell, and has the sandbox's defaults."""
    sandbox = await t.sandbox(
        command="echo $A; pwd; id -u; exec sleep 100", env={"A": "b"}, workdir="/usr", user="65534"
    )
    main = await sandbox.attach("main")
    lines = [await main.stdout.readline() for _ in range(3)]
    same("output", lines, [b"b\n", b"/usr\n", b"65534\n"])
    same("running", await main.poll(), None)


@check("RE-03")
async def by_port(t: Trial) -> None:
    """With `ready` by port, create returns once something listens there; a number alone means that too."""
    for ready in (types.Ready.on_port(8000), 8000):
        sandbox = await t.sandbox(command=["sh", "-c", f"sleep 0.5; {_SERVE}"], ready=ready, **_ENV)
        answer = await fetch(sandbox.url(8000), headers=sandbox.port_headers(8000))
        same("the first request", answer.status, 200)


@check("RE-04")
async def by_http(t: Trial) -> None:
    """With `ready` by path, create returns once it answers 200 to 399, and not on 503."""
    sandbox = await t.sandbox(command=server(8000), ready=types.Ready.on_http(8000, "/health"))
    same("the first request", (await _get(sandbox)).status, 200)
    start = time.monotonic()
    with refused("a path that answers 503", StartTimeoutError):
        await t.sandbox(command=server(8000), ready=types.Ready(port=8000, path="/bad", timeout=1))
    holds(time.monotonic() - start >= 0.9, "the whole second", time.monotonic() - start)


async def _get(sandbox: AsyncSandbox) -> Any:
    return await fetch(sandbox.url(8000), headers=sandbox.port_headers(8000))


@check("RE-05")
async def by_command(t: Trial) -> None:
    """With `ready` by command, create returns once it exits with 0."""
    sandbox = await t.sandbox(
        command="sleep 0.5; touch /up; sleep 100",
        ready=types.Ready.on_command(["test", "-e", "/up"]),
    )
    same("what it waited for", await sandbox.files.exists("/up"), True)


@check("RE-06")
async def never_ready(t: Trial) -> None:
    """Not ready in time is an error that says so, and nothing is left."""
    start = time.monotonic()
    with refused("create", StartTimeoutError):
        await t.sandbox(command="sleep 100", ready=types.Ready(port=8000, timeout=1))
    holds(0.9 < time.monotonic() - start < 15, "about a second", time.monotonic() - start)
    same("sandboxes left", await AsyncSandbox.list(labels=t.label), [])


@check("RE-07")
async def main_ends_first(t: Trial) -> None:
    """A command that ends before it is ready is an error at once, with its end and its last words."""
    start = time.monotonic()
    try:
        command = "echo so far; echo no config >&2; exit 9"
        await t.sandbox(command=command, ready=types.Ready(port=8000, timeout=25))
    except StartFailedError as error:
        holds("9" in f"{error}", "its exit code in the error", f"{error}")
        holds("no config" in error.hint, "its last line in the hint", error.hint)
        tails = [error.details.get(name) for name in ("stdout_tail", "stderr_tail")]
        same("output", tails, ["so far\n", "no config\n"])
        same("the infrastructure's fault", error.is_infra, False)
    except ShoalError as error:
        holds(False, "StartFailedError", error)
    else:
        holds(False, "StartFailedError", "no error")
    holds(time.monotonic() - start < 15, "an end at once", time.monotonic() - start)
    with refused("a program that is not there", StartFailedError):
        await t.sandbox(command=["no-such-program"])
    same("sandboxes left", await AsyncSandbox.list(labels=t.label), [])
    ended = await AsyncSandbox.list(labels=t.label, all=True)
    same("reasons", {info.reason for info in ended}, {types.Reason.NOT_READY})


@check("RE-08")
async def no_sense(t: Trial) -> None:
    """A `ready` that names nothing, too much or a port that cannot be is refused."""
    for name, fields in (
        ("nothing", {}),
        ("path without port", {"path": "/"}),
        ("port and command", {"port": 1, "command": ["true"]}),
        ("port 0", {"port": 0}),
        ("port 65536", {"port": 65536}),
        ("empty command", {"command": []}),
        ("relative path", {"port": 80, "path": "x"}),
        ("timeout 0", {"port": 80, "timeout": 0.0}),
        ("interval -1", {"port": 80, "interval": -1.0}),
    ):
        with refused(f"ready with {name}", InvalidArgumentError):
            await t.sandbox(ready=types.Ready(**fields))


_SERVE = 'exec python3 -c "$SERVER" 8000 127.0.0.1'
_ENV = {"env": {"SERVER": server(8000)[2]}}
