"""What an operator is refused, over HTTP by a real head: whether to ask again, and when."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from serverless_llm import wire
from serverless_llm.cli.make_checkpoint import make_checkpoint
from serverless_llm.cluster.machine import Machine
from serverless_llm.cluster.policy import Policy
from serverless_llm.gateway.options import GatewayOptions
from serverless_llm.node.head import Head
from serverless_llm.node.state import State
from tests.integration.scripted import Controller, Served, run, silent

pytestmark = pytest.mark.slow

USELESS, LATER = (None, "false"), ("10", None)  # Retry-After, x-should-retry


@contextmanager
def read_only(kept: State) -> Iterator[None]:
    """As on a disk that went read-only."""
    kept._database.execute("PRAGMA query_only = ON")
    yield
    kept._database.execute("PRAGMA query_only = OFF")


def test_an_error_says_whether_to_ask_again(tmp_path: Path) -> None:
    root = tmp_path / "models"
    make_checkpoint("tiny-llama", root / "tiny", dtype="float32")
    tiny = {"source": str(root / "tiny")}

    async def scenario(server: Served) -> None:
        async def refused(method: str, path: str, status: int, code: str, json: Any = None) -> tuple[str | None, ...]:
            async with server.http.request(method, f"/admin/{path}", json=json) as response:
                assert (response.status, (await response.json())["error"]["code"]) == (status, code)
                return response.headers.get("Retry-After"), response.headers.get("x-should-retry")

        def asked(_controller: Controller, message: wire.Message) -> None:
            head.receive(message)

        with closing(State(tmp_path / "state")) as kept:
            head = Head(kept, Machine(Policy()), [], server.controller.deliver, keep_alive=300.0, roots=(root,))
            await head.restore({})
            server.controller.on = asked
            bad = "invalid_request_error"
            assert await refused("PUT", "models/a", 400, bad, {}) == USELESS
            assert await refused("PUT", "models/a", 400, bad, tiny | {"sauce": 1}) == USELESS
            absent = {"source": str(root / "absent")}
            assert await refused("PUT", "models/a", 400, "invalid_checkpoint", absent) == USELESS
            assert await refused("PUT", "models/a", 403, "permission_denied", {"source": str(tmp_path)}) == USELESS
            for method, path in (("GET", "a"), ("DELETE", "a"), ("POST", "a/load"), ("POST", "a/pin")):
                assert await refused(method, f"models/{path}", 404, "model_not_found") == USELESS
            assert await refused("POST", "nodes/n9/drain", 404, "not_found") == USELESS
            with read_only(kept):
                assert await refused("PUT", "models/a", 503, "overloaded", tiny) == LATER
            async with server.http.put("/admin/models/a", json=tiny) as response:
                assert response.status == 200
            with read_only(kept):
                assert await refused("DELETE", "models/a", 503, "overloaded") == LATER
                assert await refused("POST", "models/a/pin", 503, "overloaded", {}) == LATER

        shutil.rmtree(root / "tiny")
        with closing(State(tmp_path / "state")) as kept:
            head = Head(kept, Machine(Policy()), [], server.controller.deliver, keep_alive=300.0, roots=(root,))
            await head.restore({})
            assert await refused("POST", "models/a/load", 503, "model_load_failed") == USELESS
        assert await refused("DELETE", "models/a", 500, "engine_error") == USELESS  # a bug: the state is closed

    run(tmp_path, silent, scenario)


def test_a_controller_that_does_not_answer_may_be_asked_again(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with server.http.get("/admin/status") as response:
            assert (response.status, response.headers.get("Retry-After")) == (503, "5")

    run(tmp_path, silent, scenario, GatewayOptions(admin_timeout=0.01))
