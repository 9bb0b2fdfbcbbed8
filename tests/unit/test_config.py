"""Configuration: where values come from, how quantities are written, what each mistake says."""

from __future__ import annotations

import math
import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from serverless_llm import config, surroundings
from serverless_llm.config import Config, count_gpus, flag, load, parse_devices
from serverless_llm.errors import ConfigurationError
from serverless_llm.quantities import parse_duration, parse_rate, parse_size

GIB = 1 << 30


def loaded(flags: dict[str, Any] | None = None, path: Path | None = None, **environ: str) -> Config:
    return load({"devices": "cpu:1", **(flags or {})}, {"HOME": "/home/someone", **environ}, path, memory=8 * GIB)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "serverless-llm.yaml"


# --- sources ---


def test_flag_beats_environment_beats_file_beats_default(file: Path) -> None:
    file.write_text("port: 1\nhost: 10.0.0.1\ndrain: 5m\n")
    read = loaded({"port": 3}, file, SERVERLESS_LLM_PORT="2", SERVERLESS_LLM_HOST="10.0.0.2")
    assert (read.port, read.host, read.drain, read.hold) == (3, "10.0.0.2", 300.0, 60.0)


def test_flags_that_were_not_given_count_for_nothing() -> None:
    assert loaded({"port": None}, SERVERLESS_LLM_PORT="2").port == 2


def test_file_is_named_by_the_environment(file: Path) -> None:
    file.write_text("port: 7\n")
    assert loaded(SERVERLESS_LLM_CONFIG=str(file)).port == 7


def test_search_path_begins_here_and_ends_in_etc() -> None:
    paths = surroundings.search_path({"HOME": "/home/someone"})
    assert [str(path) for path in paths] == [
        "serverless-llm.yaml",
        "/home/someone/.config/serverless-llm/serverless-llm.yaml",
        "/etc/serverless-llm/serverless-llm.yaml",
    ]
    assert surroundings.search_path({"XDG_CONFIG_HOME": "/x"})[1] == Path("/x/serverless-llm/serverless-llm.yaml")


@pytest.mark.parametrize("environ", [{}, {"HOME": ""}])
def test_without_home_it_is_the_one_that_the_system_knows(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]
) -> None:
    home = Path(pwd.getpwuid(os.getuid()).pw_dir)
    assert surroundings.search_path(environ)[1] == home / ".config/serverless-llm/serverless-llm.yaml"
    assert surroundings.state_dir(environ) == home / ".local/state/serverless-llm"
    assert surroundings.cache_dir(environ) == home / ".cache/serverless-llm"
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)  # as in a container, of a user whom it does not know
    assert surroundings.state_dir(environ) == Path("/.local/state/serverless-llm")


def test_first_file_of_the_search_path_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "serverless-llm.yaml").write_text("port: 9\n")
    assert loaded().port == 9


def test_a_user_has_a_file_and_a_flag_names_another(tmp_path: Path, file: Path) -> None:
    (tmp_path / "serverless-llm").mkdir()
    (tmp_path / "serverless-llm" / "serverless-llm.yaml").write_text("port: 5\n")
    file.write_text("port: 6\n")
    home = str(tmp_path)
    assert loaded(XDG_CONFIG_HOME=home).port == 5
    assert loaded(XDG_CONFIG_HOME=home, SERVERLESS_LLM_CONFIG=str(file)).port == 6
    assert loaded(path=file, XDG_CONFIG_HOME=home, SERVERLESS_LLM_CONFIG="/nowhere").port == 6


def test_an_empty_file_is_a_file_of_defaults(file: Path) -> None:
    file.write_text("")
    assert loaded(path=file) == loaded()


def test_secrets_come_from_the_environment(file: Path) -> None:
    file.write_text("api_key: ${env.KEY}-x\nhosts: ['${env.NAME}.example']\nmodels: {m: {source: '${env.NAME}'}}\n")
    read = loaded(path=file, KEY="secret", NAME="gpu")
    assert (read.api_key, read.hosts, read.models["m"].source) == ("secret-x", ("gpu.example",), "gpu")


def test_lists_and_pairs_in_the_environment() -> None:
    read = loaded(SERVERLESS_LLM_HOSTS="a,2001:db8::1", SERVERLESS_LLM_LIMITS="disk=20MB/s,upload=1GB/s,remote=1MB/s")
    assert read.hosts == ("a", "2001:db8::1")
    assert read.limits == config.Limits(disk=20e6, upload=1e9, remote=1e6)


# --- defaults that depend on the machine ---


def test_memory_is_shared_among_nodes_and_devices() -> None:
    read = loaded({"nodes": 2, "devices": "cpu:2"})
    assert (read.dram, read.device_memory) == (2 * GIB, GIB)


def test_shares_and_sizes_of_memory() -> None:
    read = loaded({"dram": "25%", "device_memory": "1.5GiB"})
    assert (read.dram, read.device_memory) == (2 * GIB, GIB * 3 // 2)


def test_gpus_keep_their_own_memory() -> None:
    assert loaded({"devices": "cuda:2"}).device_memory is None
    assert loaded({"devices": "cuda:2", "device_memory": "10GiB"}).device_memory == 10 * GIB


@pytest.mark.parametrize(
    "options",
    [{"dram": "100TB"}, {"dram": "5GiB", "nodes": 2}, {"dram": "1KB"}, {"device_memory": "9GiB"}, {"device_memory": 9}],
)
def test_memory_that_is_not_there_or_holds_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"is (less than 1 MiB|more than the 8.6 GB available here)$"):
        loaded({"devices": "cpu:1", **options})


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (9, 2), (64, 15)])
def test_devices_share_the_cores_but_one(monkeypatch: pytest.MonkeyPatch, cores: int, threads: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    assert loaded({"nodes": 2, "devices": "cpu:2"}).threads == threads
    assert loaded({"threads": 3}).threads == 3
    assert loaded({"devices": "cpu:1"}).threads == cores - (cores > 2)


def test_state_directory(tmp_path: Path) -> None:
    assert loaded().state_dir == Path("/home/someone/.local/state/serverless-llm")
    assert loaded(XDG_STATE_HOME=str(tmp_path)).state_dir == tmp_path / "serverless-llm"
    assert surroundings.state_dir({"SERVERLESS_LLM_STATE_DIR": "/elsewhere"}) == Path("/elsewhere")
    assert surroundings.state_dir({"HOME": "/home/someone"}) == Path("/home/someone/.local/state/serverless-llm")


def test_this_machine_has_memory() -> None:
    assert load({}, {"HOME": "/home/someone"}).dram > 0


# --- quantities ---


@pytest.mark.parametrize(
    ("text", "size"),
    [("1536", 1536), (2048, 2048), ("2GiB", 2 * GIB), ("20MB", 20_000_000), ("1.5 KiB", 1536), ("3T", 3 * 10**12)],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "5 XB", "9" * 400, "9" * 20 + "TB", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigurationError, match="is no size"):
        parse_size(text)


def test_rates() -> None:
    assert (parse_rate("20MB/s"), parse_rate("1GiB"), parse_rate(5)) == (20e6, float(GIB), 5.0)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5m", 300.0),
        (90, 90.0),
        ("0", 0.0),
        ("500ms", 0.5),
        ("2h", 7200.0),
        ("-1", math.inf),
        ("1h30m", 5400.0),
        ("-1m", math.inf),
        (-1.0, math.inf),
        (" 2 s ", 2.0),
    ],
)
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "soon", "5x", "m5", "--1", "1m 30", "9" * 400, "1e9", "inf", "-5m", "-7", "-1m30s", "-10", "-1.5", "-0"],
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ConfigurationError, match="is no duration"):
        parse_duration(text)


def test_devices() -> None:
    assert parse_devices("cpu:2") == ("cpu", 2)
    assert parse_devices("cuda") == ("cuda", 1)
    assert parse_devices("auto") == ("cpu", 1)
    assert parse_devices("auto", gpus=2) == ("cuda", 2)


@pytest.mark.parametrize(
    ("visible", "gpus"), [({}, 3), ({"CUDA_VISIBLE_DEVICES": "2,0"}, 2), ({"CUDA_VISIBLE_DEVICES": ""}, 0),
                          ({"CUDA_VISIBLE_DEVICES": "0,-1,1"}, 1), ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 3)],
)  # fmt: skip
def test_gpus_are_those_that_cuda_may_see(tmp_path: Path, visible: dict[str, str], gpus: int) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia7", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert count_gpus(visible, tmp_path) == gpus


def test_models_by_name() -> None:
    read = loaded({"models": ("a=/x", "b/c=/y")})
    assert {name: entry.source for name, entry in read.models.items()} == {"a": "/x", "b/c": "/y"}


def test_models_in_the_file(file: Path) -> None:
    file.write_text("models:\n  a: /x\n  b: {source: /y, keep_alive: 5m, context: 512, pinned: true, verify: full}\n")
    read = loaded(path=file)
    assert read.models["a"] == config.ModelEntry(source="/x")
    assert read.models["b"] == config.ModelEntry(source="/y", keep_alive=300.0, context=512, pinned=True, verify="full")


def test_models_are_called_as_it_is_written(file: Path) -> None:
    """YAML 1.1 reads some names as numbers and truth values."""
    file.write_text("models: {yes: /a, on: /b, 1.10: /c, 0777: /d, 1: /e, null: /f, 2021-01-01: /g, &x 1_0: /h}\n")
    names = ["yes", "on", "1.10", "0777", "1", "null", "2021-01-01", "1_0"]
    assert {name: one.source for name, one in loaded(path=file).models.items()} == dict(
        zip(names, (f"/{letter}" for letter in "abcdefgh"), strict=True)
    )
    file.write_text("{nodes: &one 1, models: {a: {source: /x, context: *one}, *one : /y}}\n")
    read = loaded(path=file).models
    assert (read["a"].context, read["1"].source) == (1, "/y")


def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    read = loaded({"state_dir": Path("state"), "model_roots": ("models",)})
    assert (read.state_dir, read.model_roots) == (tmp_path / "state", (tmp_path / "models",))


# --- mistakes ---


MISTAKES = [  # in a file, the place that the message names after the file, and what it says
    ("prot: 1", "", "unknown key 'prot'; did you mean 'port'?"),
    ("limits: {dsik: 1}", "limits", "unknown key 'dsik'; did you mean 'disk'?"),
    ("models: {m: {sauce: /x}}", "models", "m: unknown key 'sauce'; did you mean 'source'?"),
    ("models: {m: {}}", "models", "m: Object missing required field `source`"),
    ("models: {m: {source: /x, context: long}}", "models", "m.context: a whole number is needed, not text"),
    ("models: {m: {source: /x, dtype: int4}}", "models", "m.dtype: must be one of auto, float32, bfloat16"),
    ("models: {m: {source: /x, keep_alive: soon}}", "models", "m.keep_alive: 'soon' is no duration"),
    ("models: {m: [/x]}", "models", "m: a source, or a mapping with one, is needed"),
    ("models: {m: }", "models", "m: a source, or a mapping with one, is needed"),
    ("models: {'a b': /x}", "models", "'a b' is no name of a model"),
    ("models: 5", "models", "5 is not of the form name=value"),
    ("- 1", "", "a mapping of options is needed"),
    ("port: [", "", "line 1, column 8: while parsing a flow node, expected the node content"),
    ("port: 2021-99-99", "", "month must be in 1..12"),
    ("hosts: &a [*a]", "hosts", "recursion"),
    ("devices: cpu:²", "devices", "'cpu:²' is neither cpu:N nor cuda:N nor auto"),
    ("dram: 99999999999999999999TB", "dram", "is no size"),
    ("dram: 1000", "dram", "1.0 KB is less than 1 MiB"),
    ("{devices: 'cuda:1', device_memory: 1000}", "device_memory", "1.0 KB is less than 1 MiB"),
    ("{port: 1, nodes: 1, port: 2}", "", "line 1, column 21: the key 'port' is there already"),
    (
        "models: {m: &m {source: /x}, n: {<<: *m, source: /y, source: /z}}",
        "",
        "column 54: the key 'source' is there already",
    ),
    ("models: {1: /x, '1': /y}", "", "line 1, column 17: the key '1' is there already"),
    ("models: {~: /x}", "models", "'~' is no name of a model"),
    ("!!python/name:os.system x: 1", "", "could not determine a constructor"),
    ("port: many", "port", "a whole number is needed, not text"),
    ("port: 70000", "port", "70000 is not between 0 and 65535"),
    ("nodes: 0", "nodes", "0 is not between 1 and"),
    ("threads: 0", "threads", "0 is not between 1 and"),
    ("weights: move", "weights", "must be one of view, copy"),
    ("dram: lots", "dram", "'lots' is no size"),
    ("dram: 100TB", "dram", "100.0 TB is more than the 8.6 GB available here"),
    ("devices: 5", "devices", "'5' is neither cpu:N nor cuda:N nor auto"),
    ("drain: soon", "drain", "'soon' is no duration; write seconds, 500ms, 5m, or 1h30m"),
    ("drain: -1", "drain", "-1 is no duration"),
    ("drain: -5m", "drain", "'-5m' is no duration"),
    ("hold: -2", "hold", "-2 is no duration; write seconds, 500ms, 5m, 1h30m, or -1 for ever"),
    ("keep_alive: -7", "keep_alive", "-7 is no duration"),
    ("orphan_grace: '-3'", "orphan_grace", "'-3' is no duration"),
    ("abandon_after: -0.5", "abandon_after", "-0.5 is no duration"),
    ("models: {m: {source: /x, keep_alive: -7}}", "models", "m.keep_alive: -7 is no duration"),
    ("drain: .nan", "drain", "nan is no duration"),
    ("limits: {disk: 5m/s}", "limits", "disk: '5m/s' is no rate; write 500MB/s"),
    ("limits: {disk: 500}", "limits", "disk: 500 bytes a second is less than 100 KB/s; write 500MB/s, or 0 for none"),
    ("models: [demo-count]", "models", "a mapping is needed, a line for each model: `name: source`"),
    ("pinned: true", "", "unknown key 'pinned'"),
    ("limits: 'disk=1GB,disk=2GB'", "limits", "'disk' is given twice"),
    ("limits: disk", "limits", "'disk' is not of the form name=value"),
    ("hosts: ['llm.example.org:443']", "hosts", "'llm.example.org:443' is no host: a name alone is needed"),
    ("hosts: ['*.foo.org']", "hosts", "'*.foo.org' is no host"),
    ("hosts: 'https://foo.org'", "hosts", "'https://foo.org' is no host"),
    ("hosts: a.example, b.example", "hosts", "' b.example' is no host"),
    ("hosts: ['[2001:db8::1]']", "hosts", "'[2001:db8::1]' is no host"),
    ("hosts: 5", "hosts", "a list is needed, not a whole number"),
    ("model_roots: [5]", "model_roots[0]", "5 is no path"),
    ("api_key: ${env.NOWHERE}", "api_key", "the environment variable NOWHERE is not set"),
    ("api_key: ''", "api_key", "it is empty, or the variable that it names is: give a key, or leave it out for none"),
    ("api_key: ${env.EMPTY}", "api_key", "it is empty, or the variable that it names is"),
    ('api_key: "\\t \\n"', "api_key", "it is empty, or the variable that it names is"),
]


@pytest.mark.parametrize(("text", "place", "message"), MISTAKES, ids=[text for text, *_ in MISTAKES])
def test_what_a_mistake_says(file: Path, text: str, place: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigurationError) as raised:
        load({}, {"HOME": "/home/someone", "EMPTY": ""}, file, memory=8 * GIB)
    assert str(raised.value).startswith(f"{file}: {place}")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PORT", "many", "a whole number is needed, not text"),
        ("NODES", "0", "0 is not between 1 and"),
        ("DRAM", "lots", "'lots' is no size"),
        ("DRAM", "100TB", "100.0 TB is more than the 8.6 GB available here"),
        ("DEVICES", "tpu:1", "'tpu:1' is neither cpu:N nor cuda:N nor auto"),
        ("HOLD", "soon", "'soon' is no duration"),
        ("WEIGHTS", "move", "must be one of view, copy"),
        ("LIMITS", "disk=fast", "'fast' is no rate; write 500MB/s"),
        ("API_KEY", "", "it is empty"),
        ("API_KEY", " \n", "it is empty"),
        ("MODELS", "m=/x, m=/y", "'m' is given twice"),
        ("MODELS", "demo-count", "'demo-count' is not of the form name=source,name=source"),
    ],
)
def test_a_mistake_in_a_variable_names_it(name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        load({}, {"HOME": "/home/someone", f"SERVERLESS_LLM_{name}": value}, memory=8 * GIB)
    assert str(raised.value).startswith(f"SERVERLESS_LLM_{name}: ")
    assert message in str(raised.value)


def test_what_this_machine_cannot_do_names_the_flag() -> None:
    with pytest.raises(ConfigurationError, match=r"^--device-memory: 9 B is less than 1 MiB$"):
        loaded({"device_memory": "9"})
    assert [flag(name) for name in ("models", "model_roots", "limits", "threads")] == [
        "--model", "--model-root", "--limit", "--threads",
    ]  # fmt: skip


def test_a_key_without_a_value_is_a_key_that_is_not_there(file: Path) -> None:
    file.write_text("port:\ndram:\nmodels:\n")
    assert loaded(path=file) == loaded()


def test_a_file_that_is_no_text_is_named(file: Path) -> None:
    file.write_text("port: 1", "utf-16")
    with pytest.raises(ConfigurationError) as raised:
        loaded(path=file)
    assert str(raised.value) == f"{file}: no text in UTF-8"


def test_an_options_place_is_where_it_was_given(file: Path) -> None:
    file.write_text("port: 1")
    environ = {"HOME": "/home/someone", "SERVERLESS_LLM_NODES": "2"}
    _, places = config.load_with_places({"hold": "5s"}, environ, file)
    found = [places[name] for name in ("port", "nodes", "hold", "models")]
    assert found == [f"{file}: port", "SERVERLESS_LLM_NODES", "--hold", "models"]


def test_a_file_may_be_a_pipe_which_can_be_read_once() -> None:
    end, other = os.pipe()
    with os.fdopen(end), os.fdopen(other, "w") as writer:
        pipe = Path(f"/dev/fd/{end}")
        writer.write("api_key: secret")
        writer.close()
        read, places = config.load_with_places({}, {"HOME": "/home/someone"}, pipe, memory=8 * GIB)
    assert (read.api_key, places["api_key"]) == ("secret", f"{pipe}: api_key")


@pytest.mark.parametrize(
    "text", ['api_key: "s3cret', "api_key: s3cret: x", "api_key: [s3cret\nport: 1", "api_key: @s3cret"]
)
def test_secrets_are_not_in_messages_about_the_files_form(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=r"line [12], column") as raised:
        loaded(path=file)
    assert "s3cret" not in str(raised.value)


def test_secrets_are_not_in_messages(file: Path) -> None:
    file.write_text("api_key: [s3cret]\n")
    with pytest.raises(ConfigurationError, match=r"api_key: text is needed, not a list$"):
        loaded(path=file)


def test_a_missing_file_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml"):
        loaded(path=tmp_path / "nowhere.yaml")


def test_unknown_variable_names_the_nearest_variable() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'SERVERLESS_LLM_PORT'"):
        loaded(SERVERLESS_LLM_PROT="1")


@pytest.mark.parametrize("text", ["tpu:1", "cpu:x", "cpu:0", "gpu", "cpu:", "cpu:²", "cpu:" + 5000 * "9"])
def test_unknown_devices(text: str) -> None:
    with pytest.raises(ConfigurationError, match="neither cpu:N nor cuda:N nor auto"):
        loaded({"devices": text})


def test_a_share_of_nothing_is_no_size() -> None:
    with pytest.raises(ConfigurationError):
        parse_size("50%")


def test_an_empty_variable_is_none_at_all() -> None:
    assert loaded(SERVERLESS_LLM_PORT="").port == 8000


OPTIONS = """abandon_after api_key body_limit connections device_memory devices drain dram heartbeat hold host hosts
keep_alive keys_file limits model_roots models nodes orphan_grace port state_dir threads tls_cert tls_key weights"""


def test_every_option_was_agreed_on() -> None:
    """A new option needs a user who would set it: add it here, and to the README, once somebody named one."""
    assert sorted(Config.__struct_fields__) == OPTIONS.split()


def test_tls_needs_certificate_and_key() -> None:
    with pytest.raises(ConfigurationError, match=r"^--tls-cert: tls_cert and tls_key belong together"):
        loaded({"tls_cert": Path("/x.pem")})
    with pytest.raises(ConfigurationError, match=r"^SERVERLESS_LLM_TLS_KEY: tls_cert and tls_key belong together"):
        loaded(SERVERLESS_LLM_TLS_KEY="/y.pem")
    both = loaded({"tls_cert": Path("/x.pem")}, SERVERLESS_LLM_TLS_KEY="/y.pem")
    assert (both.tls_cert, both.tls_key) == (Path("/x.pem"), Path("/y.pem"))


@pytest.mark.parametrize("flags", [{"connections": 0}, {"body_limit": "1000"}])
def test_limits_that_serve_nobody_are_refused(flags: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"is not between (1|1024) and"):
        loaded(flags)
