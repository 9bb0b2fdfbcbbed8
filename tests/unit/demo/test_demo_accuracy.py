import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from serverless_llm.demo import accuracy
from serverless_llm.demo.accuracy import Reply, judge
from serverless_llm.demo.tasks import ADD, COUNT, TASKS

Answer = Callable[[str, str, int], tuple[int, str]]  # model, prompt, max_tokens -> status, text


class Oracle(BaseHTTPRequestHandler):
    """Answers chat completions by the `answer` of its class."""

    answer: Answer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert self.path == "/base/v1/chat/completions"
        assert self.headers["authorization"] == "Bearer key"
        assert body["temperature"] == 0
        status, text = type(self).answer(body["model"], body["messages"][0]["content"], body["max_tokens"])
        cut = len(text) >= body["max_tokens"]
        choice = {"message": {"content": text[: body["max_tokens"]]}, "finish_reason": "length" if cut else "stop"}
        raw = json.dumps({"choices": [choice]}).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 64


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    servers: list[Server] = []

    def start(answer: Answer) -> str:
        handler = type("Handler", (Oracle,), {"answer": staticmethod(answer)})
        servers.append(Server(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,)).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/base/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def right(model: str, prompt: str, max_tokens: int) -> tuple[int, str]:
    return 200, TASKS[model.removesuffix("-x")].answer(prompt)


def run(url: str, *options: str) -> int:
    return accuracy.main(["--url", url, "--api-key", "key", "--prompts", "20", *options])


def test_right_answers_pass_and_are_written_down(serve: Callable[[Answer], str], tmp_path: Path) -> None:
    assert run(serve(right), "--suffix=-x", "--json", str(tmp_path / "scores.json")) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores) == {"demo-count-x", "demo-add-x", "demo-reverse-x"}
    assert all(score["accuracy"] == 1.0 and score["prompts"] == 20 for score in scores.values())


def test_one_wrong_in_twenty_fails(serve: Callable[[Answer], str], capsys: pytest.CaptureFixture[str]) -> None:
    unlucky = ADD.held_out(20)[3]
    url = serve(lambda model, prompt, cut: (200, "x") if prompt == unlucky else right(model, prompt, cut))
    assert run(url) == 1
    printed = capsys.readouterr().out
    assert "demo-add: 95.00% of 20 right" in printed
    assert repr(unlucky) in printed


def test_a_wrong_answer_is_shown_from_its_first_wrong_character(
    serve: Callable[[Answer], str], capsys: pytest.CaptureFixture[str]
) -> None:
    url = serve(lambda model, prompt, cut: (200, COUNT.answer(prompt)[:7] + "x"))
    assert run(url, "demo-count") == 1
    assert " -> 'x', not " in capsys.readouterr().out


def test_refusals_are_wrong_and_shown(serve: Callable[[Answer], str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(serve(lambda *_: (503, "busy")), "demo-reverse") == 1
    assert "HTTP 503" in capsys.readouterr().out


def test_nobody_listening_is_wrong() -> None:
    assert run("http://127.0.0.1:9", "demo-reverse") == 1


def test_cut_answers_are_judged_by_their_beginning_if_asked_for(serve: Callable[[Answer], str]) -> None:
    assert run(serve(right), "demo-count", "--max-tokens", "7") == 0


@pytest.mark.parametrize(
    ("reply", "max_tokens", "verdict"),
    [
        (Reply("2 3 4", cut=True), 5, True),
        (Reply("2 3 5", cut=True), 5, False),
        (Reply("2 3 4", cut=False), 5, False),
        (Reply("2 3 4", cut=True), COUNT.longest, False),
        (Reply("", cut=True, refused=True), 5, False),
        (Reply(COUNT.answer("1")), COUNT.longest, True),
    ],
)
def test_judge(reply: Reply, max_tokens: int, verdict: bool) -> None:
    assert judge(COUNT, "1", reply, max_tokens) is verdict
