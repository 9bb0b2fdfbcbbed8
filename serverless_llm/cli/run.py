"""`serverless-llm run MODEL "prompt"`: streams one answer, from a running server or from one of its own."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import click

from serverless_llm.cli import completion
from serverless_llm.cli.client import Refusal, Server, Unreachable, find, model_path, of_state_dir, read_head
from serverless_llm.cli.main import CONFIGURATION
from serverless_llm.cli.models import deployed, made_of, origin
from serverless_llm.cli.options import COUNT, SOURCE
from serverless_llm.cli.output import as_json, say
from serverless_llm.cli.progress import Waiting
from serverless_llm.cli.sources import demos, is_source, name_of, resolve, url_of
from serverless_llm.errors import ConfigurationError, did_you_mean
from serverless_llm.quantities import size
from serverless_llm.surroundings import PREFIX

if TYPE_CHECKING:
    import subprocess

START_SECONDS = 60.0  # for a server of its own to accept requests
STOP_SECONDS = 15.0
POLL = 0.01
PHASES = {
    "load_queue_ms": "queue",
    "load_remote_ms": "network -> DRAM",
    "load_disk_ms": "disk -> DRAM",
    "load_upload_ms": "DRAM -> device",
    "prefill_ms": "prefill",
}


class Answer(NamedTuple):
    """`first`: seconds from the command to the first token that is text, None where there was none."""

    text: str
    first: float | None
    usage: dict[str, Any]
    metrics: dict[str, Any]


class Found(NamedTuple):
    """`name`: the model's, there. `start_s`: seconds that the server's start took, 0 of one that was running."""

    server: Server
    name: str
    start_s: float = 0.0


@click.command()
@click.argument("model", type=SOURCE, shell_complete=completion.models_and_sources)
@click.argument("prompt", required=False)
@click.option("--max-tokens", type=COUNT, help="Most tokens of the answer.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 takes the likeliest token every time.")
@click.option("--seed", type=int, help="The same seed gives the same answer.")
@click.option("--raw", is_flag=True, help="Complete the prompt as it is, without the model's chat template.")
@click.option("--quiet", "-q", is_flag=True, help="No phases on standard error.")
@of_state_dir
@as_json
def run(
    model: str, prompt: str | None, raw: bool, quiet: bool, state_dir: Path | None, as_json: bool, **sampling: Any
) -> None:
    """Send PROMPT (or standard input) to MODEL and stream the answer; the phases of the start go to standard error.

    MODEL is a deployed name, a directory, a hub's owner/name, a URL, or demo-count, demo-add, demo-reverse. With no
    server running, one is started for this answer and stopped after it, except with --state-dir.
    """
    began = time.monotonic()
    text = prompt if prompt is not None else _standard_input()
    if not text:
        raise click.UsageError("the prompt is empty")
    body = {name: value for name, value in sampling.items() if value is not None}
    body |= {"prompt": text} if raw else {"messages": [{"role": "user", "content": text}]}
    with _server(model, state_dir, quiet) as (server, name, start):
        body |= {"model": name, "stream": True, "stream_options": {"include_usage": True}}
        path = "/v1/completions" if raw else "/v1/chat/completions"
        with Waiting(lambda: standing(server, name), shown=sys.stderr.isatty() and not quiet) as waiting:
            sink = sys.stdout if not as_json else io.StringIO()
            answer = _take(server.stream(path, body), began, sink, waiting.end)
    value = {"model": name, "text": answer.text, "first_text_s": answer.first}
    say(value | {"usage": answer.usage, "metrics": answer.metrics}, "", as_json)
    if not quiet and not as_json:
        click.echo(phases(answer, start), err=True)


def _standard_input() -> str:
    """What is piped in, without the end of its last line."""
    if sys.stdin.isatty():
        raise click.UsageError("give a prompt, or pipe one in")
    try:
        text = sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"standard input is no text: {error}") from None
    if not text:
        raise click.UsageError("standard input is empty; give a prompt, or pipe one in")
    return text


@contextlib.contextmanager
def _server(model: str, state_dir: Path | None, quiet: bool) -> Iterator[Found]:
    """A server that has the model."""
    try:
        server = find(state_dir)
    except Unreachable as error:
        if state_dir or os.environ.get(f"{PREFIX}URL"):
            raise
        if not is_source(model):
            raise Unreachable(
                f"{model!r} is no directory, hub id, URL or demo checkpoint{did_you_mean(model, demos())}; "
                f"and {error.message}"
            ) from None
    else:
        name = _deployed(server, model, quiet)
        if not quiet:
            _tell_problems(server)
        yield Found(server, name)
        return
    name, source = name_of(model), resolve(model, served=True)
    if not quiet:
        click.echo("no server is running: one is started for this answer", err=True)
    began = time.monotonic()
    with ephemeral(f"{name}={source}") as server:
        yield Found(server, name, time.monotonic() - began)
    if not quiet:
        _tell_lacking(Path(source))


def _tell_lacking(directory: Path) -> None:
    """What a server that has ended has not written to the disk tier: it waits for no disk."""
    from serverless_llm.errors import CheckpointError
    from serverless_llm.loader import disk_tier, filling

    with contextlib.suppress(CheckpointError):  # the next start tells: this one has answered
        if missing := filling.lacking(directory):
            url = disk_tier.url_of(directory)
            click.echo(f"{size(missing)} are not kept on the disk; serverless-llm pull {url} brings them", err=True)


def _deployed(server: Server, model: str, quiet: bool) -> str:
    """The name under which `model` is deployed, deployed now if it is a source that the server does not know.

    Raises:
        click.ClickException: another source has its name.
    """
    known = {row["id"] for row in server.call("GET", "/v1/models")["data"]}
    if model in known or not server.local or not is_source(model):
        return model
    name, url, rows = name_of(model), url_of(model), deployed(server)
    is_there = url and any(row["url"] == url for row in rows)
    source = resolve(model, served=True, server=None if is_there else server)
    names = [str(row["name"]) for row in made_of(rows, source, url)]
    if names:
        return name if name in names else names[0]
    if name in known:
        row = server.call("GET", model_path(name))
        raise click.ClickException(
            f"{name!r} is deployed from {origin(row)}, not from {url or source}: give this one a name of its own "
            f"(serverless-llm deploy NAME {model}), or run {name} for the other"
        )
    server.call("PUT", model_path(name), {"source": source})
    if not quiet:
        click.echo(f"{name} is deployed now and stays so; serverless-llm rm {name} takes it away", err=True)
    return name


def _tell_problems(server: Server) -> None:
    """Why an answer may take long to come."""
    try:
        problems = server.call("GET", "/admin/status")["problems"]
    except Refusal:  # a key for models alone
        return
    for problem in problems:
        click.echo(f"{problem}; the answer may wait for that", err=True)


@contextlib.contextmanager
def ephemeral(*models: str) -> Iterator[Server]:
    """A server on a free port of loopback with a state directory of its own, stopped and removed at the end.

    It listens only to this process's key, and ends with this process whatever happens; then it removes the directory
    itself.

    Raises:
        ConfigurationError: it cannot run as it is configured.
        click.ClickException: it did not start for another reason. Either message is its own.
    """
    import secrets
    import subprocess
    import tempfile

    from serverless_llm.node.processes import command, environment

    with tempfile.TemporaryDirectory(prefix="serverless-llm-") as folder:
        options = ["--host", "127.0.0.1", "--port", "0", "--state-dir", folder, "--orphan-grace", "2s"]
        options += ["--drain", "0", "--die-with", str(os.getpid())]
        options += [part for model in models for part in ("--model", model)]
        key = secrets.token_urlsafe(24)
        log = Path(folder) / "serve.log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command("serverless_llm", "serve", *options),
                env={**environment(), f"{PREFIX}API_KEY": key},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,  # so that Ctrl-C reaches this process, which then stops the server
            )
        try:
            yield Server(_started(process, Path(folder), log), key)
        finally:
            _end(process)


def _started(process: subprocess.Popen[bytes], folder: Path, log: Path) -> str:
    """The URL of a server as soon as it accepts requests."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            lines = log.read_text(errors="replace").strip().splitlines()
            why = lines[-1].removeprefix("Error: ") if lines else f"the server exited with {process.returncode}"
            raise ConfigurationError(why) if process.returncode == CONFIGURATION else click.ClickException(why)
        head = read_head(folder)
        if head is not None and _is_ready(head["url"]):
            return str(head["url"])
        time.sleep(POLL)
    raise click.ClickException(f"the server accepted no request within {START_SECONDS:.0f} s")


def _is_ready(url: str) -> bool:
    try:
        Server(url).call("GET", "/ready")
    except (Unreachable, Refusal):
        return False
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    import subprocess

    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def standing(server: Server, name: str) -> str:
    """What the model does now."""
    row = server.call("GET", model_path(name))
    if row["state"] == "loading":
        return f"{name}: loading {row['progress']:.0%}"
    problems = server.call("GET", "/admin/status")["problems"] if row["state"] == "unloaded" else ()
    return f"{name}: {row['state']}, {problems[0] if problems else 'no text yet'}"


def _take(
    events: Iterator[dict[str, Any]], began: float, sink: TextIO, beginning: Callable[[], None] = lambda: None
) -> Answer:
    """Writes the deltas to `sink` as they come; calls `beginning` before the first."""
    first = None
    usage: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    parts = []
    try:
        for event in events:
            usage = event.get("usage") or usage
            metrics = event.get("metrics") or metrics
            for choice in event["choices"]:
                text = choice.get("text") or (choice.get("delta") or {}).get("content")
                if text:
                    if first is None:
                        first = time.monotonic()
                        beginning()
                    parts.append(text)
                    sink.write(text)
                    sink.flush()
    finally:
        if parts:
            sink.write("\n")
            sink.flush()
    return Answer("".join(parts), None if first is None else first - began, usage, metrics)


def phases(answer: Answer, start_s: float = 0.0) -> str:
    """Times as one line: `first token 2.81 s after the command | cold start 31 ms: queue 0.4 ms, ...`.

    `start_s`: as of `Found`.
    """
    metrics = answer.metrics
    tokens = answer.usage.get("completion_tokens")
    none = f"{tokens} token(s), none of them text" if tokens else "no text"
    parts = [none if answer.first is None else f"first token {answer.first:.2f} s after the command"]
    if start_s:
        parts[0] += f", {start_s:.2f} s to start the server"
    cold = {name: value for name, value in metrics.items() if name.startswith("cold_start")}
    if cold.get("cold_start_ms"):
        inner = cold.get("cold_start_phases") or {}
        idle = "load_disk_ms" if inner.get("load_remote_ms") else "load_remote_ms"  # a start has one of them
        known = {name: word for name, word in PHASES.items() if name in inner and name != idle}
        shown = ", ".join(f"{word} {inner[name]:.1f} ms" for name, word in known.items())
        parts.append(f"cold start {cold['cold_start_ms']:.0f} ms" + (f": {shown}" if shown else ""))
    elif metrics:
        parts.append("warm")
    if metrics.get("time_to_first_token_ms") is not None:
        parts.append(f"time to first token {metrics['time_to_first_token_ms']:.1f} ms")
    return " | ".join(parts)
