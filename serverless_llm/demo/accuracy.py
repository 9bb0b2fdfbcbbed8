"""Score a running server on held-out prompts: `python -m serverless_llm.demo.accuracy --url http://127.0.0.1:8000`.

Every prompt is asked greedily through `/v1/chat/completions`; an answer counts if it is exactly right, and a refusal
or a cut answer is a wrong one. Exits with 1 if a model is right less often than 99 times in 100.
"""

import argparse
import http.client
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from urllib.parse import urlsplit

from serverless_llm.demo.tasks import NAMES, TASKS, Task

ENOUGH = 0.99
SHOWN = 3  # wrong answers printed for each model
TIMEOUT = 600.0  # seconds without a byte before a request counts as failed; a cold start on a slow disk fits in


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and how to ask: the server's base URL, an API key or none, and requests in flight at once."""

    url: str
    api_key: str | None = None
    concurrency: int = 16


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for a prompt; `cut` says that max_tokens ended it. A refusal's text is its HTTP error."""

    text: str
    cut: bool = False
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Score:
    """How often a model was right, and the seconds that all its prompts took."""

    right: int
    prompts: int
    seconds: float

    @property
    def accuracy(self) -> float:
        return self.right / self.prompts


def ask(endpoint: Endpoint, model: str, prompt: str, max_tokens: int) -> Reply:
    """Ask one prompt on a connection of its own."""
    parts = urlsplit(endpoint.url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "127.0.0.1", parts.port, timeout=TIMEOUT)
    messages = [{"role": "user", "content": prompt}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
    headers = {"content-type": "application/json"}
    if endpoint.api_key:
        headers["authorization"] = f"Bearer {endpoint.api_key}"
    try:
        connection.request("POST", f"{parts.path.rstrip('/')}/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        raw = response.read()
    except OSError as error:
        return Reply(str(error), refused=True)
    finally:
        connection.close()
    if response.status != http.client.OK:
        return Reply(f"HTTP {response.status}: {raw.decode(errors='replace')[:200]}", refused=True)
    choice = json.loads(raw)["choices"][0]
    return Reply(choice["message"]["content"], cut=choice["finish_reason"] == "length")


def judge(task: Task, prompt: str, reply: Reply, max_tokens: int) -> bool:
    """Whether a reply is right; where `max_tokens` is below the task's longest answer, a right beginning will do."""
    if reply.refused:
        return False
    if reply.cut and max_tokens < task.longest:
        return task.is_right_so_far(prompt, reply.text)
    return task.is_right(prompt, reply.text)


def _difference(model: str, task: Task, prompt: str, reply: Reply) -> str:
    """A line that shows a wrong answer from its first wrong character on."""
    right = task.answer(prompt)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(reply.text, right, strict=False)))
    where = f" after {same} right characters" if same else ""
    return f"{model}: {prompt!r} -> {reply.text[same : same + 40]!r}, not {right[same : same + 40]!r}{where}"


def score(endpoint: Endpoint, model: str, task: Task, prompts: list[str], max_tokens: int) -> Score:
    """Ask all prompts, a bounded number at once, and print the first wrong answers."""
    start = time.monotonic()
    with ThreadPoolExecutor(endpoint.concurrency) as pool:
        replies = list(pool.map(lambda prompt: ask(endpoint, model, prompt, max_tokens), prompts))
    seconds = time.monotonic() - start
    pairs = zip(prompts, replies, strict=True)
    wrong = [(prompt, reply) for prompt, reply in pairs if not judge(task, prompt, reply, max_tokens)]
    for prompt, reply in wrong[:SHOWN]:
        print(f"{model}: {prompt!r} -> {reply.text}" if reply.refused else _difference(model, task, prompt, reply))
    return Score(len(prompts) - len(wrong), len(prompts), seconds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="*", default=NAMES, help=f"which of {', '.join(NAMES)}; all by default")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default=os.environ.get("SERVERLESS_LLM_API_KEY"))
    parser.add_argument("--suffix", default="", help="what follows the task in the model's name, as in demo-add-bf16")
    parser.add_argument("--prompts", type=int, default=1000, help="held-out prompts for each task")
    parser.add_argument("--max-tokens", type=int, default=800, help="cut answers here and judge the beginnings")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the scores to this file")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Score the tasks, print a line for each; returns the process's exit status."""
    arguments = _parser().parse_args(argv)
    endpoint = Endpoint(arguments.url, arguments.api_key, arguments.concurrency)
    scores: dict[str, Score] = {}
    for name in arguments.task:
        task, model = TASKS[name], name + arguments.suffix
        max_tokens = min(task.longest, arguments.max_tokens)
        result = score(endpoint, model, task, task.held_out(arguments.prompts), max_tokens)
        scores[model] = result
        print(f"{model}: {result.accuracy:.2%} of {result.prompts} right in {result.seconds:.1f} s", flush=True)
    if arguments.json:
        contents = {model: asdict(result) | {"accuracy": result.accuracy} for model, result in scores.items()}
        arguments.json.write_text(json.dumps(contents, indent=2) + "\n")
    return int(any(result.accuracy < ENOUGH for result in scores.values()))


if __name__ == "__main__":
    sys.exit(main())
