"""`serverless-llm completion`, and what names of models complete to."""

from __future__ import annotations

import click

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


def models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The deployed models whose names begin so; none where no server answers."""
    from serverless_llm.cli.client import find
    from serverless_llm.errors import ServerlessLLMError

    try:
        answer = find(ctx.params.get("state_dir")).call("GET", "/v1/models", seconds=WAIT_SECONDS)
    except (click.ClickException, ServerlessLLMError):
        return []
    return [row["id"] for row in answer["data"] if row["id"].startswith(incomplete)]
