"""The engine's verbs, on tiny random models."""

from __future__ import annotations

import itertools
import mmap
from dataclasses import replace

import pytest
import torch

from serverless_llm.domain import FinishReason, Sampling
from serverless_llm.engine.config import ModelConfig
from serverless_llm.engine.engine import Engine
from serverless_llm.engine.sampler import uniform
from serverless_llm.engine.sequence import SequenceState
from serverless_llm.errors import CapacityError, CheckpointError, KvCapacityError
from serverless_llm.loader.staging import SETTING
from tests.unit.engine.tiny import (
    GREEDY,
    Tensors,
    config_json,
    drain,
    entries_of,
    fill,
    prompt,
    serve,
    start,
    tensors_of,
)
from tests.unit.loader.mappings import wanted_huge

CONFIG = ModelConfig.parse(config_json())
TENSORS = tensors_of(CONFIG)
OTHER = ModelConfig.parse(config_json("Qwen3ForCausalLM", num_hidden_layers=1, hidden_size=32))
MIB = 1 << 20


def engine(weights: str = "view", budget: int = 16 * MIB, kv_floor: int = 0) -> Engine:
    made = Engine(budget=budget, weights=weights)
    serve(made, CONFIG, TENSORS, kv_floor=kv_floor)
    return made


def spoken(tokens: list[int], sampling: Sampling = GREEDY) -> list[int]:
    """What a sequence says alone."""
    alone = engine()
    alone.add(start(1, tokens, sampling))
    return drain(alone)[1][0]


def test_a_step_tells_tokens_and_first_tokens() -> None:
    ticks = itertools.count()
    made = Engine(budget=16 * MIB, clock=lambda: float(next(ticks)))
    serve(made, CONFIG, TENSORS)
    made.add(start(5, prompt(20), epoch=3))
    first = made.step()
    assert first.first == [(5, 3, 1.0)]
    assert [(sequence, epoch, len(tokens)) for sequence, epoch, tokens, _ in first.tokens] == [(5, 3, 1)]
    assert made.sequences() == [SequenceState(5, 3, 1, 2)]
    assert made.kv_used == 2 * CONFIG.kv_block_bytes
    second = made.step()
    assert second.first == []
    assert second.tokens[0].finish is None
    assert made.steps == 2


def test_length_and_stop() -> None:
    made = engine()
    said = spoken(prompt(10))
    made.add(start(1, prompt(10)))
    made.add(start(2, prompt(10), replace(GREEDY, stop_ids=(159, said[4]))))
    told = drain(made)
    assert told[1] == (said, FinishReason.LENGTH)
    assert told[2] == (said[: said.index(said[4]) + 1], FinishReason.STOP)
    assert made.kv_used == 0
    assert not made.runnable


def test_the_context_is_the_last_token() -> None:
    made = engine()
    made.add(start(1, prompt(CONFIG.context - 3), replace(GREEDY, max_tokens=100)))
    tokens, finish = drain(made)[1]
    assert (len(tokens), finish) == (3, FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("generated", "sampling", "finish"),
    [
        ([4, 5, 6], replace(GREEDY, max_tokens=3), FinishReason.LENGTH),
        ([4, 5, 6], replace(GREEDY, stop_ids=(6,)), FinishReason.STOP),
    ],
)
def test_resumed_at_its_end(generated: list[int], sampling: Sampling, finish: FinishReason) -> None:
    made = engine()
    made.add(start(1, prompt(5), sampling, generated=generated, epoch=2))
    assert made.runnable
    assert made.step().tokens == [(1, 2, [], finish)]
    assert not made.runnable


def test_a_stop_id_in_the_prompt_stops_nothing() -> None:
    made = engine()
    made.add(start(1, [7, 7, 7], replace(GREEDY, stop_ids=(7,), max_tokens=1)))
    assert len(drain(made)[1][0]) == 1


def test_cancel_within_a_step() -> None:
    made = engine()
    for number in (1, 2):
        made.add(start(number, prompt(20, number), epoch=1))
    made.step()
    made.cancel(1, 0)
    assert len(made.sequences()) == 2
    made.cancel(1, 1)
    made.cancel(77, 1)
    assert set(drain(made)) == {2}
    assert made.kv_used == 0


def test_an_ended_resume_can_be_cancelled() -> None:
    made = engine()
    made.add(start(1, prompt(5), replace(GREEDY, max_tokens=1), generated=[3]))
    made.cancel(1, 0)
    assert not made.runnable


def test_epochs() -> None:
    made = engine()
    said = spoken(prompt(10))
    made.add(start(1, prompt(10), epoch=1))
    made.step()
    made.add(start(1, prompt(99), epoch=0))
    made.add(start(1, prompt(99), epoch=1))
    made.add(start(1, prompt(10), generated=said[:5], epoch=2))
    result = made.step()
    assert [(emission.epoch, emission.tokens) for emission in result.tokens] == [(2, [said[5]])]


def test_refusals() -> None:
    made = engine(budget=MIB // 2)
    with pytest.raises(KeyError):
        made.add(start(1, prompt(5), replica=9))
    for tokens in ([], [-1], [160], prompt(513)):
        with pytest.raises(CapacityError):
            made.add(start(1, tokens))
    with pytest.raises(KvCapacityError, match=r"tokens need \d+\.\d KB of KV, \d+\.\d KB are there") as alone:
        made.add(start(1, prompt(200), replace(GREEDY, max_tokens=300)))
    assert alone.value.never
    assert not made.runnable


def test_what_has_no_asked_length_ends_where_the_memory_does() -> None:
    made = engine(budget=MIB // 2)
    open_end = replace(GREEDY, max_tokens=300, open_end=True)
    made.add(start(1, prompt(200), open_end))
    tokens, finish = drain(made, steps=400)[1]
    assert finish is FinishReason.LENGTH
    assert tokens == spoken(prompt(200), replace(GREEDY, max_tokens=len(tokens)))
    with pytest.raises(CapacityError, match="of KV"):
        made.add(start(2, prompt(200), replace(GREEDY, max_tokens=len(tokens) + 1)))
    made.add(start(2, prompt(200), open_end, generated=tokens))  # as after a restart
    assert drain(made)[2] == ([], FinishReason.LENGTH)
    with pytest.raises(CapacityError, match="of KV"):
        made.add(start(3, prompt(500), open_end))


def test_a_replica_that_is_placed_but_not_active() -> None:
    made = Engine(budget=MIB)
    made.place(1, CONFIG, entries_of(TENSORS), 0)
    with pytest.raises(KeyError):
        made.add(start(1, prompt(5)))
    made.drop(1)


def test_placing_refuses() -> None:
    made = engine(budget=MIB)
    entries = entries_of(TENSORS)
    with pytest.raises(CapacityError, match=r"weights and KV need 1\.\d MB, \d+\.\d KB are free"):
        made.place(2, CONFIG, entries, MIB)
    with pytest.raises(CheckpointError, match="lm_head"):
        made.place(2, CONFIG, {name: entry for name, entry in entries.items() if name != "lm_head.weight"}, 0)
    made.place(2, CONFIG, entries, 0)


@pytest.mark.parametrize("weights", ["view", "copy"])
def test_several_models_interleave(weights: str) -> None:
    made = engine(weights)
    other = tensors_of(OTHER, seed=4)
    serve(made, OTHER, other, replica=2)
    made.add(start(1, prompt(20)))
    made.add(start(2, prompt(9), replica=2))
    turns = [emission.sequence for _ in range(6) for emission in made.step().tokens]
    assert turns == [1, 2, 1, 2, 1, 2]
    alone = Engine(budget=4 * MIB)
    serve(alone, OTHER, other, replica=2)
    alone.add(start(2, prompt(9), replica=2))
    expected = drain(alone)[2][0]
    assert drain(made)[2][0] == expected[3:]


@pytest.mark.parametrize("weights", ["view", "copy"])
def test_drop_frees_everything(weights: str) -> None:
    made = engine(weights)
    free = made.kv_free
    serve(made, OTHER, tensors_of(OTHER), replica=2)
    made.add(start(1, prompt(20), replica=2, epoch=4))
    made.step()
    assert made.drop(2) == [SequenceState(1, 4, 1, 2)]
    assert made.kv_free == free
    assert not made.runnable
    made.check_invariants()


def test_a_replica_placed_where_another_was() -> None:
    """The arena's bytes are given back and used again, and no one sees what was there."""
    made = engine("copy", budget=2 * MIB)
    said = spoken(prompt(30))
    for replica in range(2, 8):
        serve(made, OTHER, tensors_of(OTHER, seed=replica), replica=replica)
        made.add(start(replica, prompt(50), replica=replica))
        made.add(start(1, prompt(30)))
        assert drain(made)[1][0] == said
        made.drop(replica)


def test_reserve_preempts_and_the_sequence_goes_on() -> None:
    made = engine()
    made.add(start(1, prompt(40)))
    made.step()
    assert made.kv_used
    assert made.reserve(made.arena.numel() - CONFIG.weight_bytes()) == 0
    assert made.kv_used == 0
    assert (made.take_preempted(), made.take_preempted()) == ({1: 1}, {})
    assert made.sequences() == [SequenceState(1, 0, 1, 0)]
    assert drain(made)[1][0] == spoken(prompt(40))[1:]


def test_a_window_needs_no_memory_for_what_it_has_passed() -> None:
    """A text of 25 columns of blocks runs in the room of 16 at most, and says what it says in plenty."""
    config = ModelConfig.parse(config_json("MistralForCausalLM", sliding_window=30))
    told = []
    for columns in (16, 64):
        made = Engine(budget=config.weight_bytes() + columns * config.kv_column_bytes)
        serve(made, config, tensors_of(config))
        made.add(start(1, prompt(300), replace(GREEDY, max_tokens=100)))
        told.append(drain(made)[1])
    assert told[0] == told[1]
    assert told[0][1] is FinishReason.LENGTH


def test_reserve_says_what_is_missing() -> None:
    made = engine(kv_floor=MIB)
    assert made.reserve(made.arena.numel() - CONFIG.weight_bytes() - MIB + 5) == 5
    assert made.reserve(MIB) == 0


def test_reserve_leaves_floors_alone() -> None:
    made = engine(kv_floor=MIB)
    made.add(start(1, prompt(40)))
    made.step()
    assert made.reserve(made.arena.numel() - CONFIG.weight_bytes() - MIB) == 0
    assert made.kv_used


def test_weights_push_kv_out_of_their_way() -> None:
    """In copy mode a buffer that finds only KV in its place takes it; the sequences run again."""
    made = engine("copy", budget=MIB, kv_floor=MIB // 4)
    said = {number: spoken(prompt(100, number)) for number in range(3)}
    for number in said:
        made.add(start(number, prompt(100, number)))
    got = {number: list(made.step().tokens[0].tokens) if not number else [] for number in said}
    for emission in made.step().tokens:
        got[emission.sequence] += emission.tokens
    serve(made, OTHER, tensors_of(OTHER), replica=2)
    for number, (tokens, _) in drain(made).items():
        got[number] += tokens
    assert {number: tokens[-5:] for number, tokens in got.items()} == {n: tokens[-5:] for n, tokens in said.items()}


def test_weights_that_find_no_gap() -> None:
    """Enough bytes in all, but the largest buffer fits neither between two models nor behind them."""
    made = engine("copy", budget=MIB)
    for replica in (2, 3):
        serve(made, CONFIG, TENSORS, replica=replica)
    made.drop(2)
    wide = ModelConfig.parse(
        config_json(vocab_size=1300, tie_word_embeddings=True, num_attention_heads=1, num_key_value_heads=1,
                    num_hidden_layers=1, intermediate_size=8)
    )  # fmt: skip
    with pytest.raises(CapacityError, match=r"weights of \d+\.\d KB find no gap"):
        made.place(4, wide, entries_of(tensors_of(wide)), 0)
    made.add(start(1, prompt(5), replica=3))
    assert drain(made)[1][1] is FinishReason.LENGTH


def test_nothing_waits_for_a_run_of_slabs_that_cannot_be() -> None:
    """Blocks of three slabs, and weights that leave gaps of less: the sequence is refused, and does not wait here. One
    that may end anywhere, and has begun, ends."""
    tiny = config_json(hidden_size=8, num_hidden_layers=1, intermediate_size=8, head_dim=4, tie_word_embeddings=True)
    large = tiny | {"num_hidden_layers": 5, "head_dim": 64, "num_key_value_heads": 4}
    made = Engine(budget=MIB, weights="copy")
    config = ModelConfig.parse(large)
    serve(made, config, tensors_of(config))
    for replica in range(2, 10):
        filler = ModelConfig.parse(tiny | {"vocab_size": 2048 if replica % 2 else 4096})
        serve(made, filler, tensors_of(filler), replica=replica)
    for replica in range(2, 10, 2):
        made.drop(replica)
    made.add(start(1, prompt(5), replace(GREEDY, max_tokens=3)))
    result = made.step()
    assert result.tokens == []
    assert [(one.sequence, one.missing) for one in result.refused] == [(1, config.kv_block_bytes)]
    assert not made.runnable
    open_end = replace(GREEDY, max_tokens=3, open_end=True)
    made.add(start(2, prompt(5), open_end))
    assert [one.sequence for one in made.step().refused] == [2]
    made.add(start(2, prompt(5), open_end, generated=[4], epoch=2))
    assert drain(made) == {2: ([], FinishReason.LENGTH)}


def block(made: Engine, vocab: int) -> None:
    """Weights of another model take memory."""
    large = ModelConfig.parse(config_json("Qwen3ForCausalLM", vocab_size=vocab, tie_word_embeddings=True))
    made.place(2, large, entries_of(tensors_of(large)), 0)


@pytest.mark.parametrize("open_end", [False, True])
def test_what_weights_strand_is_refused_and_goes_on_when_they_are_gone(open_end: bool) -> None:
    made = engine(budget=MIB)
    sampling = replace(GREEDY, max_tokens=40, open_end=open_end)
    made.add(start(1, prompt(200), sampling))
    begun = made.step().tokens[0].tokens
    block(made, 1800)
    (refusal,) = made.step().refused
    assert (refusal.sequence, refusal.never) == (1, False)
    assert not made.runnable
    with pytest.raises(KvCapacityError) as beside:
        made.add(start(1, prompt(200), sampling, epoch=2))
    assert not beside.value.never
    assert beside.value.missing % CONFIG.kv_block_bytes == 0 < beside.value.missing
    if open_end:
        made.add(start(1, prompt(200), sampling, generated=begun, epoch=2))
        assert drain(made) == {1: ([], FinishReason.LENGTH)}
    made.drop(2)
    made.add(start(1, prompt(200), sampling, generated=begun, epoch=3))
    assert begun + drain(made)[1][0] == spoken(prompt(200), replace(GREEDY, max_tokens=40))


def test_an_open_end_is_where_memory_ends_and_not_where_other_weights_begin() -> None:
    """What ends at the weights of others is refused, to go on when they have left, or to end where they stay."""
    alone, made = engine(budget=MIB), engine(budget=MIB)
    sampling = replace(GREEDY, max_tokens=CONFIG.context, open_end=True)
    alone.add(start(1, prompt(20), sampling))
    longest, finish = drain(alone)[1]
    assert finish is FinishReason.LENGTH
    block(made, 1400)
    made.add(start(1, prompt(20), sampling))
    said, refused = [], []
    while made.runnable:
        result = made.step()
        said += [token for emission in result.tokens for token in emission.tokens]
        refused += result.refused
    assert [(one.sequence, one.epoch, one.never) for one in refused] == [(1, 0, False)]
    assert said == longest[: len(said)]
    made.add(start(1, prompt(20), sampling, generated=said, epoch=2))
    assert drain(made) == {1: ([], FinishReason.LENGTH)}
    made.drop(2)
    made.add(start(1, prompt(20), sampling, generated=said, epoch=3))
    assert said + drain(made)[1][0] == longest


def test_nan_ends_its_sequence_alone() -> None:
    poisoned: Tensors = {name: tensor.clone() for name, tensor in TENSORS.items()}
    poisoned["model.embed_tokens.weight"][150] = torch.nan
    made = Engine(budget=16 * MIB)
    serve(made, CONFIG, poisoned)
    good, bad = [token % 150 for token in prompt(20)], [3, 150, 4]
    for rounds in range(3):
        made.add(start(1, good))
        made.add(start(2, bad, Sampling(temperature=rounds, max_tokens=5)))
        told = drain(made)
        assert told[2] == ([], FinishReason.NOT_FINITE)
        assert len(told[1][0]) == 12


def test_what_lay_in_a_block_does_not_matter() -> None:
    made = engine()
    made.arena.fill_(0xFF)  # NaN in every dtype
    made.add(start(1, prompt(30)))
    made.add(start(2, prompt(100)))
    assert drain(made)[1] == (spoken(prompt(30)), FinishReason.LENGTH)


@pytest.mark.parametrize("weights", ["view", "copy"])
def test_memory_that_nobody_has_goes_back_at_rest(weights: str) -> None:
    made = engine(weights)
    made.add(start(1, prompt(30)))
    made.add(start(2, prompt(100), Sampling(max_tokens=1)))
    told = drain(made, steps=3)
    assert (told[2][1], told[1][1]) == (FinishReason.LENGTH, None)
    restless, held = made.restless, made.arena.count_nonzero()
    made.rest()
    assert (restless, made.restless) == (True, False)
    assert made.arena.count_nonzero() < held
    assert told[1][0] + drain(made)[1][0] == spoken(prompt(30))
    made.drop(1)
    made.rest()
    assert not made.arena.any()


@pytest.mark.skipif(not SETTING.exists(), reason="this kernel has no transparent huge pages")
@pytest.mark.parametrize("weights", ["view", "copy"])
def test_only_weights_that_are_copied_want_huge_pages(weights: str) -> None:
    made = engine(weights)
    base = made.arena.data_ptr()
    wanted = sum(stop - start for start, stop in wanted_huge() if base <= start < base + made.arena.numel())
    nbytes = CONFIG.weight_bytes() if weights == "copy" else 0
    assert nbytes <= wanted <= nbytes + 2 * mmap.PAGESIZE


def test_draws_follow_seed_and_position() -> None:
    """A model to which all tokens are alike says what the random numbers say."""
    made = Engine(budget=16 * MIB)
    serve(made, CONFIG, TENSORS | {"lm_head.weight": torch.zeros(160, 64)})
    made.add(start(1, prompt(10), Sampling(temperature=1.0, seed=42, max_tokens=20)))
    assert drain(made)[1][0] == [int(160 * uniform(42, position)) for position in range(10, 30)]


@pytest.mark.parametrize("weights", ["view", "copy"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_conversion(weights: str, stored: torch.dtype) -> None:
    """Tensors stored in another dtype are converted into the arena, and not referred to afterwards."""
    served = ModelConfig.parse(config_json(), "float32" if stored is torch.bfloat16 else "bfloat16")
    tensors = tensors_of(served, dtype=stored)
    made = Engine(budget=16 * MIB, weights=weights)
    assert made.place(1, served, entries_of(tensors), 0) is None
    fill(made, tensors)
    assert made.activate(1, tensors) is False
    for tensor in tensors.values():
        tensor.fill_(torch.nan)
    made.add(start(1, prompt(10)))
    assert drain(made)[1][1] is FinishReason.LENGTH
    assert made.kv_free <= made.arena.numel() - served.weight_bytes()


def test_a_checkpoint_of_mixed_dtypes() -> None:
    mixed = {name: tensor.bfloat16() if "norm" in name else tensor for name, tensor in TENSORS.items()}
    results = []
    for weights, refers in (("view", True), ("copy", False)):
        made = Engine(budget=16 * MIB, weights=weights)
        assert made.place(1, CONFIG, entries_of(mixed), 0) is None
        fill(made, mixed)
        assert made.activate(1, mixed) is refers
        made.add(start(1, prompt(10)))
        results.append(drain(made)[1])
    assert results[0] == results[1]


def test_view_mode_refers_to_the_tensors() -> None:
    made = Engine(budget=16 * MIB)
    assert made.place(1, CONFIG, entries_of(TENSORS), 0) is None
    assert made.activate(1, TENSORS) is True


def test_dests_cover_each_tensor_in_its_place() -> None:
    made = Engine(budget=16 * MIB, weights="copy")
    planned = made.place(1, CONFIG, entries_of(TENSORS), 0)
    assert planned is not None
    assert {dest.tensor: dest.stop - dest.start for dest in planned} == {n: t.nbytes for n, t in TENSORS.items()}
    at = {dest.tensor: dest for dest in planned}
    q, k, v = (at[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv")
    assert q.offset % 256 == 0
    assert (k.offset, v.offset) == (q.offset + q.stop, q.offset + q.stop + k.stop)
    ranges = sorted((dest.offset, dest.offset + dest.stop) for dest in planned)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(ranges))


def test_steps_get_shorter_as_the_model_shows_to_be_slow() -> None:
    """A clock on which each step takes ten seconds: prefill goes on in the smallest chunks."""
    ticks = itertools.count(step=10)
    made = Engine(budget=16 * MIB, clock=lambda: float(next(ticks)))
    serve(made, CONFIG, TENSORS)
    made.add(start(1, prompt(500), replace(GREEDY, max_tokens=1)))
    made.add(start(2, prompt(60, 2), replace(GREEDY, max_tokens=1)))
    assert drain(made)[1][0] == spoken(prompt(500), replace(GREEDY, max_tokens=1))
    assert made.steps == 3  # 500 + 12 tokens at first, then 32 at a time


def test_warm_and_identity() -> None:
    made = engine()
    made.warm()
    assert made.numerics_id == engine("copy").numerics_id
    assert "threads-1" in made.numerics_id
