"""The group of all verbs, and how their errors are told: one line, a hint, no traceback."""

from __future__ import annotations

import importlib
import os
import sys
from typing import IO, Any

import click

from shoal._compat import override
from shoal.errors import ShoalError

VERBS = {
    "run": "Make a sandbox, run one command in it, remove it.",
    "create": "Make a sandbox and print its id.",
    "exec": "Run a command in a sandbox.",
    "shell": "Open a shell in a sandbox.",
    "attach": "Come back to a command that runs in a sandbox.",
    "execs": "List the commands of a sandbox.",
    "kill": "End a command of a sandbox, or send it a signal.",
    "port": "Reach a port of a sandbox.",
    "cp": "Copy files between here and a sandbox.",
    "ps": "List sandboxes.",
    "inspect": "Show all about a sandbox, as JSON.",
    "rm": "End sandboxes.",
    "image": "Bring, build, list and remove images.",
    "serve": "Run a node in the foreground.",
    "doctor": "Say what this machine can and cannot do.",
    "conformance": "Try whether a runtime keeps the whole contract.",
}


class Failure(click.ClickException):
    """An error of ours as click tells errors."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    @override
    def show(self, file: IO[Any] | None = None) -> None:
        """Say it on stderr."""
        for word, text in (("error", self.message), ("hint", self.hint)):
            if text:
                tag = click.style(f"{word}:", fg="red" if word == "error" else "cyan", bold=True)
                click.echo(f"{tag} {' '.join(text.split())}", file=file, err=True, color=_colour())


def _colour() -> bool | None:
    return False if os.environ.get("NO_COLOR") else None


class Verbs(click.Group):
    """Loads a verb's file when the verb is asked for."""

    @override
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    @override
    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"shoal.cli.{'cp_' if cmd_name == 'cp' else cmd_name}")
        command: click.Command = module.command
        return command

    @override
    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    @override
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        import difflib

        if args and not args[0].startswith("-") and args[0] not in VERBS:
            near = difflib.get_close_matches(args[0], VERBS, n=1)
            ctx.fail(f"no such command: {args[0]}" + (f"; did you mean {near[0]}?" if near else ""))
        return super().resolve_command(ctx, args)

    @override
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ShoalError as error:
            raise Failure(error.message, error.hint) from error
        except BrokenPipeError:
            # Whoever read our output has enough; say nothing, also not when Python closes stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(141)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise Failure(f"{where}{error.strerror or error}") from error


@click.group(
    cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="shoal", message="%(version)s")
def cli() -> None:
    """Isolated, short-lived machines for code that nobody has read yet.

    \b
    shoal run -- python3 -c 'print(6*7)'      one command in a fresh sandbox
    id=$(shoal create)                        a sandbox that stays
    shoal exec $id -- ls -l /                 … a command in it
    shoal cp ./src $id:/src                   … files into it
    shoal rm $id                              … its end

    With SHOAL_URL unset, this machine's own node is started when it is needed and leaves when it is idle
    (that takes root). SHOAL_URL=unix:///path/to/shoal.sock or http://host:port names another.
    """
