"""What a config.json may say, and what the engine knows from it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from serverless_llm.domain import Footprint
from serverless_llm.engine.config import ALIGNMENT, ModelConfig
from serverless_llm.errors import CheckpointError
from serverless_llm.kernels.rope_kinds import Rope
from tests.unit.engine.tiny import LLAMA3_ROPE, VARIANTS, config_json, entries_of, tensors_of


def test_no_torch() -> None:
    code = "import sys, serverless_llm.engine.config; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architectures"),
        ({"architectures": None, "model_type": None}, "architectures"),
        ({"architectures": ["LlamaForCausalLM", "Qwen3ForCausalLM"]}, "architectures"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": 5}, "layer_types"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, "proportional"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 66}, "hidden_size"),
        ({"head_dim": 15}, "head_dim"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"vocab_size": "160"}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"dtype": "int8"}, "dtype"),
        ({"attention_multiplier": 0.1}, "attention_multiplier"),
        ({"is_causal": False}, "is_causal"),
    ],
)
def test_refusals_name_the_key(keys: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        ModelConfig.parse(config_json(**keys))


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(CheckpointError, match="int4"):
        ModelConfig.parse(config_json(), "int4")


@pytest.mark.parametrize(
    "keys",
    [
        {"sliding_window": 128, "use_sliding_window": False},
        {"sliding_window": None},
        {"layer_types": ["full_attention"] * 2},
        {"quantization_config": None},
        {"rope_scaling": None},
        {"hidden_act": "swish"},
        {"partial_rotary_factor": 1.0},
    ],
)
def test_harmless_keys(keys: dict[str, Any]) -> None:
    assert ModelConfig.parse(config_json(**keys)) == ModelConfig.parse(config_json())


def test_qwen3_does_not_use_the_window_that_it_names() -> None:
    assert ModelConfig.parse(config_json("Qwen3ForCausalLM", sliding_window=64)).windows == (0, 0)


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({}, Rope(10000.0, 16)),
        ({"rope_theta": 5e5}, Rope(5e5, 16)),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, Rope(1e6, 16)),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, Rope(10000.0, 16, "linear", 4.0)),
        ({"rope_scaling": LLAMA3_ROPE}, Rope(10000.0, 16, "llama3", 8.0, 64, 1.0, 4.0)),
        (
            {"rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if not k.startswith("original")}},
            Rope(10000.0, 16, "llama3", 8.0, 512, 1.0, 4.0),
        ),
    ],
)
def test_both_spellings_of_rope(keys: dict[str, Any], rope: Rope) -> None:
    assert ModelConfig.parse(config_json(**keys)).rope == rope


@pytest.mark.parametrize(
    ("stored", "asked", "served"),
    [
        ({"dtype": "bfloat16"}, "auto", "bfloat16"),
        ({"dtype": None, "torch_dtype": "float16"}, "auto", "bfloat16"),
        ({"dtype": "torch.float32"}, "auto", "float32"),
        ({"dtype": None}, "auto", "float32"),
        ({"dtype": "bfloat16"}, "float32", "float32"),
    ],
)
def test_served_dtype(stored: dict[str, Any], asked: str, served: str) -> None:
    assert ModelConfig.parse(config_json(**stored), asked).dtype == served


def test_defaults_of_absent_keys() -> None:
    raw = config_json()
    for key in ("head_dim", "num_key_value_heads", "rms_norm_eps", "rope_theta", "hidden_act"):
        del raw[key]
    config = ModelConfig.parse(raw)
    assert (config.head_dim, config.kv_heads, config.eps, config.rope) == (16, 4, 1e-6, Rope(10000.0, 16))


def test_footprint() -> None:
    config = ModelConfig.parse(config_json())
    assert config.kv_block_bytes == 2 * 2 * 16 * 2 * 16 * 4
    assert ModelConfig.parse(config_json(), "bfloat16").kv_block_bytes == config.kv_block_bytes // 2
    weights = sum(tensor.nbytes for tensor in tensors_of(config).values())
    assert weights <= config.weight_bytes() < weights + ALIGNMENT * len(config.tensors())


@pytest.mark.parametrize("name", VARIANTS)
def test_buffers_hold_every_tensor_once(name: str) -> None:
    config = ModelConfig.parse(VARIANTS[name])
    held = [tensor for buffer in config.buffers() for tensor in buffer.tensors]
    assert sorted(held) == sorted(config.tensors())
    fused = [buffer.tensors for buffer in config.buffers() if len(buffer.tensors) == 3]
    assert all(["q_proj" in q and "k_proj" in k and "v_proj" in v for q, k, v in fused])
    assert len(fused) == (0 if name.startswith("phi3") else config.layers * (2 if config.qkv_bias else 1))


def test_a_checkpoint_that_is_not_what_its_config_says() -> None:
    config = ModelConfig.parse(config_json())
    entries = dict(entries_of(tensors_of(config)))
    name = "model.layers.1.self_attn.k_proj.weight"
    bad: list[tuple[Any, str]] = [
        (None, "missing"),
        (("F32", (64, 32)), r"shape \(64, 32\), config.json means \(32, 64\)"),
        (("I8", (32, 64)), "dtype I8"),
    ]
    for entry, why in bad:
        changed = {key: value for key, value in entries.items() if key != name} | ({name: entry} if entry else {})
        with pytest.raises(CheckpointError, match=rf"{name}.*{why}"):
            config.check(changed)
    with pytest.raises(CheckpointError, match=r"layers\.2"):
        config.check(entries | {"model.layers.2.mlp.up_proj.weight": ("F32", (96, 64))})
    config.check(entries | {"model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (8,))})


@pytest.mark.parametrize("value", [0, -1, 10**12, True, 1.5, "64"])
def test_a_size_that_cannot_be_is_told_with_what_can(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"max_position_embeddings must be an integer from 1 to 2147483647, not "):
        ModelConfig.parse(config_json(max_position_embeddings=value))


def test_more_layers_than_tensors_are_refused_before_anything_is_built_for_them() -> None:
    with pytest.raises(CheckpointError, match="num_hidden_layers must be an integer from 1 to 9999"):
        ModelConfig.parse(config_json(num_hidden_layers=2**31 - 1))
    config = ModelConfig.parse(config_json(num_hidden_layers=9999))
    with pytest.raises(CheckpointError, match="num_hidden_layers 9999, but 1 tensors"):
        config.weight_bytes({"lm_head.weight": ("F32", (160, 64))})


def test_a_tied_checkpoint_that_stores_its_head_needs_room_for_it() -> None:
    config = ModelConfig.parse(config_json(tie_word_embeddings=True))
    entries = entries_of(tensors_of(config))
    assert config.bound(entries).tied
    whole = {**entries, "lm_head.weight": ("F32", (160, 64))}
    assert not config.bound(whole).tied
    assert config.weight_bytes(whole) - config.weight_bytes(entries) == 160 * 64 * 4
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape"):
        config.bound({**entries, "lm_head.weight": ("F32", (161, 64))})


def test_placement_counts_the_kv_that_the_engine_takes() -> None:
    """A window of 24 tokens in one layer of three: that layer holds three blocks at most."""
    keys = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "num_hidden_layers": 3}
    for raw in (
        config_json("Gemma2ForCausalLM", sliding_window=24, **keys),
        config_json("MistralForCausalLM", sliding_window=24),
        config_json(),
    ):
        model = ModelConfig.parse(raw)
        groups = model.kv_groups
        needs = Footprint("sha", 1, 1, model.kv_column_bytes, 512, groups.sliding * model.kv_block_bytes, groups.kept)
        for tokens in (0, 1, 16, 17, 48, 49, 500):
            assert needs.kv_bytes(tokens) == groups.live(tokens) * model.kv_block_bytes
        for blocks in range(groups.live(1000) + 2):
            held = [tokens for tokens in (*range(0, 1000, 16), 1000) if groups.live(tokens) <= blocks]
            assert groups.longest(blocks, 1000) == max(held)
