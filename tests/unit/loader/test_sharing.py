"""What a checkpoint borrows: whatever is equal, each tensor is where it is said to be, and nothing is there twice."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverless_llm.loader import plan, sharing
from serverless_llm.loader.header import Header, TensorEntry
from serverless_llm.loader.lending import Lending
from serverless_llm.loader.manifest import FileEntry
from serverless_llm.loader.plan import Landed, Piece
from serverless_llm.loader.residency import Tier
from serverless_llm.loader.sharing import NOTHING, Known, Lent, Loan, Run

SLOT = 10
MB = 1 << 20
DEAR = sharing.DEAR


@pytest.fixture(autouse=True)
def _whatever_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors here are hardly larger than slots."""
    monkeypatch.setattr(sharing, "DEAR", 1 << 20)


def known(name: str, *files: list[tuple[str, int]], head: int = 3) -> Known:
    """Files of (digest, bytes), which also name the tensors; `head`: bytes before the first one."""
    entries, digests = [], []
    for number, tensors in enumerate(files):
        at, found = head, []
        for place, (digest, nbytes) in enumerate(tensors):
            found.append(TensorEntry(f"{number}.{place}.{digest}", "U8", (nbytes,), at, at + nbytes))
            digests.append(digest.encode())
            at += nbytes
        entries.append(FileEntry(f"{number}", Path("/"), at, 0, Header(tuple(found), {}, head)))
    return Known(name, entries, digests)


def pieces(one: Known) -> list[Piece]:
    return plan.pieces(one.files, (), SLOT)


def lend(borrower: Known, *lenders: Known, homeless: list[Piece] | None = None) -> Loan | None:
    landed = {one.checkpoint: pieces(one) for one in lenders}
    return sharing.loan(borrower, lenders, landed, pieces(borrower) if homeless is None else homeless, SLOT)


def test_a_piece_of_equal_tensors_is_spared_and_one_that_is_partly_own_is_read() -> None:
    lender = known("a", [("big", 25), ("other", 5)], head=4)
    borrower = known("b", [("big", 25), ("own", 6)])  # its tensor ends in the piece from 20 on
    loan = lend(borrower, lender)
    assert loan is not None
    assert loan.spared == {Piece(0, 10, 10)}
    assert loan.sizes == [34]
    assert loan.runs == [Run(0, 3, 28, 1, 4)]
    assert [span[:3] for span in loan.spans] == [(1, 4, 6), (1, 10, 10), (1, 20, 9)]
    assert loan.held() == {"a": {Piece(0, 0, 10), Piece(0, 10, 10), Piece(0, 20, 10)}}


def test_what_spares_no_piece_is_not_borrowed() -> None:
    lender = known("a", [("x", 10), ("y", 30)])
    borrower = known("b", [("x", 10), ("own", 5)], [("y", 30)])
    loan = lend(borrower, lender)
    assert loan is not None
    assert loan.runs == [Run(1, 3, 33, 2, 13)]
    assert lend(known("b", [("x", 10), ("own", 5)]), lender) is None
    assert lend(known("b", [("z", 40)]), lender) is None
    assert lend(borrower, lender, homeless=[Piece(0, 0, 10)]) is None


def test_only_what_has_landed_is_lent() -> None:
    lender, borrower = known("a", [("x", 20), ("y", 20)]), known("b", [("x", 20), ("y", 20)])
    there = pieces(lender)
    loan = sharing.loan(borrower, [lender], {"a": there[2:]}, pieces(borrower), SLOT)
    assert loan is not None
    assert loan.runs == [Run(0, 23, 43, 1, 23)]
    assert loan.spared == {*pieces(borrower)[3:]}
    assert sharing.loan(borrower, [lender], {"a": ()}, pieces(borrower), SLOT) is None


def test_who_has_most_lends_so_that_runs_are_long() -> None:
    tensors = [("x", 20), ("y", 20), ("", 0), ("z", 20)]
    some, most, more = known("a", tensors[:2]), known("m", [("q", 7), *tensors]), known("z", tensors[1:2])
    loan = lend(known("b", tensors), some, most, more)
    assert loan is not None
    assert loan.held().keys() == {"m"}
    assert loan.runs == [Run(0, 3, 63, 1, 10)]
    assert loan.sizes == [70]


def test_what_the_borrower_has_not_gives_no_lender_a_lead() -> None:
    tensors = [("x", 20), ("y", 20)]
    loan = lend(known("b", tensors), known("some", [*tensors[1:], ("more", 90)]), known("all", tensors))
    assert loan is not None
    assert loan.held().keys() == {"all"}


def test_equal_tensors_of_the_borrower_come_from_one_place() -> None:
    loan = lend(known("b", [("x", 20), ("own", 1), ("x", 20)]), known("a", [("x", 20)]))
    assert loan is not None
    assert loan.runs == [Run(0, 3, 23, 1, 3), Run(0, 24, 44, 1, 3)]
    assert [span[:3] for span in loan.spans] == [(1, 3, 7), (1, 10, 10), (1, 20, 3)]


def test_a_loan_that_makes_no_message_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [("x", 20), ("own", 1), ("y", 20)]
    monkeypatch.setattr(sharing, "MOST", 2)
    lender = known("a", [("x", 20), ("y", 20)])
    assert lend(known("b", tensors), lender) is not None
    monkeypatch.setattr(sharing, "MOST", 1)
    assert lend(known("b", tensors), lender) is None


@pytest.mark.parametrize(("gap", "lent"), [(3, True), (4, False)])
def test_what_pins_more_than_twice_what_it_spares_is_no_loan(
    monkeypatch: pytest.MonkeyPatch, gap: int, lent: bool
) -> None:
    """20 bytes are in four slots of the lender, or one more of them in a fifth: the last one, of that byte."""
    monkeypatch.setattr(sharing, "DEAR", DEAR)
    lender = known("a", [("x", 10), ("", 12), ("y", 5), ("", gap), ("z", 5)], head=5)
    loan = lend(known("b", [("x", 10), ("y", 5), ("z", 5)], head=10), lender)
    assert (loan is not None) == lent


def test_what_is_borrowed_in_the_tier_is_leased_there_until_it_is_repaid() -> None:
    lender, other = known("a", [("x", 20), ("more", 30)]), known("c", [("y", 10)], head=10)
    borrower = known("b", [("x", 20), ("y", 10), ("own", 7)])
    tier = Tier(20, SLOT)
    lending = Lending(tier)
    for one, first in ((known("before", [("z", 17)]), 0), (lender, 2), (other, 8)):
        assert tier.reserve(one.checkpoint, pieces(one), 0).slots[pieces(one)[0]] == first
        tier.land(one.checkpoint, pieces(one))
    loan = lending.find(borrower, [lender, other])
    assert loan == sharing.loan(
        borrower, [lender, other], {"a": pieces(lender), "c": pieces(other)}, pieces(borrower), SLOT
    )
    assert loan is not None
    assert lending.borrow(loan, 7) == [
        Landed(1, 3, 7, 23), Landed(1, 10, 10, 30), Landed(1, 20, 3, 40), Landed(2, 10, 10, 90)
    ]  # fmt: skip
    assert tier.borrowed("a") == {*pieces(lender)[:3]}
    assert [tier.holders(one) for one in "ac"] == [{7}, {7}]
    for _ in range(2):
        lending.repay(7, 5)
        assert [tier.holders(one) for one in "ac"] == [frozenset(), frozenset()]
    tier.reserve("d", [Piece(0, SLOT * number, SLOT) for number in range(12)], 6)
    assert [name for name, _ in tier.residents()] == ["a", "c"]  # who lent last stays longest


def test_nothing_is_borrowed_for_what_has_its_own_slots() -> None:
    lender, borrower = known("a", [("x", 20)]), known("b", [("x", 20)])
    tier = Tier(20, SLOT)
    for one in (lender, borrower):
        tier.reserve(one.checkpoint, pieces(one), 0)
        tier.land(one.checkpoint, pieces(one))
    assert Lending(tier).find(borrower, [lender]) is None
    assert Lending(tier).find(borrower._replace(checkpoint="c"), [lender]) is not None


names = st.sampled_from("abcdefgh")
sizes = {name: 3 * place for place, name in enumerate("abcdefgh")}  # the first is empty
checkpoints = st.lists(st.lists(names, max_size=6), min_size=1, max_size=3)


@given(mine=checkpoints, others=st.lists(checkpoints, max_size=3), head=st.integers(0, 12), data=st.data())
def test_every_tensor_is_found_once_and_as_it_is(
    mine: list[list[str]], others: list[list[list[str]]], head: int, data: st.DataObject
) -> None:
    def make(name: str, files: list[list[str]], head: int) -> Known:
        return known(name, *([(one, sizes[one]) for one in file] for file in files), head=head)

    borrower = make("mine", mine, head)
    lenders = [make(f"lender {number}", files, 5) for number, files in enumerate(others)]
    landed = {
        one.checkpoint: data.draw(st.sets(st.sampled_from(pieces(one)))) if pieces(one) else set() for one in lenders
    }
    everything = pieces(borrower)
    homeless = data.draw(st.sets(st.sampled_from(everything))) if everything else set()
    loan = sharing.loan(borrower, lenders, landed, homeless, SLOT)
    if loan is None:
        assert not _coverable(borrower, lenders, landed, homeless)
        return
    assert loan.spared == _coverable(borrower, lenders, landed, homeless)
    for checkpoint, held in loan.held().items():
        assert held <= landed[checkpoint]
    there = {(span.file, byte) for span in set(everything) - loan.spared for byte in range(span.offset, span.stop)}
    lent: dict[tuple[int, int], tuple[str, Piece, int]] = {}
    for span in loan.spans:
        assert span.offset // SLOT == (span.offset + span.length - 1) // SLOT == span.home.offset // SLOT
        for byte in range(span.offset, span.offset + span.length):
            assert (span.lender, byte) not in lent
            lent[span.lender, byte] = span.checkpoint, span.home, byte
    assert {lender - len(borrower.files) for lender, _ in lent} == set(range(len(loan.sizes)))
    used = set()
    where = Lent(loan.sizes, loan.runs, 1)
    by_name = {one.checkpoint: one for one in lenders}
    for (number, entry), digest in zip(sharing.tensors(borrower.files), borrower.digests, strict=True):
        file, found = where.find(number, entry)
        assert found.nbytes == entry.nbytes
        places = {(file, byte) for byte in range(found.start, found.end)}
        if file < len(borrower.files):
            assert (file, found) == (number, entry)
            assert places <= there
            continue
        used |= places
        checkpoint, home, _ = lent[file, found.start]
        origin = by_name[checkpoint]
        assert (home.file, found.start, digest) in {
            (of, one.start, its) for (of, one), its in zip(sharing.tensors(origin.files), origin.digests, strict=True)
        }
    assert used == lent.keys()


def _coverable(
    borrower: Known, lenders: list[Known], landed: dict[str, set[Piece]], homeless: set[Piece]
) -> set[Piece]:
    """Pieces without a slot, each byte of which is in a tensor that some lender has whole in the pool."""
    offered = set()
    for one in lenders:
        for (file, entry), digest in zip(sharing.tensors(one.files), one.digests, strict=True):
            bytes_there = {byte for piece in landed[one.checkpoint] if piece.file == file for byte in _bytes(piece)}
            if set(range(entry.start, entry.end)) <= bytes_there:
                offered.add(digest)
    equal = {
        (file, byte)
        for (file, entry), digest in zip(sharing.tensors(borrower.files), borrower.digests, strict=True)
        if digest in offered
        for byte in range(entry.start, entry.end)
    }
    return {piece for piece in homeless if {(piece.file, byte) for byte in _bytes(piece)} <= equal}


def _bytes(piece: Piece) -> range:
    return range(piece.offset, piece.stop)


def test_nothing_is_lent_where_nothing_is() -> None:
    entry = TensorEntry("x", "U8", (4,), 3, 7)
    assert NOTHING.find(2, entry) == (2, entry)
    lent = Lent([9], [Run(1, 3, 7, 2, 5)], 9)
    assert lent.find(0, entry) == (0, entry)
    assert lent.find(1, entry) == (2, entry._replace(start=5, end=9))
    assert lent.find(2, entry) == (2, entry)
    after = entry._replace(start=7, end=9)
    assert lent.find(1, after) == (1, after)
    empty = entry._replace(end=3)
    assert lent.find(1, empty) == (1, empty)


def test_a_tier_lends_what_has_landed_to_what_has_no_slot() -> None:
    lender, borrower = known("a", [("x", 20)]), known("b", [("x", 20)])
    tier = Tier(20, SLOT)
    lending = Lending(tier)
    tier.reserve("a", pieces(lender), 0)
    assert lending.lent_bytes([lender, borrower]) == {}
    tier.land("a", pieces(lender))
    assert lending.lent_bytes([lender, borrower]) == {"b": 13}
    tier.reserve("b", pieces(borrower)[:2], 0)
    assert lending.lent_bytes([lender, borrower]) == {"b": 3}


def test_twins_are_tensors_with_equal_digests() -> None:
    one = known("a", [("x", 5), ("y", 5), ("own", 5)], [("z", 5), ("", 0)])
    other = known("b", [("other", 1), ("x", 5), ("y", 5), ("z", 5)], [("", 0)])
    assert sharing.twins(one, other) == [(0, 1, 2), (3, 3, 2)]
    assert sharing.twins(other, one) == [(1, 0, 2), (3, 3, 2)]
    assert sharing.twins(one, one) == [(0, 0, 5)]
    assert sharing.twins(one, known("c", [("q", 5)])) == []


def test_of_twins_the_one_of_the_same_name_is_meant() -> None:
    one = known("a", [("x", 5), ("x", 5), ("x", 5)])  # called 0.0.x, 0.1.x and 0.2.x
    other = known("b", [("w", 5), ("x", 5), ("x", 5), ("x", 5)])
    assert sharing.twins(one, other) == [(0, 1, 1), (1, 1, 2)]
    assert sharing.twins(other, one) == [(1, 1, 2), (3, 0, 1)]


some = st.lists(st.sampled_from("abcd"), max_size=9)


@given(some, some)
def test_twins_name_each_equal_tensor_once(mine: list[str], others: list[str]) -> None:
    one, other = (known(name, [(digest, 1) for digest in digests]) for name, digests in (("a", mine), ("b", others)))
    runs = sharing.twins(one, other)
    pairs = [(first + number, second + number) for first, second, length in runs for number in range(length)]
    assert [first for first, _ in pairs] == [number for number, name in enumerate(mine) if name in others]
    assert all(mine[first] == others[second] for first, second in pairs)
    assert all(
        (before[0] + before[2], before[1] + before[2]) != after[:2] for before, after in itertools.pairwise(runs)
    )


def lent_bytes(*checkpoints: Known, landed: dict[str, list[Piece]]) -> dict[str, int]:
    homeless = {one.checkpoint: [p for p in pieces(one) if p not in landed[one.checkpoint]] for one in checkpoints}
    return sharing.lent_bytes(checkpoints, landed, homeless, SLOT)


def test_lent_bytes_are_those_of_pieces_that_a_load_would_not_read() -> None:
    one, other = known("a", [("big", 25), ("x", 5)], head=4), known("b", [("big", 25), ("own", 6)])
    third = known("c", [("own", 6), ("alone", 50), ("twice", 20), ("twice", 20)])
    nothing: dict[str, list[Piece]] = {"a": [], "b": [], "c": []}
    assert lent_bytes(one, other, third, landed=nothing) == {}
    assert lent_bytes(one, other, third, landed=nothing | {"a": pieces(one)}) == {"b": 10}
    assert lent_bytes(one, other, third, landed=nothing | {"a": pieces(one)[:2]}) == {}  # the tensor is not whole
    assert lent_bytes(one, other, third, landed=nothing | {"b": pieces(other)}) == {"a": 10}
    both = nothing | {"a": pieces(one), "b": pieces(other)}
    assert lent_bytes(one, other, third, landed=both) == {}
    double, single = known("a", [("x", 20), ("x", 20)], head=10), known("b", [("x", 20)], head=10)
    assert lent_bytes(double, single, landed={"a": pieces(double)[:3], "b": []}) == {"b": 20}  # nobody lends to itself


@given(st.lists(st.sampled_from("abcd"), max_size=8), st.lists(st.sampled_from("abcd"), max_size=8), st.data())
def test_lent_bytes_are_what_the_loan_spares(mine: list[str], others: list[str], data: st.DataObject) -> None:
    sizes = {"a": 25, "b": 7, "c": 31, "d": 10}
    borrower, lender = (
        known(name, [(one, sizes[one]) for one in names]) for name, names in (("b", mine), ("a", others))
    )
    there = data.draw(st.lists(st.sampled_from(pieces(lender)), unique=True))
    homeless = data.draw(st.lists(st.sampled_from(pieces(borrower)), unique=True))
    told = sharing.lent_bytes([borrower, lender], {"a": there, "b": []}, {"a": [], "b": homeless}, SLOT)
    loan = sharing.loan(borrower, [lender], {"a": there}, homeless, SLOT)
    assert told == ({"b": sum(piece.length for piece in loan.spared)} if loan else {})


def test_own_bytes_are_those_that_no_other_has() -> None:
    one = known("a", [("x", MB), ("y", MB), ("x", MB)], [("small", MB - 1)])
    other = known("b", [("x", MB), ("small", MB - 1)])
    assert sharing.own_bytes([one, other]) == {"a": MB + 6, "b": 3}
    assert sharing.own_bytes([one]) == {"a": 4 * MB - 1 + 6}


def test_what_is_worth_it() -> None:
    assert sharing.worthwhile(known("a", [("x", 3)], [("y", MB)]).files)
    assert not sharing.worthwhile(known("a", [("x", MB - 1)]).files)


def test_portions_have_every_byte_in_order() -> None:
    one = known("a", [("x", 25), ("", 0)], [("y", 1), ("z", 12)])
    orders = list(sharing.orders(one.files, SLOT, 12))
    assert [[(*part.span, part.first, part.last) for part in order] for order in orders] == [
        [(0, 3, 7, True, False)],
        [(0, 10, 10, False, False)],
        [(0, 20, 8, False, True), (0, 28, 0, True, True), (1, 3, 1, True, True)],
        [(1, 4, 6, True, False), (1, 10, 6, False, True)],
    ]
    assert [part.entry.nbytes for order in orders for part in order] == [25, 25, 25, 0, 1, 12, 12]
    assert list(sharing.orders([], SLOT, 12)) == []
    (order,) = sharing.orders(known("a", [("x", SLOT)], head=SLOT).files, SLOT, SLOT)
    assert [part.span for part in order] == [Piece(0, SLOT, SLOT)]


def test_a_digest_covers_type_and_shape() -> None:
    entry = TensorEntry("x", "BF16", (2, 3), 3, 15)
    assert sharing.head(entry) == b"BF16 [2, 3]\n"


def test_what_is_stored_is_found_and_nothing_else_is() -> None:
    digests = [bytes([number]) * 32 for number in range(3)]
    raw = sharing.encode("a", digests)
    assert raw.startswith(b"serverless-llm tensors 1 blake3 a 3\n")
    assert sharing.decode("a", 3, raw) == digests
    assert sharing.decode("b", 3, raw) is None
    assert sharing.decode("a", 2, raw) is None
    for place in range(len(raw)):
        assert sharing.decode("a", 3, raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]) is None
    assert sharing.decode("a", 3, b"") is None
    shorter = raw[: -16 - 32]
    assert sharing.decode("a", 3, shorter + sharing._seal(shorter)) is None
    assert sharing.decode("a", 0, sharing.encode("a", [])) == []
