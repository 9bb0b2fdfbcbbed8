"""Headers to judge: a generator of good and bad ones, the reference's verdict, and where ours may differ from it."""

from __future__ import annotations

import json
import random
import re
import struct
from typing import Any, NamedTuple

from safetensors import SafetensorError, deserialize

from serverless_llm.errors import CheckpointError
from serverless_llm.loader import header


def file(text: bytes, data: int = 0, length: int | None = None) -> bytes:
    """A file of a header's JSON and `data` zeros; `length` lies about the header's."""
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def _tensor(entry: bytes, data: int = 8) -> bytes:
    return file(b'{"a":' + entry + b"}", data)


class Difference(NamedTuple):
    """What the reference accepts and ours refuses, told by `fault`, words of our error; docs/header.md has the row."""

    what: str
    fault: str
    reason: str
    example: bytes


GOOD = b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
DIFFERENCES = (
    Difference(
        "a tensor's name, or a key of `__metadata__`, twice",
        "twice",
        'the format: "Duplicate keys are disallowed"; readers would disagree about which one counts',
        file(b'{"a":' + GOOD + b',"\\u0061":' + GOOD + b"}", 8),
    ),
    Difference(
        "white space before the header's `{`",
        "header does not begin a JSON object",
        'the format: "The header data MUST begin with a `{` character"',
        file(b" {}"),
    ),
    Difference(
        "a field beside `dtype`, `shape` and `data_offsets`",
        "has more than dtype, shape and data_offsets",
        "not in the format; a field that changes what the bytes mean must not be passed over",
        _tensor(GOOD[:-1] + b',"strides":[1]}'),
    ),
    Difference(
        "an entry that is a list, `[dtype, shape, data_offsets]`",
        "is not an object",
        "not in the format; the reference's JSON library allows it",
        _tensor(b'["F32",[2],[0,8]]'),
    ),
    Difference(
        'a dtype that is an object, `{"F32": null}`',
        'has the unknown dtype "{',
        "not in the format; the reference's JSON library allows it",
        _tensor(b'{"dtype":{"F32":null},"shape":[2],"data_offsets":[0,8]}'),
    ),
    Difference(
        "a size over 2^63 - 1, in a tensor that another size makes empty",
        "has a number over 2^63 - 1",
        "no tensor library holds it",
        _tensor(b'{"dtype":"F32","shape":[0,9223372036854775808],"data_offsets":[0,0]}', 0),
    ),
    Difference(
        "sizes whose product, zeros left out, is over 2^63 - 1, in a tensor that a zero makes empty",
        "overflows",
        "no tensor library holds its strides",
        _tensor(b'{"dtype":"F32","shape":[0,4611686018427387904,2],"data_offsets":[0,0]}', 0),
    ),
    Difference(
        f"an entry of more than {header.MAX_ENTRY} characters",
        f"is longer than {header.MAX_ENTRY} characters",
        "bounds the memory of a hostile header; real entries have about a hundred",
        _tensor(GOOD[:-1] + b" " * header.MAX_ENTRY + b"}"),
    ),
    Difference(
        f"more than {header.MAX_METADATA} pairs in `__metadata__`",
        f"__metadata__ has more than {header.MAX_METADATA} pairs",
        "bounds the memory of a hostile header; real files have at most about a hundred",
        file(json.dumps({"__metadata__": {str(n): "" for n in range(header.MAX_METADATA + 1)}}).encode()),
    ),
)

ALLOWANCE = 1 << 18  # bytes that a header may take beyond ten times its own: one entry, and __metadata__

# --- verdicts ---

Tensors = dict[str, tuple[str, tuple[int, ...], int]]  # by name: dtype, shape, bytes


def ours(content: bytes) -> Tensors | CheckpointError:
    try:
        parsed = header.parse(content, len(content))
    except CheckpointError as error:
        return error
    return {entry.name: (entry.dtype, entry.shape, entry.nbytes) for entry in parsed.tensors}


def reference(content: bytes) -> Tensors | SafetensorError:
    try:
        entries = deserialize(content)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        return error
    return {name: (entry["dtype"], tuple(entry["shape"]), len(entry["data"])) for name, entry in entries}


def listed(error: CheckpointError) -> Difference | None:
    return next((one for one in DIFFERENCES if one.fault in str(error)), None)


def _doubled(content: bytes) -> bool:
    """Whether a key comes twice: the reference drops the first one's value unseen, ours may name a fault of that."""
    doubled = []

    def pairs(members: list[tuple[str, Any]]) -> None:
        doubled.append(len({key for key, _ in members}) < len(members))

    json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")], object_pairs_hook=pairs)
    return any(doubled)


def disagreement(content: bytes, mine: Tensors | CheckpointError, theirs: Tensors | SafetensorError) -> str:
    """Empty where both say the same, or where the difference is a listed one."""
    if isinstance(mine, CheckpointError):
        explained = isinstance(theirs, SafetensorError) or listed(mine) or _doubled(content)
        return "" if explained else f"only ours refuses {content!r}: {mine}"
    if isinstance(theirs, SafetensorError):
        return f"only the reference refuses {content!r}: {theirs}"
    return "" if mine == theirs else f"{content!r} is {mine} here and {theirs} there"


def signature(mine: Tensors | CheckpointError, theirs: Tensors | SafetensorError) -> str:
    """What makes a header interesting: the way through ours (lines, for a fault) and the reference's sentence."""
    if isinstance(mine, CheckpointError):
        lines = []
        trace = mine.__traceback__
        while trace is not None:
            lines.append(str(trace.tb_lineno))
            trace = trace.tb_next
        way = " ".join(lines[1:])
    else:
        way = f"{min(len(mine), 3)} tensors"
    if not isinstance(theirs, SafetensorError):
        return f"{way} | accepted"
    return f"{way} | {DETAIL.sub('', str(theirs))}"


DETAIL = re.compile(r"(?s)`.*| string \".*\"| at line.*| from index.*|[0-9]+")

# --- the generator ---

DTYPES = [*header.DTYPE_BITS, "C128", "F128", "U4", "I4", "F8_E4M3FN", "f32", "", "F33", "F32\\u0000"]
LIMITS = ["0", "-0", "-1", "1", "2", "3", "7", "8", "255", "257", "2147483648", "4294967295", "4294967296"]
LIMITS += [str(2**power + more) for power in (53, 60, 61, 62, 63, 64) for more in (-1, 0, 1)]
LIMITS += ["1.0", "1e0", "1e400", "01", "+1", "1_0", "true", "null", '"1"', "[1]", "{}", "9" * 700, "NaN", "0x1"]
STRINGS = [
    "",
    "a",
    "b",
    "weight",
    "__metadata__",
    "dtype",
    "\\u0061",
    "\\ud83d\\ude00",
    "\\ud800",
    "\\udc00x",
    "\\u00e4",
]
STRINGS += [
    "\u00e4",
    "\U0001f600",
    "\\n",
    "\\/",
    "\\x",
    "\\u12",
    "\n",
    "\x7f",
    "\\u0000",
    "\ufeff",
    "\u2028",
    "a" * 300,
]
SPACES = ["", "", "", " ", "\n", "\t\r", "\x0c", "\u00a0", "  " * 8]
VALUES = ["null", "1", "[]", "{}", '""', "[" * 40 + "]" * 40, "[" * 130 + "]" * 130, '{"a":{"a":1,"a":2}}', "-1.5e-9"]
VALUES += ["1e999", "Infinity", "true", '["F32",[2],[0,8]]', "[" * 3000, '{"F32":null}']
PIECES = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"\\",
    b"\\u",
    b"-",
    b"e9",
    b"\x00",
    b"\xff",
    b"\xc0\x80",
    b"\xed\xa0\x80",
]
PIECES += [text.encode() for text in [*STRINGS, *LIMITS, *SPACES, *VALUES, *DTYPES] if text and len(text) < 200]
PIECES += [b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"', b'{"format":"pt"}', b"[0,0]", b"[0,8]", GOOD]


def good(rng: random.Random, most: int = 4) -> tuple[list[dict[str, Any]], int]:
    """Up to `most` tensors that fill their file, and its bytes of data."""
    tensors: list[dict[str, Any]] = []
    at = 0
    for number in range(rng.randint(0, most)):
        dtype = rng.choice(list(header.DTYPE_BITS))
        shape = [rng.choice((0, 1, 1, 2, 2, 3, 4, 8)) for _ in range(rng.randint(0, 3))]
        if header.DTYPE_BITS[dtype] < 8:
            shape = [*shape, 4]
        items = 1
        for size in shape:
            items *= size
        end = at + items * header.DTYPE_BITS[dtype] // 8
        tensors.append({"name": f"t{number}", "dtype": dtype, "shape": shape, "data_offsets": [at, end]})
        at = end
    return tensors, at


def generated(rng: random.Random) -> bytes:
    """A file written piece by piece, with up to two faults or oddities."""
    tensors, data = good(rng)
    rng.shuffle(tensors)
    odd = rng.choice((0, 0, 0, 1, 1, 2))
    members = [f'"{one["name"]}":{_entry(rng, one)}' for one in tensors]
    if rng.random() < 0.4:
        members.append('"__metadata__":{"format":"pt"}')
    ends = ["{", "}"]
    for _ in range(odd):
        _spoil(rng, members, ends)
    text = (ends[0] + ",".join(members) + ends[1]).encode()
    data += rng.choice((0,) * 12 + (1, -1, 8))
    length = len(text) + rng.choice((0,) * 24 + (1, -1, 2**62))
    return file(text, max(data, 0), max(length, 0))


def _entry(rng: random.Random, one: dict[str, Any]) -> str:
    fields = [(key, json.dumps(one[key], separators=(",", ":"))) for key in ("dtype", "shape", "data_offsets")]
    fault = 3 * rng.random()
    place = rng.randrange(3)
    if fault < 0.05:
        fields[0] = ("dtype", f'"{rng.choice(DTYPES)}"')
    elif fault < 0.15:
        numbers = [str(number) for number in one["shape" if place else "data_offsets"]]
        numbers.insert(rng.randint(0, len(numbers)), rng.choice(LIMITS))
        fields[1 if place else 2] = ("shape" if place else "data_offsets", "[" + ",".join(numbers[-2:]) + "]")
    elif fault < 0.20:
        fields.insert(place, (rng.choice(STRINGS), rng.choice(VALUES)))
    elif fault < 0.23:
        fields[place] = (fields[place][0], rng.choice(VALUES))
    elif fault < 0.25:
        fields.append(fields[place])
    elif fault < 0.27:
        del fields[place]
    elif fault < 0.28:
        return "[" + ",".join(value for _, value in fields) + "]"
    elif fault < 0.8:
        rng.shuffle(fields)
    space = rng.choice(SPACES) if fault > 2.8 else ""
    return "{" + f",{space}".join(f'"{key}"{space}:{value}' for key, value in fields) + space + "}"


def _spoil(rng: random.Random, members: list[str], ends: list[str]) -> None:
    kind = rng.randrange(6)
    if kind == 0:
        ends[rng.randrange(2)] += rng.choice(SPACES)
    elif kind == 1:
        ends[0] = rng.choice(SPACES) + ends[0]
    elif kind == 2 and members:
        members.append(rng.choice(members))
    elif kind == 3:
        members.append(f'"__metadata__":{{"{rng.choice(STRINGS)}":"{rng.choice(STRINGS)}","a":"b"}}')
    elif kind == 4:
        members.append(f'"{rng.choice(STRINGS)}":{rng.choice((*VALUES, GOOD.decode()))}')
    else:
        members.append(f'"__metadata__":{rng.choice(VALUES)}')


def mutant(rng: random.Random, content: bytes) -> bytes:
    """One to three small wounds; mostly the length is mended, so that more than the length is tried."""
    size = int.from_bytes(content[:8], "little")
    text, data = bytearray(content[8 : 8 + size]), content[8 + size :]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randint(0, len(text))
        kind = rng.randrange(6)
        if kind == 0 and at < len(text):
            text[at] = rng.randrange(256)
        elif kind == 1 and at < len(text):
            text[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del text[at : at + rng.choice((1, 1, 2, 8, 40))]
        elif kind == 3:
            text[at:at] = rng.choice(PIECES)
        elif kind == 4:
            piece = rng.choice(PIECES)
            text[at : at + len(piece)] = piece
        else:
            other = rng.randint(0, len(text))
            text[at:at] = text[other : other + rng.randint(1, 60)]
    whole = file(bytes(text), 0, None if rng.random() < 0.95 else size) + data
    return whole if rng.random() < 0.97 else whole[: rng.randint(0, len(whole))]


def big(rng: random.Random, size: int) -> bytes:
    """A header of about `size` bytes that asks for much: memory, nesting, time."""
    opening, unit, tail = rng.choice(BOMBS)
    if "#" not in unit:
        return file((opening + unit * (size // len(unit.encode())) + tail).encode())
    count = size // len(unit.replace("#", "00000").encode())
    return file((opening + ",".join(unit.replace("#", str(number)) for number in range(count)) + tail).encode())


EMPTY = '"dtype":"U8","data_offsets":[0,0]'
TEXT = '{"__metadata__":{"a":"'
BOMBS = [
    ("", "[", ""),
    ("", '{"a":', ""),
    ('{"a":', "[", ""),
    ('{"a":', '{"a":', ""),
    ('{"a":', "[[],", ""),
    ('{"a":', "1,", "]}"),
    ('{"a":', "9", "}"),
    ('{"a":', " ", "}"),
    ("{", " ", "}"),
    ('{"', "a", '":1}'),
    ('{"', "\U0001f600", '":1}'),
    ('{"', "\\u0000", '":1}'),
    (TEXT, "a", '"}}'),
    (TEXT, "\\n", '"}}'),
    (TEXT, "\u00e4", '"}}'),
    (TEXT, "\U0001f600", '"}}'),
    (TEXT + "\U0001f600", "a", '"}}'),
    (TEXT, "\\ud83d\\ude00", '"}}'),
    (TEXT, "\\ud800", '"}}'),
    (TEXT, '"', '"}}'),
    ('{"__metadata__":{', '"#":"#"', "}}"),
    ('{"__metadata__":{', '"#\U0001f600":""', "}}"),
    ("{", '"#":{' + EMPTY + ',"shape":[0]}', "}"),
    ("{", '"#":{' + EMPTY + ',"shape":[0,257,258,259,260,261,262,263]}', "}"),
    ("{", '"#":{' + EMPTY + ',"shape":[0' + ",1" * 900 + "]}", "}"),
    ("{", '"#":{' + EMPTY + ',"shape":[0' + ",257" * 900 + "]}", "}"),
    ("{", '"\U0001f600#":{' + EMPTY + ',"shape":[0]}', "}"),
    ("{", '"#":{"a":' + "[" * 900 + "]" * 900 + "}", "}"),
    ("{", '"#":{"a":' + "[[]" + ",[]" * 900 + "]}", "}"),
    ("{", '"#":[]', "}"),
]
