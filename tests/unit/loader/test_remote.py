"""What a URL is, and which files a server has for it: over plain HTTP and as a bucket that lists them."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from datetime import timedelta

import pytest

from serverless_llm.errors import CheckpointError, ConfigurationError, TransientError
from serverless_llm.loader import manifest, remote
from serverless_llm.loader.remote import Remote, checked, is_url
from tests.range_server import RangeServer

SHARDS = ("a/model-1.safetensors", "model-2.safetensors")
INDEX = json.dumps({"weight_map": {"x": SHARDS[0], "y": SHARDS[1]}}).encode()
ONE = {"m/config.json": b"{}", "m/tokenizer.json": b"{}", "m/model.safetensors": b"weights", "m/notes.txt": b"no"}
TEMPLATE = "additional_chat_templates/tools.jinja"
SHARDED = {
    "m/config.json": b"{}", "m/model.safetensors.index.json": INDEX, "m/README.md": b"#", f"m/{TEMPLATE}": b"t",
    **{f"m/{name}": b"weights" for name in SHARDS},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRY", {"max_retries": 0})


def names(url: str) -> list[str]:
    return [file.name for file in Remote(url).files()]


def test_what_is_meant_as_a_url() -> None:
    assert is_url("s3://bucket/m")
    assert is_url("ftp://host/m")
    assert not any(map(is_url, ("owner/name", "/a/b", "C:/x", "./s3", None)))
    assert checked("https://host/a/") == checked("https://host/a") == "https://host/a"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://host/m", r"no source begins with ftp://; there are s3://"),
        ("https://me:secret@host/m", "a URL of host has a user or a password in it: give it without: no cred"),
        ("http://me:secret@host/m", "a URL of host has a user or a password in it: give it without: no cred"),
        ("s3://me:secret@host/m", "a URL of host has a user or a password in it: set the store's variables"),
        ("https://host/a/../b", "is no URL of a directory"),
        ("https:///a", "is no URL of a directory"),
        ("https://host/a\n", "is no URL of a directory"),
        ("https://host/a?signature=secret", r"https://host/a: .*without \? and #"),
        ("https://[host/a", "is no URL: "),
    ],
)
def test_what_no_source_is_named_by(url: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as raised:
        checked(url)
    assert "secret" not in str(raised.value)


def test_files_over_plain_http() -> None:
    with RangeServer(ONE | SHARDED | {"n/x": b""}) as server:
        assert names(f"{server.url}/m/") == ["config.json", "tokenizer.json", "model.safetensors"]
        del server.files["m/model.safetensors"]
        found = Remote(f"{server.url}/m").files()
        assert [file.name for file in found] == [
            "config.json",
            "tokenizer.json",
            "model.safetensors.index.json",
            *SHARDS,
        ]
        assert {file.size for file in found if file.name in SHARDS} == {7}
        assert all(file.etag for file in found)


def test_files_of_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    with RangeServer(SHARDED | {"mm/config.json": b"{}"}) as server:
        for name, value in server.s3.items():
            monkeypatch.setenv(name, value)
        assert names("s3://bucket/m") == [TEMPLATE, "config.json", "model.safetensors.index.json", *SHARDS]
        source = Remote("s3://bucket/m")
        file = source.files()[-1]
        assert b"".join(source.read(file, 1, 4)) == b"eig"
        assert source.digest(file) is None
        server.faults.metadata = {"x-amz-meta-sha256": "AB" * 32}
        assert source.digest(file) == ("sha256", "ab" * 32)
        server.files[f"m/additional_chat_templates/{'x' * 250}.jinja"] = b"t"
        with pytest.raises(CheckpointError, match=r"s3://bucket/m: no directory can have a file of the name 'addit"):
            source.files()
        monkeypatch.setattr(remote, "MOST_FILES", 2)
        with pytest.raises(CheckpointError, match="holds more than 2 files: name a checkpoint's own prefix"):
            source.files()


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (b"\xff", "m/model.safetensors.index.json is not UTF-8"),
        (b"[]", "/m/model.safetensors.index.json does not begin a JSON object"),
        (b'{"weight_map": {"x": "../x.safetensors"}}', "/m/.*names '../x.safetensors'"),
        (b'{"weight_map": {"x": "/x.safetensors"}}', "/m/.*names '/x.safetensors'"),
        (b'{"weight_map": {"x": "a//x.safetensors"}}', "/m/.*names 'a//x.safetensors': write 'a/x"),
        (b'{"weight_map": {"x": "%s.safetensors"}}' % (122 * "\u00e9").encode(), "names '\u00e9+.safetensors'"),
        (b'{"weight_map": {"x": "%sx.safetensors"}}' % (1012 // 2 * b"d/"), "names 'd/d/"),
        (
            b'{"weight_map": {"x": "a.safetensors", "y": "a.safetensors/b/c.safetensors"}}',
            "can have .a.safetensors. and .a.saf",
        ),
        (
            b'{"weight_map": {"x": "config.json/b.safetensors", "y": "config.json!.safetensors"}}',
            "can have 'config.json' and 'config.json/b.saf",
        ),
        (b'{"weight_map": {"x": "x.safetensors"}}', "/m has no x.safetensors, which its index names"),
        (
            b'{"weight_map": {"x": "1.safetensors", "y": "2.safetensors", "z": "3.safetensors"}}',
            "/m/.*names more than 2 files",
        ),
        (b" " * 2001, "index.json is larger than 2000 bytes"),
    ],
)
def test_an_index_is_not_believed(index: bytes, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "MAX_FILES", 2)
    monkeypatch.setattr(manifest, "MAX_INDEX", 2000)
    with (
        RangeServer({"m/model.safetensors.index.json": index, "m/config.json": b"{}"}) as server,
        pytest.raises(CheckpointError, match=said),
    ):
        Remote(f"{server.url}/m").files()


def test_names_may_be_as_long_as_files_can_have_them() -> None:
    shards = ["x" * 243 + ".safetensors", "d/" * 505 + "xx.safetensors"]
    assert [len(name) for name in shards] == [255, 1024]
    index = json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}).encode()
    with RangeServer({f"m/{manifest.INDEX}": index, **{f"m/{name}": b"weights" for name in shards}}) as server:
        assert names(f"{server.url}/m") == [manifest.INDEX, *sorted(shards)]


@pytest.mark.parametrize("files", [ONE, SHARDED])
def test_weights_without_a_version_are_refused(files: dict[str, bytes]) -> None:
    with RangeServer(dict(files)) as server:
        url = f"{server.url}/m"
        server.faults.etag = None
        assert names(url)
        server.faults.etag, server.faults.modified = "", None
        assert names(url)
        server.faults.etag = None
        with pytest.raises(
            CheckpointError, match=rf"^{url}/\S+safetensors: .* neither its ETag .*: have it send one, or"
        ):
            names(url)


def test_what_cannot_be_read_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with RangeServer(dict(ONE)) as server:
        url = f"{server.url}/m"
        with pytest.raises(CheckpointError, match=r"/nothing has neither model.safetensors nor"):
            Remote(f"{server.url}/nothing").files()
        server.faults.statuses = {"m/config.json": 403}  # some servers refuse what they have not
        assert names(url) == ["tokenizer.json", "model.safetensors"]
        server.faults.statuses = {name: 403 for name in ONE}
        with pytest.raises(CheckpointError, match=r"/m/.* may not be read: the server refuses it"):
            Remote(url).files()
        server.faults.statuses = {name: 503 for name in ONE}
        with pytest.raises(TransientError, match=f"{url}/.*503 Service Unavailable"):
            Remote(url).files()
        for name, value in server.s3.items():
            monkeypatch.setenv(name, value)
        server.faults.statuses = {"": 403}
        served = "; a deployed model is read in the environment of serverless-llm serve"
        with pytest.raises(CheckpointError, match=rf"may not be read: set AWS_ACCESS_KEY_ID .*{served}$"):
            Remote("s3://bucket/m").files()
        with (
            monkeypatch.context() as plain,
            pytest.raises(
                CheckpointError,
                match=r"^s3://bucket/m: its endpoint is plain HTTP, set AWS_ALLOW_HTTP=true to allow that$",
            ),
        ):
            plain.delenv("AWS_ALLOW_HTTP")
            Remote("s3://bucket/m").files()
        server.faults.statuses = {"": 404}
        with pytest.raises(CheckpointError, match=r"^s3://bucket/m is not there$"):
            Remote("s3://bucket/m").files()
        server.faults.statuses = {"": 500}
        with pytest.raises(TransientError, match=r"^s3://bucket/m: .*500 Internal Server Error$"):
            Remote("s3://bucket/m").files()
    with pytest.raises(TransientError, match=f"^{url} cannot be reached: connection refused$"):
        Remote(url).files()
    with pytest.raises(TransientError, match=rf"^s3://bucket/m \(at 127.0.0.1:{server.port}\) cannot be reached: conn"):
        Remote("s3://bucket/m").files()


def test_a_host_that_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE", timedelta(seconds=0.1))
    url = f"http://{'x' * 64}.invalid/m"  # longer than a part of a name can be: no name server is asked
    with pytest.raises(TransientError, match=f"^{url} cannot be reached: its name "):
        Remote(url).files()
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as clients:
        for _ in range(4):  # their calls are never taken
            client = clients.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/m"
        with pytest.raises(TransientError, match=f"^{url} cannot be reached: timed out$"):
            Remote(url).files()
    monkeypatch.setattr(remote, "PATIENCE", timedelta(seconds=1))  # its refusal takes a moment to come
    with RangeServer({}) as server, pytest.raises(TransientError, match=r"/m cannot be reached: it does not speak TLS"):
        Remote(f"https://127.0.0.1:{server.port}/m").files()


def test_an_answer_that_breaks_off_says_so() -> None:
    with RangeServer(dict(ONE)) as server:
        patient, hasty = Remote(f"{server.url}/m"), Remote(f"{server.url}/m", silence=timedelta(seconds=0.2))
        file = patient.files()[-1]
        server.faults.resets, server.faults.reset_after = remote.TRIES, 0
        with pytest.raises(TransientError, match=r"/m/model.safetensors: the connection broke off$"):
            list(patient.read(file, 0, 7))
        server.faults.budget = 0
        with pytest.raises(TransientError, match=r"/m/model.safetensors: the server was silent, or too slow$"):
            list(hasty.read(file, 0, 7))


def test_what_drips_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with RangeServer(dict(ONE) | {"m/tokenizer.json": bytes(1000)}) as server:
        file = Remote(f"{server.url}/m").files()[1]
        monkeypatch.setattr(remote, "LONGEST", timedelta(seconds=0.05))
        server.faults.drip = 0.001
        with pytest.raises(TransientError):
            Remote(f"{server.url}/m").text(file, 1000)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigurationError, match=r"constraints\.txt '\.\[remote\]'"):
        Remote("https://host/m")
