"""OU: how a command ends, from a closed list, with its output until then and what it used."""

from __future__ import annotations

import errno

from shoal.conformance._expect import holds, refused, same
from shoal.conformance._help import python, read_until
from shoal.conformance._suite import Trial, check
from shoal.errors import SandboxGoneError
from shoal.types import ExecResult, Outcome

MIB = 1 << 20


@check("OU-01")
async def closed_list(t: Trial) -> None:
    """There are seven outcomes, and only `lost` is the infrastructure's fault."""
    del t
    ends = [one for one in Outcome if one is not Outcome.RUNNING]
    names = ["exited", "signaled", "timed_out", "oom_killed", "killed", "not_started", "lost"]
    same("outcomes", sorted(ends), sorted(names))
    same("infra", [one for one in ends if one.is_infra], ["lost"])


@check("OU-02")
async def exited(t: Trial) -> None:
    """`exited` has the command's own code, and no signal, errno or stage."""
    sandbox = await t.sandbox()
    for code in (0, 1, 7, 126, 127, 137, 255):
        end = await sandbox.run(f"echo out; exit {code}")
        got = (end.outcome, end.exit_code, end.signal, end.errno, end.stage, end.stdout, end.ok)
        same("end", got, ("exited", code, None, None, None, "out\n", code == 0))


@check("OU-03")
async def signaled(t: Trial) -> None:
    """`signaled` has the signal that the command died of by itself, and no code."""
    sandbox = await t.sandbox()
    for name, number in (("SEGV", 11), ("ABRT", 6), ("KILL", 9), ("TERM", 15)):
        end = await sandbox.run(f"echo out; kill -{name} $$")
        got = (end.outcome, end.signal, end.exit_code, end.stdout, end.ok)
        same(f"end by {name}", got, ("signaled", number, None, "out\n", False))


@check("OU-04")
async def timed_out(t: Trial) -> None:
    """`timed_out` keeps both streams until then, also of a command that ignores every signal it can."""
    sandbox = await t.sandbox()
    for command in ("sleep 100", "trap '' TERM INT HUP; sleep 100 & wait; sleep 100"):
        end = await sandbox.run(f"echo out; echo err >&2; {command}", timeout=1)
        got = (end.outcome, end.exit_code, end.stdout, end.stderr)
        same("end", got, ("timed_out", None, "out\n", "err\n"))
        holds(0.9 <= end.usage.wall_s < 10, "about a second of wall time", end.usage.wall_s)
    end = await sandbox.run("exit 4", timeout=60)
    same("in time", (end.outcome, end.exit_code), ("exited", 4))


@check("OU-05", deadline=60)
async def oom_killed(t: Trial) -> None:
    """`oom_killed` keeps the output until then, and the sandbox goes on."""
    sandbox = await t.sandbox(memory_mib=64)
    end = await sandbox.run(
        python("import os; os.write(1, b'out\\n'); os.write(2, b'err\\n'); x = b'x' * (1 << 30)")
    )
    got = (end.outcome, end.exit_code, end.stdout, end.stderr)
    same("end", got, ("oom_killed", None, "out\n", "err\n"))
    same("the next command", (await sandbox.run("echo on")).stdout, "on\n")


@check("OU-06")
async def killed(t: Trial) -> None:
    """`killed` is an end by `kill`, with the output until then; a signal that was sent is told by number."""
    sandbox = await t.sandbox()
    process = await sandbox.exec("echo out; echo err >&2; sleep 100")
    await read_until(process, b"out\n")
    await process.kill()
    same("return code", await process.wait(10), -9)
    same("outcome", process.exit and process.exit.outcome, "killed")
    same("stderr", await process.stderr.read(), b"err\n")
    other = await sandbox.exec(["sleep", "100"])
    await other.signal("TERM")
    await other.wait(10)
    same("signal", other.exit and (other.exit.exit_code, other.exit.signal), (None, 15))
    same("return code", other.returncode, -15)


@check("OU-07")
async def not_started(t: Trial) -> None:
    """`not_started` tells errno and stage: no such program, not executable, not a program, no directory."""
    sandbox = await t.sandbox()
    await sandbox.files.write("/app/plain", b"#!/bin/sh\n", mode=0o644)
    await sandbox.files.write("/app/noise", b"\x7fELF nonsense", mode=0o755)
    await sandbox.files.write("/app/orphan", b"#!/no/such/shell\n", mode=0o755)
    for program, number in (
        ("no-such-program", errno.ENOENT),
        ("/no/such/program", errno.ENOENT),
        ("/app/orphan", errno.ENOENT),
        ("/app/plain", errno.EACCES),
        ("/app", errno.EACCES),
        ("/app/noise", errno.ENOEXEC),
        ("/app/plain/x", errno.ENOTDIR),
    ):
        end = await sandbox.run([program])
        same(f"end of {program}", _start(end), ("not_started", None, number, "exec"))
    process = await sandbox.exec(["no-such-program"])
    same("return code", (await process.wait(10), process.pid), (127, 0))


@check("OU-08")
async def found_in_path(t: Trial) -> None:
    """A program is searched in the PATH of the command's environment."""
    sandbox = await t.sandbox()
    await sandbox.files.write("/app/bin/mine", b"#!/bin/sh\necho mine\n", mode=0o755)
    found = await sandbox.run(["mine"], env={"PATH": "/app/bin:/usr/bin:/bin"})
    same("with PATH", (found.outcome, found.stdout), ("exited", "mine\n"))
    same("without", (await sandbox.run(["mine"])).outcome, "not_started")


@check("OU-09")
async def lost_with_its_sandbox(t: Trial) -> None:
    """Who waits for a command whose sandbox is terminated is told so at once, with the reason."""
    sandbox = await t.sandbox()
    process = await sandbox.exec(["sleep", "100"])
    await sandbox.terminate()
    with refused("wait", SandboxGoneError):
        await process.wait(15)


@check("OU-10", deadline=60)
async def usage(t: Trial) -> None:
    """Each end tells wall time, CPU time and peak memory, descendants that were waited for included."""
    sandbox = await t.sandbox(cpu=2, memory_mib=512)
    idle = await sandbox.run("sleep 0.5")
    holds(0.4 < idle.usage.wall_s < 10, "about 0.5 s of wall time", idle.usage.wall_s)
    holds(idle.usage.cpu_s < 0.3, "next to no CPU time", idle.usage.cpu_s)
    program = "import time\nwhile time.process_time() < 0.6: pass"
    for name, command in (("itself", program), ("a child", _IN_CHILD.format(program))):
        busy = await sandbox.run(python(command), check=True)
        holds(0.5 < busy.usage.cpu_s < 3, f"about 0.6 s of CPU time by {name}", busy.usage.cpu_s)
    before = (await sandbox.run(python("pass"), check=True)).usage.max_rss_bytes
    after = (await sandbox.run(python(f"x = b'x' * {100 * MIB}"), check=True)).usage.max_rss_bytes
    holds(90 * MIB < after - before < 150 * MIB, "100 MiB more peak memory", after - before)


_IN_CHILD = "import subprocess, sys; subprocess.run([sys.executable, '-c', '''{}'''], check=True)"


@check("OU-11", deadline=60)
async def usage_of_a_bad_end(t: Trial) -> None:
    """Usage is told of commands that were killed or ran out of time too."""
    sandbox = await t.sandbox()
    program = "import time\nwhile time.process_time() < 0.4: pass\nprint('burnt', flush=True)"
    killed = await sandbox.exec(python(f"{program}\ntime.sleep(1000)"))
    await read_until(killed, b"burnt\n")
    await killed.kill()
    await killed.wait(15)
    cpu = killed.exit.usage.cpu_s if killed.exit else 0
    holds(0.3 < cpu < 5, "about 0.4 s of CPU time", cpu)
    end = await sandbox.run("sleep 1000", timeout=1)
    holds(end.usage.wall_s > 0.9, "a second of wall time", end.usage.wall_s)


def _start(end: ExecResult) -> tuple[str, int | None, int | None, str | None]:
    return end.outcome, end.exit_code, end.errno, end.stage
