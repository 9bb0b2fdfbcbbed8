"""`serverless-llm completion`, and what names of models complete to."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

VARIABLE = "_SERVERLESS_LLM_COMPLETE"
WAIT_SECONDS = 1.0  # of somebody who pressed Tab


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of SHELL.

    \b
    bash: eval "$(serverless-llm completion bash)"     in ~/.bashrc
    zsh:  eval "$(serverless-llm completion zsh)"      in ~/.zshrc
    fish: serverless-llm completion fish > ~/.config/fish/completions/serverless-llm.fish
    """
    from click.shell_completion import get_completion_class

    from serverless_llm.cli.main import cli

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "serverless-llm", VARIABLE).source())


def sources(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Directories, and the demo checkpoints whose names begin so."""
    from serverless_llm.demo import tasks

    names = [CompletionItem(name) for name in tasks.NAMES if name.startswith(incomplete)]
    return [CompletionItem(incomplete, type="dir"), *names]


def models_and_sources(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    known, others = models(ctx, param, incomplete), sources(ctx, param, incomplete)
    return [*others, *(CompletionItem(name) for name in known if name not in {item.value for item in others})]


def logs(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The logs of this machine's server whose names begin so."""
    from serverless_llm.cli.client import local_state_dir
    from serverless_llm.cli.logs import sources_of
    from serverless_llm.errors import ServerlessLLMError

    try:
        found = sources_of(local_state_dir(ctx.params.get("state_dir")))
    except (click.ClickException, ServerlessLLMError):
        return []
    return [source for source in found if source.startswith(incomplete)]


def models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The deployed models whose names begin so; none where no server answers."""
    from serverless_llm.cli.client import find
    from serverless_llm.errors import ServerlessLLMError

    try:
        answer = find(ctx.params.get("state_dir")).call("GET", "/v1/models", seconds=WAIT_SECONDS)
    except (click.ClickException, ServerlessLLMError):
        return []
    return [row["id"] for row in answer["data"] if row["id"].startswith(incomplete)]
