"""Frames survive any cutting of the stream, and anything else is refused by name."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverless_llm import framing, wire
from serverless_llm.errors import ProtocolError
from serverless_llm.loader import manifest

RUN = wire.Run(7, 2, 3, b"\1\0\0\0", b"", 0.5, 40, 0.9, 11, 16, [2])


def messages() -> st.SearchStrategy[wire.Message]:
    number = st.integers(0, 2**62)
    tokens = st.lists(st.integers(0, 2**31 - 1), max_size=4)
    return st.one_of(
        st.just(RUN),
        st.builds(wire.Unload, number),
        st.builds(wire.Cancel, st.lists(st.tuples(number, number), max_size=5)),
        st.builds(wire.Tokens, st.lists(st.tuples(number, number, tokens, st.sampled_from(["", "stop"])), max_size=5)),
        st.integers(0, 3).map(lambda frames: wire.Answer(1, 200, b"x" * (frames * framing.MAX_FRAME))),
    )


def decoded(frame: framing.Frame) -> wire.Message:
    return wire.decode(frame.header.kind, frame.body)


def test_of_the_most_files_a_worker_can_be_told() -> None:
    files = [2**62] * manifest.MAX_FILES
    order = wire.Place(1, "m", "c", " " * manifest.MAX_CONFIG, "auto", 0, files)
    (frame,) = framing.Splitter().feed(wire.encode(order))
    assert decoded(frame) == order


@given(st.lists(messages(), max_size=6), st.lists(st.floats(0, 1), max_size=12))
def test_any_cutting_of_the_stream_gives_the_same_messages(sent: list[wire.Message], cuts: list[float]) -> None:
    stream = b"".join(wire.encode(message, source=1, destination=9, epoch=5) for message in sent)
    places = [0, *sorted(int(cut * len(stream)) for cut in cuts), len(stream)]
    splitter = framing.Splitter()
    frames = [frame for a, b in pairwise(places) for frame in splitter.feed(stream[a:b])]
    same = [decoded(frame) for frame in frames] == sent  # a plain bool: its report would be megabytes
    assert same
    assert all(frame.header[2:5] == (1, 9, 5) for frame in frames)


def test_what_a_relay_passes_on_is_the_message() -> None:
    long = wire.Answer(1, 200, b"y" * (framing.MAX_FRAME + 1))
    (frame,) = framing.Splitter().feed(wire.encode(long, source=3))
    (again,) = framing.Splitter().feed(frame.raw)
    assert decoded(again) == long


def test_split_messages_of_two_sources_do_not_mix() -> None:
    one, two = (wire.encode(wire.Answer(n, 200, bytes([n]) * (framing.MAX_FRAME + 9)), source=n) for n in (1, 2))
    first = framing.HEADER.size + framing.MAX_FRAME
    frames = list(framing.Splitter().feed(one[:first] + two[:first] + one[first:] + two[first:]))
    assert [decoded(frame).body[:1] for frame in frames] == [b"\1", b"\2"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"GET / HTTP/1.1\r\nHost: example.com\r\n\r\n", "not a serverless-llm frame"),
        (framing.HEADER.pack(b"SLM\xff", 1, 0, 0, 0, 0, 0), "protocol version 255"),
        (framing.HEADER.pack(framing.MAGIC, 1, 0, 0, 0, 0, framing.MAX_FRAME + 1), "over the limit"),
    ],
)
def test_foreign_bytes_are_refused(raw: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        list(framing.Splitter().feed(raw))


def test_an_endless_split_message_is_refused() -> None:
    part = framing.HEADER.pack(framing.MAGIC, 1, framing.MORE, 0, 0, 0, 1000) + b"z" * 1000
    splitter = framing.Splitter(limit=2500)
    assert list(splitter.feed(part * 2)) == []
    with pytest.raises(ProtocolError, match="over the limit of 2500"):
        list(splitter.feed(part))


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [(999, b"", "unknown kind"), (wire.KIND[wire.Run], b"\x90", "bad Run frame"), (1, b"\xc1", "bad Hello frame")],
)
def test_bodies_that_are_not_their_kind_are_refused(kind: int, body: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        wire.decode(kind, body)


def test_header_is_32_bytes_and_kinds_are_stable() -> None:
    assert framing.HEADER.size == 32
    assert struct.calcsize(framing.HEADER.format) == 32
    assert wire.KIND[wire.Hello] == 1
    assert len(set(wire.KINDS)) == len(wire.KINDS)


def test_addresses_do_not_collide() -> None:
    addresses = [framing.CONTROLLER, framing.GATEWAY]
    addresses += [framing.agent_address(n) for n in range(3)]
    addresses += [framing.worker_address(n, d) for n in range(3) for d in range(3)]
    assert len(set(addresses)) == len(addresses)
