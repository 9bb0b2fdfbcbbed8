"""A bucket as others have written it: moto's, from an environment of its own (`python -m bench.peers moto`)."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest
import torch
from obstore.store import S3Store

from bench import peers
from bench.network import PLAIN
from serverless_llm.loader import download, load_checkpoint, load_file
from serverless_llm.loader.disk_tier import DiskTier, tier
from tests.serving import until
from tests.unit.loader import checkpoints

pytestmark = pytest.mark.storm

SERVER = """
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
input()
"""
URL = "s3://bucket/m"
PULL = [sys.executable, "-m", "serverless_llm", "pull", URL]


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Store]:
    """An empty one, by the variables that every command takes."""
    try:
        python = peers.python("moto")
    except peers.PeerMissing as error:
        pytest.skip(str(error))
    pipe = subprocess.PIPE
    with subprocess.Popen([python, "-c", SERVER], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            endpoint = f"http://127.0.0.1:{int(process.stdout.readline())}"
            for name, value in {
                "AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
                "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "XDG_CACHE_HOME": str(tmp_path),
                "SERVERLESS_LLM_REMOTE_CACHE": "500MB",
            }.items():  # fmt: skip
                monkeypatch.setenv(name, value)
            PLAIN.open(urllib.request.Request(f"{endpoint}/bucket", method="PUT")).close()
            yield S3Store("bucket", client_options={"allow_http": True})
        finally:
            process.kill()


def put(bucket: S3Store, directory: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    files["tokenizer.json"] = b"{}"
    for name, data in files.items():
        obstore.put(bucket, f"m/{name}", data)
    return files


def held(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def landed(there: DiskTier) -> int:
    """Bytes that records tell of."""
    texts = [path.read_text() for path in there.root.glob(f"*/*/{download.RECORD}")]
    return sum(one.stop - one.start for text in texts for one in download.recorded(text, [1 << 30] * 9))


def test_what_a_kill_left_is_gone_on_with(bucket: S3Store, tmp_path: Path) -> None:
    files = put(bucket, checkpoints.write(tmp_path / "m", checkpoints.random(80, 1), checkpoints.random(80, 2)))
    total = sum(map(len, files.values()))
    with subprocess.Popen(PULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as victim:
        until(lambda: landed(tier()) > total // 3, "a third of it", 60)
        victim.kill()
    before = landed(tier())
    assert before < total
    assert tier().cached(URL) is None
    told: dict[str, list[int]] = {}
    with tier().bring(URL, lambda name, done, size: told.setdefault(name, []).append(done)) as lease:
        assert held(lease.directory) == files
    assert sum(done[0] for done in told.values()) >= before, "what was there is asked for again"


def test_what_changes_comes_beside_what_is_in_use(bucket: S3Store, tmp_path: Path) -> None:
    first = put(bucket, checkpoints.write(tmp_path / "m", checkpoints.random(24, 1)))
    with tier().bring(URL, lambda name, done, size: None) as lease:
        second = put(bucket, checkpoints.write(tmp_path / "n", checkpoints.random(24, 2)))
        brought = load_checkpoint(URL)
        assert held(lease.directory) == first != second
    expected = load_file(tmp_path / "n" / "model.safetensors")
    assert brought.keys() == expected.keys()
    assert all(torch.equal(brought[name], tensor) for name, tensor in expected.items())
