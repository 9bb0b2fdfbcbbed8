"""Decoders that transformers computes over our paged KV: equal to plain transformers, or refused by name."""

from __future__ import annotations

import gc
import importlib.util
import re
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from serverless_llm.domain import BLOCK_TOKENS, Sampling
from serverless_llm.engine.config import ForeignConfig, ModelConfig
from serverless_llm.engine.engine import Engine
from serverless_llm.engine.sequence import Likelihood, SequenceStart
from serverless_llm.errors import CheckpointError
from tests.unit.engine.every import model_of
from tests.unit.engine.tiny import Tensors, assert_near_oracle, drain, entries_of, prompt, serve, start

pytestmark = pytest.mark.slow

COMMON: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
GROUPED = COMMON | {"num_key_value_heads": 2}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
SPARSE = {"layer_types": ["minimax_m3_sparse", "full_attention"], "index_block_size": 4, "index_topk_blocks": 2}
FEW = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
FAR = {"floor_scale": 8, "layer_types": ["full_attention"] * 2, "no_rope_layers": [0, 0]}
ZAYA = GROUPED | {"num_experts": 4, "num_experts_per_tok": 1, "head_dim": 16}
GPT2 = {"vocab_size": 160, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
SERVED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt-neox": ("GPTNeoXForCausalLM", "gpt_neox", COMMON),
    "gpt-neox-sequential": ("GPTNeoXForCausalLM", "gpt_neox", COMMON | {"use_parallel_residual": False}),
    "stablelm": ("StableLmForCausalLM", "stablelm", GROUPED),
    "cohere": ("CohereForCausalLM", "cohere", GROUPED | {"use_qk_norm": True}),
    "cohere2-window": ("Cohere2ForCausalLM", "cohere2", GROUPED | {"sliding_window": 20, "sliding_window_pattern": 2}),
    "starcoder2-window": ("Starcoder2ForCausalLM", "starcoder2", GROUPED | {"sliding_window": 24}),
    "granite": (
        "GraniteForCausalLM",
        "granite",
        GROUPED | {"attention_multiplier": 0.1, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "gpt2": ("GPT2LMHeadModel", "gpt2", GPT2),
    "gpt-bigcode": ("GPTBigCodeForCausalLM", "gpt_bigcode", GPT2 | {"multi_query": True}),
    "phi": ("PhiForCausalLM", "phi", GROUPED),
    "olmo": ("OlmoForCausalLM", "olmo", GROUPED),
    "nemotron": ("NemotronForCausalLM", "nemotron", GROUPED),
    "smollm3": ("SmolLM3ForCausalLM", "smollm3", GROUPED | {"no_rope_layer_interval": 2}),
    "sinks": ("GraniteSWAForCausalLM", "granite_swa", GROUPED | {"sliding_window": 20}),
    "granite-4": (
        "GraniteMoeHybridForCausalLM",
        "granitemoehybrid",
        GROUPED | {"layer_types": ["attention"] * 2, "num_local_experts": 0, "shared_intermediate_size": 96},
    ),
    "latent": ("MiniCPM3ForCausalLM", "minicpm3", COMMON | LATENT),
}
# Experts are products of torch's own.
MIXTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "olmoe": ("OlmoeForCausalLM", "olmoe", GROUPED | FEW),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        GROUPED | FEW | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    "gpt-oss": ("GptOssForCausalLM", "gpt_oss", GROUPED | FEW | {"head_dim": 16, "sliding_window": 20}),
    "granite-moe": ("GraniteMoeForCausalLM", "granitemoe", GROUPED | FEW),
    "glm4-moe": (
        "Glm4MoeForCausalLM",
        "glm4_moe",
        GROUPED | FEW | {"head_dim": 16, "moe_intermediate_size": 32, "first_k_dense_replace": 1},
    ),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        COMMON
        | LATENT
        | FEW
        | {
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "v_head_dim": 12,
        },
    ),
}
EVERY = SERVED | MIXTURES  # fmt: skip


def plain(name: str, kind: str, keys: dict[str, Any]) -> tuple[dict[str, Any], Any, Tensors]:
    """A config.json, transformers' model of random weights, and the tensors that its checkpoint would hold."""
    values = {"architectures": [name], "model_type": kind, "dtype": "float32"} | keys
    return values, *model_of(values)


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(budget=16 << 20)
    yield made
    made.check_invariants()


@pytest.mark.parametrize("which", EVERY)
def test_any_decoder_of_transformers_serves_batches_and_chunks_as_it_would_alone(which: str, engine: Engine) -> None:
    values, model, tensors = plain(*EVERY[which])
    config = ModelConfig.parse(values)
    assert isinstance(config, ForeignConfig)
    serve(engine, config, tensors)
    prompts = {1: prompt(70, 1), 2: prompt(5, 2), 3: prompt(33, 3)}  # the first in several steps
    generated: dict[int, list[int]] = {}
    for number, tokens in prompts.items():
        engine.add(start(number, tokens))
        for other, (new, _) in drain(engine, steps=1).items():
            generated[other] = generated.get(other, []) + new
    engine.add(start(4, prompt(40, 4), generated=prompt(3, 5)))  # one that was begun elsewhere
    told = drain(engine)
    for number, tokens in prompts.items():
        whole = generated.get(number, []) + told[number][0]
        assert len(whole) == 12
        assert_near_oracle(model, tokens, whole)
    assert_near_oracle(model, prompt(40, 4) + prompt(3, 5), told[4][0])


TOLD = Sampling(temperature=0.0, max_tokens=8, logprobs=3)


def likelihoods(engine: Engine, starts: list[SequenceStart]) -> dict[int, list[Likelihood]]:
    """What is told of each sequence's tokens, to the bit."""
    told: dict[int, list[Likelihood]] = {one.sequence: [] for one in starts}
    for one in starts:
        engine.add(one)
    while engine.runnable:
        for sequence, new in engine.step().likelihoods.items():
            told[sequence] += new
    return told


@pytest.mark.parametrize("which", SERVED)
def test_in_float32_batches_chunks_and_restarts_change_no_bit(which: str, engine: Engine) -> None:
    values, _, tensors = plain(*SERVED[which])
    serve(engine, ModelConfig.parse(values), tensors)
    prompts = {1: prompt(70, 1), 2: prompt(5, 2), 3: prompt(33, 3)}
    alone = {number: likelihoods(engine, [start(number, tokens, TOLD)])[number] for number, tokens in prompts.items()}
    assert likelihoods(engine, [start(number, tokens, TOLD) for number, tokens in prompts.items()]) == alone
    begun = [one.tokens[0] for one in alone[2]]
    resumed = likelihoods(engine, [start(2, prompts[2], TOLD, generated=begun[:5]), start(9, prompt(11), TOLD)])
    assert resumed[2] == alone[2][5:]


@pytest.mark.parametrize(("which", "kind"), [("gpt-neox", "Linear"), ("gpt2", "Conv1D")])
@torch.inference_mode()
def test_a_row_of_a_linear_layer_is_the_same_alone(which: str, kind: str, engine: Engine) -> None:
    values, _, tensors = plain(*SERVED[which])
    serve(engine, ModelConfig.parse(values), tensors)
    module = engine._models[1]._module  # type: ignore[attr-defined]
    layers = [layer for layer in module.modules() if type(layer).__name__ == kind]
    assert layers
    for layer in layers:
        x = torch.randn(40, layer.weight.shape[0 if kind == "Conv1D" else 1])
        assert all(torch.equal(layer(x[:rows]), layer(x)[:rows]) for rows in (1, 3, 17))


def test_weights_are_the_views_that_were_given_and_are_let_go(engine: Engine) -> None:
    values, _, tensors = plain(*SERVED["granite"])
    serve(engine, ModelConfig.parse(values), tensors)
    module = engine._models[1]._module  # type: ignore[attr-defined]
    ours = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    assert {parameter.untyped_storage().data_ptr() for parameter in module.parameters()} <= ours
    assert engine._memory.free_bytes > engine.arena.numel() - sum(t.nbytes for t in tensors.values()) - (1 << 16)
    held = [weakref.ref(tensor) for tensor in tensors.values()] + [weakref.ref(module)]
    del module, tensors
    engine.drop(1)
    gc.collect()
    assert [one() for one in held] == [None] * len(held)


@pytest.mark.parametrize(("weights", "dtype"), [("copy", "auto"), ("view", "bfloat16")])
def test_copies_and_conversions(weights: str, dtype: str) -> None:
    engine = Engine(budget=8 << 20, weights=weights)
    values, model, tensors = plain(*SERVED["stablelm"])
    config = ModelConfig.parse(values, dtype)
    serve(engine, config, tensors)
    engine.add(start(1, prompt(40)))
    generated, _ = drain(engine)[1]
    assert_near_oracle(model, prompt(40), generated, 1e-4 if dtype == "auto" else 0.05)


REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "no attention": ("MambaForCausalLM", "mamba", COMMON, "its tokens meet elsewhere"),
    "another attention": ("GPTJForCausalLM", "gptj", GPT2 | {"rotary_dim": 8}, "its attention is not one that"),
    "a convolution of keys": ("ZayaForCausalLM", "zaya", ZAYA, "its tokens meet elsewhere"),
    "a bias": ("BloomForCausalLM", "bloom", {**COMMON, "n_layer": 2, "n_head": 4}, "does not run over paged KV"),
    "head size": ("Ernie4_5ForCausalLM", "ernie4_5", GROUPED, "2 KV heads of 128"),
    "a choice of keys": (
        "MiniMaxM3VLForCausalLM",
        "minimax_m3_vl_text",
        GROUPED | FEW | SPARSE | {"head_dim": 16},
        "asks paged attention for block_indices",
    ),
    "a scale by place": (
        "Llama4ForCausalLM",
        "llama4_text",
        GROUPED | FEW | {"head_dim": 16} | FAR,
        "the place of a token",
    ),
    "positions": (
        "RobertaForCausalLM",
        "roberta",
        COMMON | {"is_decoder": True, "pad_token_id": 1},
        "the place of a token",
    ),
    "scales": ("GPT2LMHeadModel", "gpt2", GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "in different ways"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_attention_that_pages_do_not_hold_is_refused_by_name(which: str, engine: Engine) -> None:
    name, kind, keys, says = REFUSED[which]
    values, _, tensors = plain(name, kind, keys)
    with pytest.raises(CheckpointError, match=says):
        serve(engine, ModelConfig.parse(values), tensors)
    engine.drop(1)


@pytest.mark.parametrize("weights", ["view", "copy"])
@pytest.mark.parametrize("which", ["olmoe", "deepseek-v3"])
def test_weights_that_transformers_packs_lie_packed_in_the_arena(which: str, weights: str) -> None:
    engine = Engine(budget=8 << 20, weights=weights)
    values, model, tensors = plain(*MIXTURES[which])
    assert any(re.search(r"experts\.3\.up_proj", name) for name in tensors)
    serve(engine, ModelConfig.parse(values), tensors)
    module = engine._models[1]._module  # type: ignore[attr-defined]
    arena = engine.arena.untyped_storage().data_ptr()
    packed = [
        one for name, one in module.named_parameters() if name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    ]
    assert packed
    assert {one.untyped_storage().data_ptr() for one in packed} == {arena}
    assert all(one.is_contiguous() for one in packed)
    for name, one in model.named_parameters():
        assert torch.equal(module.get_parameter(name), one)
    engine.drop(1)
    assert engine._memory.free_bytes == engine.arena.numel()


@pytest.mark.parametrize("which", ["gpt2", "olmoe", "glm4-moe"])
def test_weights_stay_on_their_device(which: str) -> None:
    """The meta device in place of CUDA: nothing can be copied from it."""
    from serverless_llm.engine.fallback import NAME
    from serverless_llm.engine.foreign_module import bound

    values, _, tensors = plain(*EVERY[which])
    config = ModelConfig.parse(values).bound(entries_of(tensors))
    assert isinstance(config, ForeignConfig)
    meta = torch.device("meta")
    module = bound(config, {name: tensor.to(meta) for name, tensor in tensors.items()}, meta, NAME)
    assert {one.device for one in [*module.parameters(), *module.buffers()]} == {meta}


def test_what_decides_between_experts_is_not_rounded(engine: Engine) -> None:
    """Biases whose differences bfloat16 does not have, stored in float32 beside weights of bfloat16."""
    values, _, tensors = plain(*MIXTURES["glm4-moe"])
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    exact = 12 + torch.arange(4) / 1000
    stored = {name: exact if name == bias else tensor.bfloat16() for name, tensor in tensors.items()}
    config = ModelConfig.parse(values, "bfloat16")
    serve(engine, config, stored)
    module = engine._models[1]._module  # type: ignore[attr-defined]
    assert torch.equal(module.get_buffer(bias), exact)
    assert config.weight_bytes(entries_of(stored)) >= sum(tensor.nbytes for tensor in stored.values())
    engine.add(start(1, prompt(40)))
    assert len(drain(engine)[1][0]) == 12


def test_a_wholly_float32_checkpoint_is_rounded_where_bfloat16_is_asked_for() -> None:
    values, _, tensors = plain(*MIXTURES["glm4-moe"])
    config = ModelConfig.parse(values, "bfloat16").bound(entries_of(tensors))
    assert isinstance(config, ForeignConfig)
    assert not config.wide


@pytest.mark.parametrize(
    ("change", "says"),
    [("missing", "gpt_neox.final_layer_norm.bias is one of the missing"), ("more", "odd.weight is one of the unexp")],
)
def test_tensors_must_be_those_of_the_architecture(engine: Engine, change: str, says: str) -> None:
    values, _, tensors = plain(*SERVED["gpt-neox"])
    if change == "missing":
        del tensors["gpt_neox.final_layer_norm.bias"]
    else:
        tensors["odd.weight"] = torch.zeros(4, 4)
    with pytest.raises(CheckpointError, match=says):
        serve(engine, ModelConfig.parse(values), tensors)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "auto_map"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling of type dynamic"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "rope_parameters of type longrope"),
        ({"num_hidden_layers": None}, "none of num_hidden_layers, "),
        ({"num_attention_heads": 0}, "num_attention_heads must be"),
        ({"architectures": ["NoSuchForCausalLM"]}, "NoSuchForCausalLM"),
        ({"architectures": ["GPTNeoXForSequenceClassification"]}, "is not served"),
        ({"model_type": "../../gpt_neox"}, "is not served"),
        ({"dtype": "int8"}, "dtype 'int8' is not served"),
    ],
)
def test_what_is_not_supported_is_a_load_error_that_names_it(keys: dict[str, Any], named: str) -> None:
    values = {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"} | COMMON | keys
    with pytest.raises(CheckpointError, match=named):
        ModelConfig.parse(values)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({}, r"which may know it, is not installed: in a clone .* '\.\[transformers\]'"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map"),  # it would be in vain
    ],
)
def test_without_transformers_it_is_named(monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], named: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else found(name))
    values = {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"} | COMMON | keys
    with pytest.raises(CheckpointError, match=named):
        ModelConfig.parse(values)


def test_sizes_are_known_before_any_byte() -> None:
    values, _, tensors = plain(*SERVED["gpt-bigcode"])
    tensors["transformer.h.0.attn.bias"] = torch.zeros(1, 1, 256, 256)  # of old checkpoints; no weight
    config = ModelConfig.parse(values)
    assert (config.kv_heads, config.head_dim, config.context) == (1, 16, 256)
    assert config.kv_block_bytes == 2 * 2 * BLOCK_TOKENS * 16 * 4
    needed = config.weight_bytes(entries_of(tensors))
    assert 0 <= needed - sum(t.nbytes for name, t in tensors.items() if not name.endswith("attn.bias")) < 256 * 40
    with pytest.raises(CheckpointError, match=r"wte.weight has dtype I8"):
        config.weight_bytes({"transformer.wte.weight": ("I8", (160, 64))})
