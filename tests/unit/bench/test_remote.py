"""What comes over a network: rows and verdicts, and the server that it is measured against."""

from __future__ import annotations

import random
import socket
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import remote
from bench.network import PLAIN, Link, LinkMissing
from bench.remote import Round, Sample
from serverless_llm.loader.remote import Remote
from tests.serving import until


def made_up(seconds: float = 4.0, read: float = 1.0, again: float = 0.52) -> list[Round]:
    samples = {name: Sample(4.0, 1.0, 1.0) for name in remote.SUBJECTS} | {"ours-library": Sample(seconds, 1.2, read)}
    return [Round(curl=4.0, samples=samples, again=again)] * 3


def test_rows_stand_beside_curl() -> None:
    found = {(entry["subject"], entry["metric"]): entry for entry in remote.rows("http-1g", made_up(5.0), 10**9)}
    entry = found["ours-library", "throughput"]
    assert (entry["median"], entry["ratio_to_limit"]) == (pytest.approx(0.2), pytest.approx(0.8))
    assert found["curl (the limit)", "throughput"]["median"] == pytest.approx(0.25)
    assert found["ours-resumed", "read_ratio"]["median"] == 0.52
    assert found["ours-pull", "cpu_s"]["ratio_to_limit"] is None


def test_what_is_promised_is_judged() -> None:
    judged = remote.verdicts("s3-1g", made_up())
    assert len(judged) == 7
    assert all(line.endswith(": met") for line in judged), judged
    assert "s3-1g ours-library over curl 1.00 (at least 0.95; interval from 1.00): met" in judged
    missed = [line for line in remote.verdicts("s3-1g", made_up(4.3, 1.02, 0.56)) if line.endswith("MISSED")]
    assert [line.split(" (")[0] for line in missed] == [
        "s3-1g ours-library over curl 0.93", "s3-1g ours-library bytes 1.020",
        "s3-1g bytes after a kill at half 0.560",
    ]  # fmt: skip
    noisy = [*made_up(3.0), *made_up(4.0), *made_up(3.5)]
    assert remote.verdicts("s3-1g", noisy)[2].endswith(": too noisy")


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Link]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "model.safetensors").write_bytes(random.Random(1).randbytes(3_000_000))
    (folder / "config.json").write_text("{}")
    with Link(folder, None) as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("url", ["http://{}/model", "s3://bucket/model"])
def test_the_server_answers_ranges_as_the_loader_asks(link: Link, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    for name, value in link.environment.items():
        monkeypatch.setenv(name, value)
    source, expected = Remote(url.format(link.address)), random.Random(1).randbytes(3_000_000)
    files = source.files()
    assert [(file.name, file.size) for file in files] == [("config.json", 2), ("model.safetensors", 3_000_000)]
    before = link.sent()
    assert b"".join(source.read(files[1], 1_000, 2_500_000)) == expected[1_000:2_500_000]
    assert link.sent() - before == 2_499_000
    with PLAIN.open(f"http://{link.address}/model/model.safetensors") as answer:
        assert answer.read() == expected
    with pytest.raises(urllib.error.HTTPError, match="404"):
        PLAIN.open(f"http://{link.address}/model/none")


@pytest.mark.slow
def test_a_client_that_goes_leaves_no_thread_behind(tmp_path: Path) -> None:
    with Link(tmp_path, None) as link:  # of its own: clients of another may still be about to go
        host, port = link.address.split(":")
        before = link.server.num_threads()
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"GET /model/config.json HTTP/1.1\r\nHo")
            until(lambda: link.server.num_threads() > before, "a thread for the client")
        until(lambda: link.server.num_threads() == before, "its end")


def test_a_link_that_cannot_be_made_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LinkMissing, match="install iproute2"):
        Link(tmp_path, 10**9).__enter__()
    (tmp_path / "ip").write_text("#!/bin/sh\necho not permitted >&2; exit 1\n")
    (tmp_path / "ip").chmod(0o755)
    with pytest.raises(LinkMissing, match=r"ip netns add .*: not permitted"):
        Link(tmp_path, 10**9).__enter__()
