"""Manifests of real directories, good and bad."""

from __future__ import annotations

import json
import os
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from serverless_llm.errors import CheckpointError, TransientError
from serverless_llm.loader import manifest
from tests.unit.loader.checkpoints import raw, write

ONE = {"a": torch.ones(2)}
TWO = {"b": torch.zeros(3, 2)}
TEXTS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip


def index(directory: Path, weight_map: Any) -> Path:
    (directory / manifest.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return directory


def test_a_single_file(tmp_path: Path) -> None:
    (write(tmp_path, ONE | TWO) / "config.json").write_text('{"hidden_size": 2}')
    built = manifest.build(tmp_path)
    assert built.config == {"hidden_size": 2}
    assert built.raw_config == '{"hidden_size": 2}'
    assert [file.name for file in built.files] == ["model.safetensors"]
    assert built.file_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert {name: number for name, (number, _) in built.tensors().items()} == {"a": 0, "b": 0}
    assert built.files[0].data_offset == built.files[0].header.data_offset
    assert (built.directory, built.files[0].path) == (tmp_path, tmp_path / "model.safetensors")


def test_shards_are_in_the_order_of_their_names(tmp_path: Path) -> None:
    built = manifest.build(write(tmp_path, ONE, TWO))
    assert [file.name[:11] for file in built.files] == ["model-00001", "model-00002"]
    assert built.tensors()["b"][0] == 1
    assert built.tensors()["b"][1].shape == (3, 2)


def test_the_identity_follows_directory_time_size_and_header(tmp_path: Path) -> None:
    first, second = write(tmp_path / "first", ONE), write(tmp_path / "second", ONE)
    for directory in (first, second):
        os.utime(directory / manifest.SINGLE, ns=(0, 0))
    base = manifest.build(first).checkpoint
    assert len(base) == 32
    assert manifest.build(Path(f"{first}/../first")).checkpoint == base
    assert manifest.build(second).checkpoint != base
    written = (first / manifest.SINGLE).read_bytes()
    (first / manifest.SINGLE).write_bytes(written[:-8] + bytes(8))  # that is what sizes and times are for
    os.utime(first / manifest.SINGLE, ns=(0, 0))
    assert manifest.build(first).checkpoint == base, "no tensor's byte is read"
    os.utime(first / manifest.SINGLE, ns=(0, 1))
    assert manifest.build(first).checkpoint != base
    write(first, {"c": torch.ones(2)})
    os.utime(first / manifest.SINGLE, ns=(0, 0))
    assert manifest.build(first).checkpoint != base


def test_the_identity_follows_config_tokenizer_and_template(tmp_path: Path) -> None:
    write(tmp_path, ONE)
    known = {manifest.build(tmp_path).checkpoint}
    (tmp_path / "config.json").write_text('{"rope_theta": 5.0}')
    known.add(manifest.build(tmp_path).checkpoint)
    assert manifest.TEXTS == TEXTS
    for name in TEXTS:
        (tmp_path / name).write_text("{}")
        known.add(manifest.build(tmp_path).checkpoint)
        os.utime(tmp_path / name, ns=(0, 0))
        known.add(manifest.build(tmp_path).checkpoint)
    assert len(known) == 2 + 2 * len(TEXTS)
    assert manifest.build(tmp_path).checkpoint in known


def test_pickles_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"only as pytorch_model\.bin.*unpickling runs code"):
        manifest.build(tmp_path)


@pytest.mark.parametrize(
    ("name", "what"), [("model.Q4_K_M.gguf", "GGUF"), ("adapter_model.safetensors", "an adapter (LoRA)")]
)
def test_weights_of_another_kind_are_named(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        manifest.build(tmp_path)
    why = "which is not served: safetensors of a whole model are needed"
    assert str(caught.value) == f"{tmp_path} holds {what}, {why}"


@pytest.mark.parametrize("name", [manifest.SINGLE, manifest.CONFIG])
def test_a_file_is_told_from_its_directory(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"index.json; if it is a file, name its directory: s3://bucket/mine$"):
        manifest.choose([], f"s3://bucket/mine/{name}")


def test_a_directory_without_weights_or_none_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        manifest.build(tmp_path)
    assert str(caught.value) == f"{tmp_path} has neither model.safetensors nor model.safetensors.index.json"
    (tmp_path / "snapshots").mkdir()
    with pytest.raises(
        CheckpointError, match=rf"nor \S+index.json; a hub's cache has them in {tmp_path}/snapshots/COMMIT$"
    ):
        manifest.build(tmp_path)
    with pytest.raises(TransientError) as gone:
        manifest.build(tmp_path / "nowhere")
    assert str(gone.value) == f"{tmp_path}/nowhere: No such file or directory"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (write(tmp_path, ONE) / "tokenizer.json").symlink_to("nowhere")
    with pytest.raises(TransientError) as caught:
        manifest.build(tmp_path)
    assert str(caught.value) == f"{tmp_path}/tokenizer.json: No such file or directory"


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    directory = write(tmp_path, ONE, TWO)
    victim = directory / "model-00002-of-00002.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    size = victim.stat().st_size
    says = rf"^{victim}: truncated: tensors end at byte {size + 1}, the file at {size}: copy or download it again$"
    with pytest.raises(CheckpointError, match=says):
        manifest.build(directory)
    victim.unlink()
    with pytest.raises(TransientError, match=rf"^{victim.name} is missing in {directory}$"):
        manifest.build(directory)
    victim.mkdir()
    with pytest.raises(CheckpointError, match=rf"^{victim} is not a file$"):
        manifest.build(directory)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nope", "x.json is not JSON: Expecting value: line 1 column 1 (char 0)"),
        ("[]", "x.json is not a JSON object"),
        ("[" * 100_000, "x.json is nested too deeply"),
    ],
)
def test_what_is_no_object_is_told_in_a_whole_sentence(text: str, sentence: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        manifest.object_of(text, "x.json")
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("weight_map", "sentence"),
    [
        ("[]", "has no weight_map"),
        ("nope", "has no weight_map"),
        ("{}", "has no weight_map"),
        ('{"a": 5}', "is not JSON: no string at character 21"),
        ('{"a": "/b.safetensors"}', "names '/b.safetensors', which is no safetensors file in the directory"),
        ('{"a": "b.safetensors"}, "weight_map": {}', "has more than one weight_map"),
        ('{}, "weight_map": {"a": "b.safetensors"}', "has more than one weight_map"),
        (
            '{"a": "b.safetensors", "a": "c.safetensors"}',
            "has tensor 'a' twice, in b.safetensors and in c.safetensors",
        ),
        ('{"a": "./b.safetensors"}', "names './b.safetensors': write 'b.safetensors'"),
        ('{"a": "b//c.safetensors"}', "names 'b//c.safetensors': write 'b/c.safetensors'"),
        ('{"a": "b.safetensors/"}', "names 'b.safetensors/': write 'b.safetensors'"),
        ('{"a": "b.safetensors"}, "metadata": nope', "is not JSON: Expecting value: line 1 column 1 (char 0)"),
        ('{"a": "b.safetensors"}, "metadata": ' + "[" * 100_000, "is nested too deeply"),
        ('{"a": "b.safetensors"}, "metadata": NaN', "is not JSON: it has NaN, which is no number of JSON"),
        ('{"a": "b.safetensors"}} {', "is not JSON: something follows at character 39"),
    ],
)
def test_a_bad_index_is_told_in_a_whole_sentence(weight_map: str, sentence: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        manifest.weight_map_of(f'{{"weight_map": {weight_map}}}', "x.json")
    assert str(caught.value) == f"x.json {sentence}"


@pytest.mark.parametrize("space", ["\u00a0", "\x0b", "\x0c", "\u2028"])
def test_what_is_white_space_elsewhere_is_none_of_an_index(space: str) -> None:
    with pytest.raises(CheckpointError, match=r"^x\.json does not begin a JSON object$"):
        manifest.weight_map_of(space + '{"weight_map": {"a": "b.safetensors"}}', "x.json")


def test_a_tensor_may_be_named_twice_with_one_file() -> None:
    text = '{"weight_map": {"a": "b.safetensors", "a": "b.safetensors"}}'
    assert manifest.weight_map_of(text, "x.json") == {"a": "b.safetensors"}


def test_an_index_has_other_members_and_spaces_too() -> None:
    text = ' \n{ "metadata" : {"total_size": 5e9, "x": [1, null]}, "weight_map": {"a":"b.safetensors"}, "y":"" }\n'
    assert manifest.weight_map_of(text, manifest.INDEX) == {"a": "b.safetensors"}


def test_an_index_is_bounded_in_files_and_members(monkeypatch: pytest.MonkeyPatch) -> None:
    def text(files: int, beside: int, value: str = "5") -> str:
        others = "".join(f'"{number}": {value}, ' for number in range(beside))
        names = ", ".join(f'"{number}": "{number // 2}.safetensors"' for number in range(2 * files))
        return f'{{{others}"weight_map": {{{names}}}}}'

    assert (
        len(manifest.weight_map_of(text(manifest.MAX_FILES, manifest.MAX_BESIDE), manifest.INDEX))
        == 2 * manifest.MAX_FILES
    )
    with pytest.raises(CheckpointError) as caught:
        manifest.weight_map_of(text(manifest.MAX_FILES + 1, 0), manifest.INDEX)
    assert str(caught.value) == "model.safetensors.index.json names more than 10000 files"
    with pytest.raises(CheckpointError) as caught:
        manifest.weight_map_of(text(1, manifest.MAX_BESIDE + 1), manifest.INDEX)
    assert str(caught.value) == "model.safetensors.index.json has more than 100 members beside its weight_map"
    monkeypatch.setattr(manifest, "MAX_MEMBER", 6)
    manifest.weight_map_of(text(1, 1, '"abc"'), manifest.INDEX)
    with pytest.raises(CheckpointError) as caught:
        manifest.weight_map_of(text(1, 1, '"abcde"'), manifest.INDEX)
    assert str(caught.value) == "model.safetensors.index.json has a member of more than 6 characters"


@pytest.mark.parametrize(
    ("part", "end"),
    [
        ('"a%x":"b.safetensors",', '"metadata":{}}'),
        ('"\U0001f600%x":"b.safetensors",', '"metadata":{}}'),
        ('"":"%x.safetensors",', '"metadata":{}}'),
        ("", '"metadata":[' + "[]," * 1_000_000),
        ("", '"' * 3_000_000),
    ],
)
def test_an_index_takes_ten_times_its_bytes(part: str, end: str) -> None:
    tensors = "".join(part % number for number in range(100_000)) if part else ""
    text = '{"weight_map":{' + tensors + '"z":"b.safetensors"},' + end
    size = len(text.encode())
    tracemalloc.start()
    try:
        with suppress(CheckpointError):
            manifest.weight_map_of(text, manifest.INDEX)
        assert tracemalloc.get_traced_memory()[1] < 10 * size + (32 << 20)
        assert not tensors or tracemalloc.get_traced_memory()[1] < 10 * size
    finally:
        tracemalloc.stop()


def test_headers_are_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write(tmp_path, ONE, TWO)
    together = sum(file.data_offset for file in manifest.build(directory).files)
    second = directory / "model-00002-of-00002.safetensors"
    monkeypatch.setattr(manifest, "MAX_HEADERS", together)
    manifest.build(directory)
    monkeypatch.setattr(manifest, "MAX_HEADERS", together - 1)
    with pytest.raises(CheckpointError) as caught:
        manifest.build(directory)
    assert str(caught.value) == f"{second}: the headers of a checkpoint's files have more than 128000000 bytes together"


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt", "pkl", "msgpack", "h5"])
def test_every_kind_of_pickle_is_known(suffix: str) -> None:
    with pytest.raises(CheckpointError, match=rf"weights only as model\.{suffix}: not opened"):
        manifest.choose([f"model.{suffix}"], "/m")


def test_files_have_the_names_that_transformers_gives_them() -> None:
    assert manifest.choose(["model.safetensors.index.json"], "/m") == "model.safetensors.index.json"
    assert manifest.choose(["model.safetensors", "model.safetensors.index.json"], "/m") == "model.safetensors"


def test_pickles_are_named_up_to_three() -> None:
    names = [f"{number}.bin" for number in range(4)]
    with pytest.raises(CheckpointError) as caught:
        manifest.choose(names, "/m")
    why = "not opened, since unpickling runs code; convert them to safetensors"
    assert str(caught.value) == f"/m has weights only as 0.bin, 1.bin, 2.bin: {why}"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xff", "not UTF-8"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "not a JSON object"),
    ],
)
def test_a_bad_config(tmp_path: Path, content: bytes, why: str) -> None:
    (write(tmp_path, ONE) / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/config\.json is {why}"):
        manifest.build(tmp_path)


def test_an_index_may_be_large(tmp_path: Path) -> None:
    text = write(tmp_path, ONE, TWO) / manifest.INDEX
    text.write_text(text.read_text() + " " * manifest.MAX_CONFIG)
    assert len(manifest.build(tmp_path).files) == 2
    os.truncate(text, manifest.MAX_INDEX + 1)
    with pytest.raises(CheckpointError, match="larger than"):
        manifest.build(tmp_path)


def test_a_missing_or_huge_config(tmp_path: Path) -> None:
    config = write(tmp_path, ONE) / "config.json"
    config.write_text("{}" + " " * (manifest.MAX_CONFIG - 2))
    manifest.build(tmp_path)
    os.truncate(config, manifest.MAX_CONFIG + 1)
    with pytest.raises(CheckpointError, match=r"config\.json is larger than 1048576 bytes"):
        manifest.build(tmp_path)
    config.unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        manifest.build(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {}, ["a"]])
def test_an_index_without_a_map(tmp_path: Path, weight_map: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/{manifest.INDEX} has no weight_map$"):
        manifest.build(index(tmp_path, weight_map))


@pytest.mark.parametrize(
    "name", ["/etc/a.safetensors", "../a.safetensors", "b/../../a.safetensors", "a.bin", "a\0.safetensors"]
)
def test_an_index_cannot_lead_out(tmp_path: Path, name: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no safetensors file in the directory"):
        manifest.build(index(tmp_path, {"a": name}))


@pytest.mark.parametrize("name", ["x" * 300 + ".safetensors", "d/" * 3000 + "x.safetensors"])
def test_an_index_that_names_what_no_file_can_be_called(tmp_path: Path, name: str) -> None:
    """It does not pass with time."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        manifest.build(index(tmp_path, {"a": name}))
    assert type(caught.value) is CheckpointError
    assert str(caught.value).endswith(f"names {name[:200]!r:.201}...', which is no safetensors file in the directory")


def test_links_stay_inside_or_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    elsewhere = write(tmp_path / "elsewhere", ONE)
    thief = tmp_path / "thief"
    thief.mkdir()
    (thief / "config.json").write_text("{}")
    (thief / manifest.SINGLE).symlink_to(elsewhere / manifest.SINGLE)
    with pytest.raises(CheckpointError, match="link out of"):
        manifest.build(thief)
    (thief / manifest.SINGLE).unlink()
    (thief / manifest.SINGLE).symlink_to(manifest.SINGLE)
    with pytest.raises(CheckpointError, match="missing"):
        manifest.build(thief)

    (thief / manifest.SINGLE).unlink()
    (thief / "a.safetensors").symlink_to(elsewhere / manifest.SINGLE)
    with pytest.raises(CheckpointError, match=r"a\.safetensors is a link out of"):
        manifest.build(index(thief, {"a": "a.safetensors"}))

    hub = tmp_path / "models--some--model"
    snapshot = hub / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    write(hub / "blobs", ONE)
    for name in ("config.json", manifest.SINGLE):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert manifest.build(snapshot).tensors().keys() == {"a"}
    (snapshot / manifest.SINGLE).unlink()
    (snapshot / manifest.SINGLE).symlink_to(elsewhere / manifest.SINGLE)
    with pytest.raises(CheckpointError, match="link out of"):
        manifest.build(snapshot)
    other = hub / "elsewhere" / "0123"
    other.mkdir(parents=True)
    (other / "config.json").write_text("{}")
    (other / manifest.SINGLE).symlink_to(f"../../blobs/{manifest.SINGLE}")
    with pytest.raises(CheckpointError, match="link out of"):
        manifest.build(other)


def test_a_header_of_2_to_the_63_bytes_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / manifest.SINGLE).write_bytes(raw(b"{}", length=2**63))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: header of {2**63} bytes is over the limit"):
            manifest.build(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_index_and_files_must_agree(tmp_path: Path) -> None:
    directory = write(tmp_path, ONE, TWO)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    with pytest.raises(CheckpointError) as caught:
        manifest.build(index(directory, {"a": first, "b": first, "z": second}))
    path = directory / manifest.INDEX
    assert str(caught.value) == f"{path} says that tensor 'b' is in {first}, but it is in {second}"
    with pytest.raises(CheckpointError, match=rf"^{path} says that tensor 'z' is in {second}, but it is in no file$"):
        manifest.build(index(directory, {"a": first, "b": second, "z": second}))
    with pytest.raises(CheckpointError, match=rf"^{path} lacks tensor 'b', which is in {second}$"):
        manifest.build(index(directory, {"a": first, "c": second}))
    (directory / second).write_bytes((directory / first).read_bytes())
    with pytest.raises(CheckpointError, match=rf"^{path}: tensor 'a' is in {first} and in {second}$"):
        manifest.build(index(directory, {"a": first, "b": second}))


def test_a_long_name_of_a_tensor_is_cut_in_errors(tmp_path: Path) -> None:
    name = "x" * 10_000
    directory = write(tmp_path, ONE, {name: torch.ones(2)})
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    for weight_map in ({"a": first, name: first, "z": second}, {"a": first, "z": second}):
        with pytest.raises(CheckpointError, match=rf"tensor 'x{{200}}\.\.\.'.* is in {second}$"):
            manifest.build(index(directory, weight_map))
    (directory / first).write_bytes((directory / second).read_bytes())
    with pytest.raises(CheckpointError, match=rf"tensor 'x{{200}}\.\.\.' is in {first} and in {second}$"):
        manifest.build(index(directory, {"a": first, name: second}))


def test_no_tensor_is_read(tmp_path: Path) -> None:
    """A sparse file of a terabyte would take minutes."""
    size = 1 << 40
    head = raw({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / manifest.SINGLE).write_bytes(head)
    os.truncate(tmp_path / manifest.SINGLE, len(head) + size)
    assert manifest.build(tmp_path).file_bytes == len(head) + size


def test_weights_need_no_config(tmp_path: Path) -> None:
    directory = write(tmp_path / "a", {"a": torch.zeros(2)}, {"b": torch.ones(3)})
    files = manifest.build(directory).files
    (directory / "config.json").unlink()
    assert tuple(manifest.weights(directory)) == files


def test_headers_alone_are_a_manifest_and_no_weights(tmp_path: Path) -> None:
    directory = write(tmp_path / manifest.CHECKPOINT, {"a": torch.zeros(2)})
    (tmp_path / manifest.REMOTE).touch()
    assert manifest.build(directory).tensors().keys() == {"a"}
    with pytest.raises(CheckpointError) as raised:
        manifest.weights(directory)
    why = f"{directory} holds headers alone until its model is loaded: serverless-llm pull its URL"
    assert str(raised.value) == why
    assert manifest.weights(write(tmp_path / "neighbour", ONE))


PARTS = ["a" * 255] * 3 + ["a" * 200]  # with what follows, 1,024 bytes and the slashes between


@pytest.mark.parametrize(
    ("name", "can"),
    [
        ("a" * 255, True),
        ("a" * 256, False),
        ("\u00e9" * 127 + "a", True),
        ("\u00e9" * 128, False),
        ("/".join([*PARTS, "b" * 55]), True),
        ("/".join([*PARTS, "b" * 56]), False),
        ("a\n", False),
    ],
)
def test_names_that_files_can_have(name: str, can: bool) -> None:
    assert manifest.can_be_named(name) is can
