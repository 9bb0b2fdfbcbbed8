"""`serverless-llm`: finds the verb, runs it, and turns what went wrong into a line and an exit status.

Nothing heavy is imported here: each verb lives in a module of its own that is imported when it is called.
Statuses: 0 done, 1 failure, 2 usage, 69 server unreachable, 78 bad configuration or platform, 129, 130 and 143 signals.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import click

from serverless_llm.cli.signals import Terminated, unwinding
from serverless_llm.errors import ConfigurationError, ServerlessLLMError, did_you_mean

FAILURE, CONFIGURATION, INTERRUPTED = 1, 78, 130


class Verb(NamedTuple):
    module: str
    function: str
    summary: str


VERBS = {
    "serve": Verb("serve", "serve", "Start the server; Ctrl-C stops it."),
    "run": Verb("run", "run", "Send one prompt and stream the answer, with or without a running server."),
    "pull": Verb("pull", "pull", "Bring a model of the Hugging Face hub or of a URL to this machine."),
    "deploy": Verb("models", "deploy", "Give a checkpoint a name and an endpoint."),
    "rm": Verb("models", "rm", "Take a model's endpoint away."),
    "ls": Verb("models", "ls", "List the deployed models."),
    "ps": Verb("models", "ps", "List the models that hold memory now."),
    "show": Verb("inspect", "show", "Tell of one model: its checkpoint, what it needs, how it is."),
    "logs": Verb("logs", "logs", "Show what the server and its agents logged."),
    "top": Verb("top", "top", "Watch models, devices and rates."),
    "doctor": Verb("doctor", "doctor", "Measure this machine, and tell what would not work."),
    "completion": Verb("completion", "completion", "Print a shell's completion script."),
    "stop": Verb("stop", "stop", "Stop the running server."),
    "repack": Verb("repack", "repack", "Write a checkpoint anew so that it reads best."),
    "bench": Verb("bench", "bench", "Measure how fast this machine loads a checkpoint."),
    "make-checkpoint": Verb("make_checkpoint", "make_checkpoint_command", "Write a checkpoint of random weights."),
}


class Verbs(click.Group):
    """A group that imports a verb's module only to run it, and lists all without importing any."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        verb = VERBS.get(cmd_name)
        if verb is None:
            return None
        module = importlib.import_module(f"serverless_llm.cli.{verb.module}")
        command: click.Command = getattr(module, verb.function)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in VERBS and not args[0].startswith("-"):
            ctx.fail(f"there is no command {args[0]!r}{did_you_mean(args[0], VERBS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, verb.summary) for name, verb in VERBS.items()])


def _tell_version(ctx: click.Context, _parameter: click.Parameter, asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("serverless-llm")
        except PackageNotFoundError:
            number = "(a checkout that is not installed)"
        click.echo(f"serverless-llm {number}")
        ctx.exit()


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_tell_version,
    help="Show the version and exit.",
)
def cli() -> None:
    """Serve many language models from few GPUs: an endpoint for each at once, nothing while idle."""


def _mend_streams() -> None:
    """One that was closed is empty instead, before a file takes its number; a letter that the locale lacks is a `?`."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line; the exit status."""
    if sys.platform != "linux":
        click.echo(f"Error: serverless-llm runs on Linux only, this is {sys.platform}", err=True)
        return CONFIGURATION
    _mend_streams()
    try:
        with unwinding():
            return cli.main(arguments, prog_name="serverless-llm", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except Terminated as signal:
        return signal.status
    except ServerlessLLMError as error:
        click.echo(f"Error: {error}", err=True)
        return CONFIGURATION if isinstance(error, ConfigurationError) else FAILURE
    except OSError as error:
        click.echo(f"Error: {error.filename}: {error.strerror}" if error.filename else f"Error: {error}", err=True)
        _give_up_output()
        return FAILURE


def _give_up_output() -> None:
    """What standard output did not take is not tried again at exit, where Python would tell of it once more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
