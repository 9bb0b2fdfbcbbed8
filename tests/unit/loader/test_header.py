"""`header.parse` against hand-made faults, and against the reference implementation on mutants of a good file."""

from __future__ import annotations

import io
import json
import re
import struct
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from serverless_llm.errors import CheckpointError
from serverless_llm.loader import header
from tests.headers import disagreement, ours, reference
from tests.unit.loader.checkpoints import raw

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def parse(content: bytes) -> header.Header:
    return header.parse(content, len(content))


def test_a_file_of_the_reference_comes_back() -> None:
    tensors = {"b": torch.zeros(3, 2, dtype=torch.bfloat16), "a": torch.ones(2), "scalar": torch.tensor(1.0)}
    content = save(tensors, metadata={"format": "pt"})
    parsed = parse(content)
    assert parsed.metadata == {"format": "pt"}
    assert {entry.name: (entry.dtype, entry.shape) for entry in parsed.tensors} == {
        "b": ("BF16", (3, 2)),
        "a": ("F32", (2,)),
        "scalar": ("F32", ()),
    }
    for entry in parsed.tensors:
        assert content[entry.start : entry.end] == tensors[entry.name].view(-1).view(torch.uint8).numpy().tobytes()
        assert entry.nbytes == tensors[entry.name].nbytes
    assert parsed.tensors[0].start == parsed.data_offset
    assert parsed.tensors[-1].end == len(content)


def test_a_header_is_written_as_the_reference_reads_it() -> None:
    tensors = [("ä", "F32", (2, 3), 24), ("b", "U8", (), 1), ("none", "F32", (0,), 0), ("c", "U8", (4,), 4)]
    fields = (
        '{"ä":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
        '"b":{"dtype":"U8","shape":[],"data_offsets":[24,25]},'
        '"none":{"dtype":"F32","shape":[0],"data_offsets":[25,25]},'
        '"c":{"dtype":"U8","shape":[4],"data_offsets":[25,29]}}'
    ).encode()
    length = -(-len(fields) // 8) * 8
    assert length > len(fields)
    assert header.encode(tensors, None) == struct.pack("<Q", length) + fields.ljust(length)
    aligned = header.encode(tensors, {"format": "pt"}, 4096)
    assert len(aligned) == 4096
    assert aligned[8:].startswith(b'{"__metadata__":{"format":"pt"},"')
    whole = aligned + bytes(29)
    assert ours(whole) == reference(whole) == {name: (dtype, shape, size) for name, dtype, shape, size in tensors}
    assert header.encode([], {}, 1) == struct.pack("<Q", 19) + b'{"__metadata__":{}}'


def test_empty_and_misaligned_tensors_are_legal() -> None:
    fields = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "none": {"dtype": "F32", "shape": [0, 5], "data_offsets": [1, 1]},
        "odd": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]},
    }
    assert [entry.name for entry in parse(raw(fields, bytes(5))).tensors] == ["byte", "none", "odd"]
    assert parse(raw({})).tensors == ()
    assert parse(raw({"__metadata__": None})).metadata == {}


def test_what_is_just_within_the_limits_is_legal() -> None:
    entry = json.dumps(GOOD).encode()
    padded = entry[:-1] + b" " * (header.MAX_ENTRY - len(entry)) + b"}"
    assert parse(raw(b'{"a":' + padded + b"}", bytes(8))).tensors[0].shape == (2,)
    pairs = {str(number): "" for number in range(header.MAX_METADATA)}
    assert parse(raw({"__metadata__": pairs})).metadata == pairs
    empty = {"dtype": "F32", "shape": [0, header.MAX_DIMENSION], "data_offsets": [0, 0]}
    assert parse(raw({"a": empty})).tensors[0].shape == (0, header.MAX_DIMENSION)


def test_tensors_come_in_the_order_of_their_bytes() -> None:
    fields = {
        "a": GOOD | {"data_offsets": [16, 24]},
        "b": GOOD | {"data_offsets": [8, 16]},
        "c": {"dtype": "U8", "shape": [0], "data_offsets": [8, 8]},
        "d": GOOD,
    }
    assert [entry.name for entry in parse(raw(fields, bytes(24))).tensors] == ["d", "c", "b", "a"]


def test_tensors_share_the_string_of_their_dtype() -> None:
    fields = {"a": GOOD, "b": GOOD | {"data_offsets": [8, 16]}}
    first, second = parse(raw(fields, bytes(16))).tensors
    assert first.dtype is second.dtype


def test_a_process_that_limits_digits_refuses_what_has_more() -> None:
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(640)
    try:
        with pytest.raises(CheckpointError, match="in the entry of tensor 'a': Exceeds the limit"):
            parse(raw(b'{"a": {"dtype": ' + b"9" * 700 + b"}}"))
    finally:
        sys.set_int_max_str_digits(before)


def test_more_bytes_than_the_header_are_ignored_and_fewer_refused() -> None:
    content = raw({"a": GOOD}, bytes(8))
    assert header.parse(content[:-3], len(content)).tensors[0].name == "a"
    with pytest.raises(CheckpointError, match="cut"):
        header.parse(content[:20], len(content))


FAULTS: list[tuple[str, bytes]] = [
    ("too short", b""),
    ("too short", b"1234567"),
    ("beyond", raw(b"{}", length=3)),
    ("over the limit", raw(b"{}", length=2**63)),
    ("over the limit", raw(b"{}", length=header.MAX_HEADER + 1)),
    ("not UTF-8", raw(b'{"\xff": 1}')),
    ("does not begin a JSON object", raw(b"")),
    ("does not begin a JSON object", raw(b"[]")),
    ("does not begin a JSON object", raw(b" {}")),
    ("not JSON: no string", raw(b"{")),
    ("not JSON: no string", raw(b'{"a":' + json.dumps(GOOD).encode() + b",}", bytes(8))),
    ("not JSON: no colon", raw(b'{"a" 1}')),
    ("not JSON: neither a comma", raw(b'{"__metadata__":{"a":"b"')),
    ("not JSON: something follows", raw(b"{}{}")),
    ("not JSON: Unterminated string", raw(b'{"a')),
    ("not JSON: in the entry of tensor 'a'", raw(b'{"a": {"dtype"}}')),
    ("not a list of integers", raw(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}')),
    ("longer than 4096", raw(b'{"a": {"dtype": ' + b"9" * 5000 + b"}")),
    ("nested too deeply", raw(b'{"a":' + b"[" * 1_000_000)),
    ("'a' twice", raw(b'{"a": %s, "a": %s}' % ((json.dumps(GOOD).encode(),) * 2))),
    ("same field twice", raw(b'{"a": {"dtype": "F32", "dtype": "F32"}}')),
    ("no string", raw({"__metadata__": {"a": 1}})),
    ("does not begin a JSON object", raw({"__metadata__": []})),
    ("'__metadata__' twice", raw(b'{"__metadata__": {}, "__metadata__": {}}')),
    ("__metadata__ has the key 'a' twice", raw(b'{"__metadata__": {"a": "b", "a": "b"}}')),
    ("__metadata__ has more than 1024 pairs", raw({"__metadata__": {str(n): "" for n in range(1025)}})),
    ("Unicode", raw(b'{"__metadata__": {"a": "\\ud800"}}')),
    ("Unicode", raw(b'{"\\udfff": {}}')),
    ("'a' is not an object", raw({"a": [1]})),
    ("'a' lacks dtype", raw({"a": {"dtype": "F32", "shape": []}})),
    ("'a' has more than dtype", raw({"a": GOOD | {"strides": [1]}}, bytes(8))),
    ("a negative number", raw(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-0, 8]}}', bytes(8))),
    ("unknown dtype 'F33'", raw({"a": GOOD | {"dtype": "F33"}}, bytes(8))),
    ("unknown dtype", raw({"a": GOOD | {"dtype": ["F32"]}}, bytes(8))),
    ("shape", raw({"a": GOOD | {"shape": 2}}, bytes(8))),
    ("shape", raw({"a": GOOD | {"shape": [2.0]}}, bytes(8))),
    ("shape", raw({"a": GOOD | {"shape": [True, 2]}}, bytes(8))),
    ("a negative number", raw({"a": GOOD | {"shape": [-2]}}, bytes(8))),
    ("shape", raw({"a": GOOD | {"shape": [2**63, 0]}}, bytes(8))),
    ("overflows", raw({"a": GOOD | {"shape": [2**62, 4, 0]}}, bytes(8))),
    ("overflows", raw({"a": GOOD | {"shape": [0, 2**62, 4], "data_offsets": [0, 0]}})),
    ("does not fill", raw({"a": GOOD | {"shape": [3]}}, bytes(8))),
    ("does not fill", raw({"a": GOOD | {"shape": [2**62 + 2]}}, bytes(8))),
    ("does not fill", raw({"a": GOOD | {"dtype": "F4", "shape": [15]}}, bytes(8))),
    ("begin, end", raw({"a": GOOD | {"data_offsets": [0, 4, 8]}}, bytes(8))),
    ("begin, end", raw({"a": GOOD | {"data_offsets": [8, 0]}}, bytes(8))),
    ("begin, end", raw({"a": GOOD | {"data_offsets": []}}, bytes(8))),
    ("data_offsets", raw({"a": GOOD | {"data_offsets": [0, 2**64]}}, bytes(8))),
    ("gap before", raw({"a": GOOD | {"data_offsets": [1, 9]}}, bytes(9))),
    ("gap between", raw({"a": GOOD, "b": GOOD | {"data_offsets": [9, 17]}}, bytes(17))),
    ("overlap", raw({"a": GOOD, "b": GOOD | {"data_offsets": [4, 12]}}, bytes(12))),
    ("overlap", raw({"a": GOOD, "b": GOOD}, bytes(8))),
    ("end at byte", raw({"a": GOOD}, bytes(7))),
    ("end at byte", raw({"a": GOOD}, bytes(9))),
    ("end at byte", raw({}, bytes(1))),
]


@pytest.mark.parametrize(("why", "content"), FAULTS, ids=[f"{n}-{why}" for n, (why, _) in enumerate(FAULTS)])
def test_a_fault_is_named(why: str, content: bytes) -> None:
    with pytest.raises(CheckpointError, match=why):
        parse(content)


PICKLED = (
    "no safetensors file, but a pickle or a zip, as torch.save writes: not opened, since unpickling runs code; "
    "convert it to safetensors"
)


def saved_by_torch(**options: bool) -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.ones(1)}, file, **options)
    return file.getvalue()


SENTENCES: dict[str, tuple[str, bytes]] = {
    "too short": ("file of 7 bytes is too short for a safetensors header", b"1234567"),
    "length beyond the file": ("header of 3 bytes reaches beyond the file's 10 bytes", raw(b"{}", length=3)),
    "length over the limit": (
        "header of 100000001 bytes is over the limit of 100000000: no safetensors file, or a damaged one",
        raw(b"{}", length=100_000_001),
    ),
    "length of 2^63": (
        f"header of {2**63} bytes is over the limit of 100000000: no safetensors file, or a damaged one",
        raw(b"{}", length=2**63),
    ),
    "a pointer of git-lfs": (
        "no safetensors file, but git's pointer to one: git lfs pull brings the file itself",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3\n",
    ),
    "of torch.save, a zip": (PICKLED, saved_by_torch()),
    "of an older torch.save": (PICKLED, saved_by_torch(_use_new_zipfile_serialization=False)),
    "nested a million deep": ("tensor 'a' is nested too deeply", raw(b'{"a":' + b"[" * 1_000_000)),
    "an endless entry": (
        "the entry of tensor 'a' is longer than 4096 characters",
        raw(b'{"a":{"dtype":' + b" " * 4096 + b'"F32"}}'),
    ),
    "not UTF-8": ("header is not UTF-8: invalid start byte at byte 2", raw(b'{"\xff": 1}')),
    "not JSON": ("header is not JSON: no string at character 1", raw(b"{")),
    "no colon": ("header is not JSON: no colon at character 4", raw(b'{"a" 1}')),
    "no comma": (
        "header is not JSON: neither a comma nor the object's end at character 24",
        raw(b'{"__metadata__":{"a":"b" 1}}'),
    ),
    "a second header": ("header is not JSON: something follows at character 3", raw(b"{} {}")),
    "an endless string": ("header is not JSON: Unterminated string starting at at character 1", raw(b'{"a')),
    "no entry": (
        "header is not JSON: in the entry of tensor 'a': Expecting ':' delimiter: line 1 column 9 (char 8)",
        raw(b'{"a": {"dtype"}}'),
    ),
    "NaN": (
        "shape of tensor 'a' is not a list of integers from 0",
        raw(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}'),
    ),
    "no object": ("header does not begin a JSON object", raw(b"[]")),
    "duplicate keys": (
        "header has the key 'b' twice",
        raw(b'{"a":%s,"b":%s,"b":%s}' % ((json.dumps(GOOD).encode(),) * 3)),
    ),
    "duplicate fields": (
        "a tensor's entry has the same field twice",
        raw(b'{"a": {"dtype": "F32", "dtype": "F32"}}'),
    ),
    "duplicate metadata": (
        "header has the key '__metadata__' twice",
        raw(b'{"__metadata__": {}, "__metadata__": {}}'),
    ),
    "duplicate metadata keys": (
        "__metadata__ has the key 'a' twice",
        raw(b'{"__metadata__": {"a": "b", "a": "b"}}'),
    ),
    "endless metadata": (
        "__metadata__ has more than 1024 pairs",
        raw({"__metadata__": {str(n): "" for n in range(1025)}}),
    ),
    "metadata": ("__metadata__ does not begin a JSON object", raw({"__metadata__": []})),
    "half a pair in metadata": (
        "header has the string 'a\\udfff', which is not Unicode text",
        raw(b'{"__metadata__": {"a\\udfff": "b"}}'),
    ),
    "half a pair in a name": ("header has the string '\\ud800', which is not Unicode text", raw(b'{"\\ud800": {}}')),
    "no tensor": ("tensor 'a' is not an object", raw({"a": [1]})),
    "half a tensor": ("tensor 'a' lacks dtype, shape and data_offsets", raw({"a": {"dtype": "F32"}})),
    "more than a tensor": (
        "tensor 'a' has more than dtype, shape and data_offsets",
        raw({"a": GOOD | {"strides": [1]}}, bytes(8)),
    ),
    "minus nothing": (
        "tensor 'a' has a negative number",
        raw(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-0, 8]}}', bytes(8)),
    ),
    "a long name": (
        f"tensor '{'n' * 200}...' is not an object",
        raw({"n" * 201: 1}),
    ),
    "a name just short enough": (f"tensor '{'n' * 200}' is not an object", raw({"n" * 200: 1})),
    "unknown dtype": ("tensor 'a' has the unknown dtype 'F33'", raw({"a": GOOD | {"dtype": "F33"}}, bytes(8))),
    "shape": (
        "shape of tensor 'a' has a number over 2^63 - 1",
        raw({"a": GOOD | {"shape": [2**63]}}),
    ),
    "offsets": (
        "data_offsets of tensor 'a' is not a list of integers from 0",
        raw({"a": GOOD | {"data_offsets": 1}}),
    ),
    "offsets that run back": (
        "data_offsets of tensor 'a' are not [begin, end]",
        raw({"a": GOOD | {"data_offsets": [8, 0]}}, bytes(8)),
    ),
    "overflow": (f"shape [{2**62}, 2] of tensor 'a' overflows", raw({"a": GOOD | {"shape": [2**62, 2]}}, bytes(8))),
    "bytes": (
        f"tensor 'a' of F32 [{2**63 - 1}] does not fill its 8 bytes",
        raw({"a": GOOD | {"shape": [2**63 - 1]}}, bytes(8)),
    ),
    "gap at the beginning": (
        "a gap before the first tensor 'a'",
        raw({"a": GOOD | {"data_offsets": [1, 9]}}, bytes(9)),
    ),
    "gapped offsets": (
        "a gap between the tensors 'a' and 'b'",
        raw({"a": GOOD, "b": GOOD | {"data_offsets": [9, 17]}}, bytes(17)),
    ),
    "overlapping offsets": (
        "an overlap of the tensors 'a' and 'b'",
        raw({"a": GOOD, "b": GOOD | {"data_offsets": [4, 12]}}, bytes(12)),
    ),
    "out-of-range offsets": (
        "truncated: tensors end at byte 77, the file at 76: copy or download it again",
        raw({"a": GOOD}, bytes(7)),
    ),
    "bytes of no tensor": ("tensors end at byte 10, the file at 11", raw({}, bytes(1))),
}


@pytest.mark.parametrize(("sentence", "content"), SENTENCES.values(), ids=SENTENCES)
def test_a_fault_is_told_in_a_whole_sentence(sentence: str, content: bytes) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(content)
    assert str(caught.value) == sentence


def test_a_cut_header_is_told_with_its_lengths() -> None:
    content = raw({"a": GOOD}, bytes(8))
    begin = len(content) - 8
    with pytest.raises(CheckpointError) as caught:
        header.parse(content[:20], len(content))
    assert str(caught.value) == f"header of {begin} bytes is cut to 20"


def test_the_length_of_a_header_is_taken_to_its_limits() -> None:
    length = struct.pack("<Q", header.MAX_HEADER)
    assert header.data_offset(length, header.MAX_HEADER + 8) == header.MAX_HEADER + 8
    for prefix, file_size in ((length[:7], 100), (bytes(8), 7)):
        with pytest.raises(CheckpointError, match="too short"):
            header.data_offset(prefix, file_size)


def test_names_may_be_in_any_script() -> None:
    assert parse(raw({"gewicht\u00e4": GOOD}, bytes(8))).tensors[0].name == "gewicht\u00e4"


def test_each_dtype_has_the_bits_of_its_name() -> None:
    named = {name: int(re.findall(r"\d+", name)[0]) for name in header.DTYPE_BITS if name != "BOOL"}
    assert {**named, "BOOL": 8} == header.DTYPE_BITS


VALUES: list[Any] = [
    0,
    1,
    2,
    4,
    7,
    8,
    12,
    -1,
    2**63,
    2**64 - 1,
    2**64,
    1.0,
    True,
    None,
    "F16",
    "I64",
    "F9",
    [],
    [0],
    {},
]
VALUES += [[2], [4, 2], [0, 8], [8, 24], [8, 16], [16, 24], [1, 2, 2], "a", "F4", "F6_E2M3", "C64", "F8_E8M0", "BOOL"]
PLACES = [("a", key) for key in ("dtype", "shape", "data_offsets", "more")] + [("b", "dtype"), ("b", "data_offsets")]


@given(
    changes=st.lists(st.tuples(st.sampled_from(PLACES), st.sampled_from(VALUES)), max_size=2),
    metadata=st.sampled_from([{}, {"__metadata__": {"a": "b"}}, {"__metadata__": {"a": 1}}, {"c": GOOD}]),
    tail=st.sampled_from([24, 24, 24, 0, 16, 25]),
    length=st.sampled_from([0, 0, 0, 0, 1, -1, 2**62]),
    spaces=st.integers(0, 9),
)
def test_mutants_are_judged_as_the_reference_judges_them(
    changes: list[tuple[tuple[str, str], Any]], metadata: dict[str, Any], tail: int, length: int, spaces: int
) -> None:
    fields: dict[str, Any] = metadata | {
        "a": dict(GOOD),
        "b": {"dtype": "I16", "shape": [4, 2], "data_offsets": [8, 24]},
    }
    for (tensor, key), value in changes:
        fields[tensor][key] = value
    text = json.dumps(fields).encode() + b" " * spaces
    content = struct.pack("<Q", len(text) + length) + text + bytes(tail)
    assert not disagreement(content, ours(content), reference(content))


@given(position=st.integers(0, 200), byte=st.integers(0, 255))
def test_one_wrong_byte_is_judged_as_the_reference_judges_it(position: int, byte: int) -> None:
    content = bytearray(save({"first": torch.zeros(2, 3), "second": torch.ones(4)}, metadata={"format": "pt"}))
    content[position % len(content)] = byte
    damaged = bytes(content)
    assert not disagreement(damaged, ours(damaged), reference(damaged))


def test_a_thousand_tensors_are_quick() -> None:
    fields = {f"t{n}": GOOD | {"data_offsets": [8 * n, 8 * n + 8]} for n in range(1000)}
    assert len(parse(raw(fields, bytes(8000))).tensors) == 1000
