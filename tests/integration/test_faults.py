"""Faults beside a healthy model, over HTTP: each gives its error or recovers, and nothing accepted is lost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.faulty_reads import FaultyReads
from tests.integration.completing import Streamed, apart, ask, checkpoint, deploy, loading, status
from tests.serving import Server, descriptors, until

pytestmark = pytest.mark.slow

SHM = 64 << 20  # bytes of /dev/shm in a container
OPTIONS = ("--devices", "cpu:1", "--device-memory", "64MiB", "--dram", "128MiB", "--limit", "disk=2MB/s")


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory) -> FaultyReads:
    return FaultyReads(tmp_path_factory.mktemp("reads"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, reads: FaultyReads) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("faults") / "state", *OPTIONS, through=reads.command) as server:
        yield server


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of three files that takes half a second to load, or for as long as one of them is held."""
    return checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def model(server: Server, source: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """`source`, deployed under a name of this test's own; gone after it."""
    name = "m-" + "".join(letter for letter in request.node.name if letter.isalnum())
    deploy(server, name, source)
    yield name
    if name in names(server):
        server.put(f"/admin/models/{name}", {}, "DELETE")


def names(server: Server) -> list[str]:
    return [row["id"] for row in server.get("/v1/models")["data"]]


def quiet(server: Server) -> bool:
    return not any(device["sequences"] for device in server.devices())


# --- files ---


def rewritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(bytes(4096))


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4096)


def deleted(path: Path) -> None:
    path.unlink()


CHANGES = [rewritten, truncated, deleted]
FIRST, LAST = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changed_while_its_model_was_deployed(
    server: Server, model: str, source: Path, change: Callable[[Path], None]
) -> None:
    size = (source / LAST).stat().st_size
    change(source / LAST)
    code, error = ask(server, model)
    assert (code, error["code"]) == (503, "model_load_failed")
    why: dict[object, str] = {
        rewritten: f"{source} was changed after it was deployed: deploy it again",
        truncated: f"{source / LAST}: truncated: tensors end at byte {size}, the file at {size - 4096}:"
        " copy or download it again; mend that and deploy it again",
        deleted: f"{LAST} is missing in {source}; mend that, and it is served again within a minute",
    }
    assert error["message"] == why[change]
    assert status(server, model)["value"] == "failed"
    for left in source.iterdir():
        left.unlink()
    source.rmdir()
    deploy(server, model, checkpoint(source))
    assert ask(server, model)[0] == 200


def test_files_that_are_as_they_were_deployed_again_are_served_once_an_operator_loads_them(
    server: Server, model: str, source: Path
) -> None:
    path = source / LAST
    whole, stat = path.read_bytes(), path.stat()
    truncated(path)
    assert ask(server, model)[0] == 503
    path.write_bytes(whole)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert ask(server, model)[0] == 503
    server.put(f"/admin/models/{model}/load", {}, "POST")
    assert ask(server, model)[0] == 200


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_its_model_loads(
    server: Server, model: str, source: Path, reads: FaultyReads, change: Callable[[Path], None]
) -> None:
    with reads.held(source / LAST):
        waiting = apart(lambda: ask(server, model))
        loading(server, model)
        change(source / FIRST)  # it is open
    code, answer = waiting.result(30)
    if change is deleted:  # but open: its bytes are there
        assert (code, answer) == (200, said_by_its_twin(server, source))
    else:
        assert (code, answer["code"]) == (503, "model_load_failed")
        assert FIRST in answer["message"]


def said_by_its_twin(server: Server, source: Path) -> str:
    """What the same weights say, as another checkpoint."""
    twin = source.with_name("twin")
    checkpoint(twin)
    deploy(server, "twin", twin)
    code, text = ask(server, "twin")
    assert code == 200
    server.put("/admin/models/twin", {}, "DELETE")
    return str(text)


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_its_model_runs(
    server: Server, model: str, source: Path, change: Callable[[Path], None]
) -> None:
    expected = ask(server, model)
    running = Streamed(server, model).begin()
    change(source / LAST)
    assert (200, running.rest()) == expected
    assert ask(server, model) == expected
    server.put(f"/admin/models/{model}/unload", {}, "POST")
    until(lambda: status(server, model)["value"] == "unloaded", "the unload")
    assert ask(server, model) == expected  # from DRAM: what was deployed


def test_weights_that_are_not_numbers_are_named_to_the_client(server: Server, model: str, source: Path) -> None:
    tensors = load_file(source / LAST)
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}, source / LAST)
    deploy(server, model, source)
    code, error = ask(server, model)
    assert (code, error["code"]) == (500, "engine_error")
    assert "logits are NaN or infinite" in error["message"]


# --- requests ---


def test_delete_while_it_loads_tells_who_waits(server: Server, model: str, source: Path, reads: FaultyReads) -> None:
    with reads.held(source / LAST):
        waiting = apart(lambda: ask(server, model))
        loading(server, model)
        server.put(f"/admin/models/{model}", {}, "DELETE")
    code, error = waiting.result(10)
    assert (code, error["code"]) == (404, "model_not_found")
    until(lambda: not server.devices()[0]["replicas"] or model not in str(server.devices()), "its end")


def test_delete_while_it_runs_lets_who_runs_end(server: Server, model: str) -> None:
    expected = ask(server, model)
    running = Streamed(server, model).begin()
    server.put(f"/admin/models/{model}", {}, "DELETE")
    assert ask(server, model)[0] == 404
    assert (200, running.rest()) == expected


def test_redeploy_while_it_loads_answers_by_the_new_one(
    server: Server, model: str, source: Path, reads: FaultyReads
) -> None:
    other = checkpoint(source.with_name("other"), seed=1)
    with reads.held(source / LAST):
        waiting = apart(lambda: ask(server, model))
        loading(server, model)
        deploy(server, model, other)
    code, error = waiting.result(30)
    assert (code, error["code"]) == (503, "model_loading")  # worth another try
    assert ask(server, model)[0] == 200


def test_redeploy_while_it_runs_lets_who_runs_end_on_the_old_weights(server: Server, model: str, source: Path) -> None:
    other = checkpoint(source.with_name("other"), seed=1)
    expected = ask(server, model)
    running = Streamed(server, model).begin()
    deploy(server, model, other)
    after = apart(lambda: ask(server, model))
    assert (200, running.rest()) == expected
    code, text = after.result(30)
    assert code == 200
    assert text != expected[1]


def test_unload_while_it_loads_keeps_who_waits(server: Server, model: str, source: Path, reads: FaultyReads) -> None:
    with reads.held(source / LAST):
        waiting = apart(lambda: ask(server, model))
        loading(server, model)
        server.put(f"/admin/models/{model}/unload", {}, "POST")
    assert waiting.result(30)[0] == 200


def test_unload_while_it_runs_waits_for_who_runs(server: Server, model: str) -> None:
    expected = ask(server, model)
    running = Streamed(server, model).begin()
    server.put(f"/admin/models/{model}/unload", {}, "POST")
    assert (200, running.rest()) == expected
    until(lambda: status(server, model)["value"] == "unloaded", "the unload")


def test_requests_in_the_moment_of_their_models_expiry(server: Server, source: Path, model: str) -> None:
    """Each answer's end begins an unload, which the next request meets at another moment."""
    deploy(server, model, source, keep_alive=0)
    expected = ask(server, model, max_tokens=4)
    assert expected[0] == 200
    with ThreadPoolExecutor(3) as clients:
        answers = list(clients.map(lambda _: ask(server, model, max_tokens=4), range(30)))
    assert answers == [expected] * 30
    assert sum(start["model"] == model for start in server.status()["starts"]) > 1


def test_a_client_that_gives_up_sooner_than_a_load_ends_gets_its_answer_by_trying_again(
    tmp_path: Path, source: Path
) -> None:
    """Each try begins where the load has come to meanwhile, though nobody waited in between."""
    with Server(tmp_path / "state", *OPTIONS[:-1], "disk=500KB/s") as server:
        deploy(server, "m", source)
        base_url = f"{server.url}/v1"
        with openai.OpenAI(base_url=base_url, api_key="none", timeout=0.75, max_retries=0) as hasty:
            with pytest.raises(openai.APITimeoutError):
                hasty.completions.create(model="m", prompt="abc", max_tokens=4)
            answer = hasty.with_options(max_retries=10).completions.create(model="m", prompt="abc", max_tokens=4)
        assert answer.usage and answer.usage.completion_tokens == 4
        (start,) = server.status()["starts"]
        assert start["done"] == sum(file.stat().st_size for file in source.glob("*.safetensors"))


@pytest.mark.storm
def test_with_2_s_of_patience_and_3_retries_a_client_gets_its_answer_from_a_load_of_5_s(
    tmp_path: Path, source: Path
) -> None:
    nbytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    with Server(tmp_path / "state", *OPTIONS[:-1], f"disk={nbytes // 5000}KB/s") as server:
        deploy(server, "m", source)
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=2.0, max_retries=3) as client:
            answer = client.completions.create(model="m", prompt="abc", max_tokens=4)
        assert answer.usage and answer.usage.completion_tokens == 4
        (start,) = server.status()["starts"]
        assert start["done"] == nbytes
        assert start["seconds"] > 4


def test_a_client_that_goes_away_while_it_loads_leaves_the_load_to_others(
    server: Server, model: str, source: Path, reads: FaultyReads
) -> None:
    with reads.held(source / LAST):
        leaving = Streamed(server, model)
        loading(server, model)
        leaving.leave()
    assert ask(server, model)[0] == 200
    until(lambda: quiet(server), "no sequence")
    (start,) = [one for one in server.status()["starts"] if one["model"] == model]
    assert start["done"] == sum(file.stat().st_size for file in source.glob("*.safetensors"))  # each byte once


def test_a_client_that_goes_away_while_it_runs_frees_its_place(server: Server, model: str) -> None:
    expected = ask(server, model)
    running = Streamed(server, model, max_tokens=1500, n=16).begin()
    until(lambda: server.devices()[0]["kv_used"], "the worker's word of it")
    running.leave()
    until(lambda: quiet(server) and not server.devices()[0]["kv_used"], "no sequence", 3.0)  # they would go on longer
    assert ask(server, model) == expected


# --- machine ---


def test_nothing_lies_in_dev_shm(server: Server, model: str) -> None:
    """So that its 64 MiB in a container are no limit: the pool is a memfd."""
    assert ask(server, model)[0] == 200
    (node,) = server.status()["nodes"]
    assert node["dram"] > SHM
    places = [link for process in server.processes() for link in descriptors(process.pid)]
    maps = "".join(Path(f"/proc/{process.pid}/maps").read_text() for process in server.processes())
    assert not any(link.startswith("/dev/shm") for link in places)
    assert "/dev/shm" not in maps
    assert "/memfd:weights" in maps
