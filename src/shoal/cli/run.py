"""`shoal run`: a sandbox for one command."""

from __future__ import annotations

import sys
import time
from contextlib import AsyncExitStack
from typing import Any

import click

from shoal.cli import _streams, _terminal
from shoal.cli._options import drive, exec_options, print_json, sandbox_options, say, timeout_option
from shoal.cli.ps import span
from shoal.sdk import AsyncSandbox
from shoal.types import ExecExit, ExecResult, Ready

_MARGIN = 30.0
"""Seconds that the sandbox outlives its command's time, so that the command's end can be told."""


COMMAND_LINE = {"allow_interspersed_args": False}
"""Options end where the command begins, so `shoal run ls -l` needs no `--`."""
NO_TERMINAL = "leave out -t to forward stdin as it is"


@click.command(context_settings=COMMAND_LINE)
@sandbox_options
@exec_options
@timeout_option("Seconds after which the command is killed (exit code 124).")
@click.option("-i", "--interactive", is_flag=True, help="Forward stdin even if it is a terminal.")
@click.option("-t", "--tty", is_flag=True, help="Give the command a terminal.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object with outcome and output instead."
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def command(
    command: tuple[str, ...],
    interactive: bool,
    tty: bool,
    as_json: bool,
    timeout: float,
    **options: Any,
) -> None:
    """Make a sandbox, run one command in it, remove the sandbox.

    stdin (if it is no terminal), stdout and stderr pass through byte for byte, as they come. The exit code is
    the command's own; 124 if its time was up, 127 or 126 if it was not found or could not start, 128+n if
    signal n ended it, 137 if it went over its memory limit.

    \b
    shoal run -- python3 -c 'print(6*7)'
    shoal run -- sh -c 'echo out; echo err >&2; exit 7'
    echo hi | shoal run -- cat
    shoal run --memory 2g --cpu 2 --timeout 60 -e SEED=1 -- ./simulate
    shoal run -it -- bash                     ^P ^Q detaches: it and its sandbox live on
    """
    refuse_json_with_a_terminal(as_json, tty)
    if tty and interactive:
        _terminal.need(NO_TERMINAL)
    raise SystemExit(drive(_run(list(command), interactive, tty, as_json, timeout, options)))


async def _run(
    argv: list[str],
    interactive: bool,
    tty: bool,
    as_json: bool,
    timeout: float,
    options: dict[str, Any],
) -> int:
    forward = interactive or not sys.stdin.isatty()
    async with AsyncExitStack() as undo:
        sandbox = await undo.enter_async_context(await create(timeout=timeout + _MARGIN, **options))
        if tty and sys.stdin.isatty():
            process = await _terminal.start(sandbox, argv, env={}, timeout=timeout)
            if (joined := await _terminal.join(process)) is None:
                undo.pop_all()
                _terminal.say_detached(sandbox.id, process)
                say_kept(sandbox)
                return 0
            end = joined
        else:
            process = await sandbox.exec(
                argv,
                stdin=forward,
                pty=_terminal.size() if tty else False,
                env=_terminal.variables(tty),
                timeout=timeout,
            )
            if as_json:
                result = await _streams.collect(process, stdin=forward)
                return conclude_json(result, argv[0], sandbox.id)
            end = await _streams.join(process, stdin=forward)
    return conclude(end, argv[0])


def say_kept(sandbox: AsyncSandbox) -> None:
    """Tell that a sandbox which should have ended with its command lives on."""
    left = span(sandbox._info.expires_at - time.time())
    say(f"sandbox {sandbox.id} lives on for {left} at most; this ends it: shoal rm {sandbox.id}")


def refuse_json_with_a_terminal(as_json: bool, tty: bool) -> None:
    """Keep apart what cannot go together.

    Raises:
        UsageError: Both were asked for.
    """
    if as_json and tty:
        raise click.UsageError("--json and --tty cannot go together")


def conclude_json(result: ExecResult, program: str, sandbox_id: str) -> int:
    """The exit code for a command's end, after printing all about it as one object."""
    print_json(
        {
            "sandbox": sandbox_id,
            "outcome": result.outcome,
            "exit_code": result.exit_code,
            "signal": result.signal,
            "errno": result.errno,
            "stage": result.stage,
            "stdout": result.stdout,
            "stderr": result.stderr,
            "truncated": result.truncated,
            "usage": result.usage,
        }
    )
    return _streams.exit_code(result, program)[0]


def conclude(end: ExecExit, program: str) -> int:
    """The exit code for a command's end, after saying what there is to say."""
    code, remark = _streams.exit_code(end, program)
    if remark:
        say(f"error: {remark}")
    return code


async def create(
    *,
    timeout: float | None,
    image: str,
    cpu: float | None,
    memory: int | None,
    disk: int | None,
    pids: int | None,
    network: Any,
    runtime: Any,
    label: tuple[tuple[str, str], ...],
    env: tuple[tuple[str, str], ...],
    user: str | None,
    workdir: str | None,
    command: str | None = None,
    ready: Ready | None = None,
) -> AsyncSandbox:
    """A sandbox as the options of `sandbox_options` and `exec_options` say."""
    return await AsyncSandbox.create(
        image,
        cpu=cpu,
        memory_mib=memory,
        disk_mib=disk,
        pids=pids,
        timeout=timeout,
        env=dict(env),
        labels=dict(label),
        network=network,
        runtime=runtime,
        user=user,
        workdir=workdir,
        command=command,
        ready=ready,
    )
