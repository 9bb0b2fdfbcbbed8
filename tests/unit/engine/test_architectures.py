"""What each native architecture reads of config.json, and that it overlooks no key."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from serverless_llm.engine.architectures.description import Activation
from serverless_llm.engine.architectures.reader import Reader
from serverless_llm.engine.architectures.registry import FOREIGN, NATIVE, Architecture, native
from serverless_llm.engine.config import ModelConfig
from serverless_llm.errors import CheckpointError
from serverless_llm.kernels.rope import frequencies
from serverless_llm.kernels.rope_kinds import Rope
from tests.unit.engine.tiny import LONGROPE, YARN, config_json, entries_of, tensors_of

PHI3, GEMMA2, GEMMA3 = "Phi3ForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"
OPT, MIXTRAL, MOE = "OPTForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM"

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("MistralForCausalLM", {"sliding_window": -1}, "sliding_window"),
    ("MistralForCausalLM", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
    (MIXTRAL, {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
    ("MistralForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("Qwen2ForCausalLM", {"use_mrope": True}, "use_mrope"),
    ("Qwen2ForCausalLM", {"use_sliding_window": 1}, "use_sliding_window"),
    ("Qwen2ForCausalLM", {"layer_types": ["chunked_attention"] * 2}, "layer_types"),
    ("Qwen2ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types"),
    ("Qwen2ForCausalLM", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("Qwen3ForCausalLM", {"max_window_layers": -1}, "max_window_layers"),
    (PHI3, {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Phi3ForCausalLM"}}, "auto_map"),
    (PHI3, {"partial_rotary_factor": 0.2}, "partial_rotary_factor"),
    (PHI3, {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
    (PHI3, {"rope_scaling": LONGROPE | {"short_factor": [1.0]}}, "short_factor"),
    (PHI3, {"rope_scaling": LONGROPE | {"long_factor": None}}, "long_factor"),
    (PHI3, {"rope_scaling": LONGROPE | {"long_factor": [1, 2, 3, 4, 5, 6, 7, "8"]}}, "long_factor"),
    (PHI3, {"original_max_position_embeddings": "4k"}, "original_max_position_embeddings"),
    ("Olmo2ForCausalLM", {"sliding_window": 64}, "sliding_window"),
    ("Olmo2ForCausalLM", {"clip_qkv": 8.0}, "clip_qkv"),
    (GEMMA2, {"hidden_activation": "gelu"}, "hidden_activation"),
    (GEMMA2, {"attn_logit_softcapping": 0}, "attn_logit_softcapping"),
    (GEMMA2, {"final_logit_softcapping": "30"}, "final_logit_softcapping"),
    (GEMMA2, {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar"),
    (GEMMA2, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    (GEMMA3, {"sliding_window_pattern": 0}, "sliding_window_pattern"),
    (GEMMA3, {"rope_local_base_freq": 0}, "rope_local_base_freq"),
    (GEMMA3, {"rope_scaling": LONGROPE}, "longrope"),
    (GEMMA3, {"rope_parameters": {"full_attention": {"rope_type": "new"}}}, "rope_type"),
    (GEMMA3, {"rope_parameters": {"full_attention": "default"}}, "full_attention"),
    (GEMMA3, {"rope_parameters": {"full_attention": {}, "global": {}}}, "rope key 'full_attention'"),
    (GEMMA3, {"num_kv_shared_layers": 10}, "num_kv_shared_layers"),
    (OPT, {"activation_function": "gelu"}, "activation_function"),
    (OPT, {"activation_function": "gelu_new"}, "activation_function"),
    (OPT, {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
    (OPT, {"num_attention_heads": 5}, "num_attention_heads"),
    (OPT, {"word_embed_proj_dim": 30}, "word_embed_proj_dim"),
    (OPT, {"do_layer_norm_before": "yes"}, "do_layer_norm_before"),
    (MIXTRAL, {"num_experts_per_tok": 6}, "num_experts_per_tok"),
    (MIXTRAL, {"num_local_experts": 1 << 20}, "num_local_experts"),
    (MOE, {"moe_intermediate_size": 30}, "moe_intermediate_size"),
    (MOE, {"mlp_only_layers": [0.5]}, "mlp_only_layers"),
    (MOE, {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
    ("LlamaForCausalLM", {"rope_scaling": YARN | {"attn_factor": 2.0}}, "attn_factor"),
    ("LlamaForCausalLM", {"rope_scaling": {"type": "dynamic"}}, "factor"),
    ("LlamaForCausalLM", {"model_type": "mllama"}, "model_type"),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "keys", "named"), REFUSED)
def test_refusals_name_the_key(architecture: str, keys: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        ModelConfig.parse(config_json(architecture, **keys))


@pytest.mark.parametrize("architecture", NATIVE, ids=lambda one: one.name)
def test_a_key_that_changes_the_mathematics_is_read_or_refused(architecture: Architecture) -> None:
    read = Reader(config_json(architecture.name))
    architecture.read(read)
    for key in sorted(set(FOREIGN) - read.used):
        with pytest.raises(CheckpointError, match=key):
            ModelConfig.parse(config_json(architecture.name, **{key: 7}))


# Without these there is nothing to compare; where transformers has a number of KV heads for want of one, shapes tell.
REQUIRED = {
    "vocab_size", "hidden_size", "intermediate_size", "ffn_dim", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "num_experts_per_tok", "max_position_embeddings", "architectures", "model_type",
}  # fmt: skip
# Fields of transformers' config classes that inference on text does not depend on.
INERT = {
    "attention_dropout", "bos_token_id", "dropout", "embd_pdrop", "eos_token_id", "initializer_range", "init_std",
    "layerdrop", "output_router_logits", "pad_token_id", "pretraining_tp", "resid_pdrop", "router_aux_loss_coef",
    "router_jitter_noise", "use_cache", "init_device", "head_dim", "rope_theta",
}  # fmt: skip


@pytest.mark.parametrize("architecture", NATIVE, ids=lambda one: one.name)
def test_an_absent_key_means_what_it_means_to_transformers(architecture: Architecture) -> None:
    transformers = pytest.importorskip("transformers")
    config_class = getattr(transformers, architecture.name).config_class
    whole = config_json(architecture.name)
    read = Reader(whole)
    architecture.read(read)
    for key in sorted(read.used & set(whole) - REQUIRED):
        raw = {other: value for other, value in whole.items() if other != key}
        filled = json.loads(config_class(**raw).to_json_string(use_diff=False))
        assert ModelConfig.parse(filled | {"architectures": [architecture.name]}) == ModelConfig.parse(raw), key


@pytest.mark.parametrize("architecture", NATIVE, ids=lambda one: one.name)
def test_no_field_of_transformers_config_is_overlooked(architecture: Architecture) -> None:
    """Each is read, named as foreign, or known to be without meaning here: a new one fails until someone judged it."""
    transformers = pytest.importorskip("transformers")
    config_class = getattr(transformers, architecture.name).config_class
    generic = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    read = Reader(config_json(architecture.name))
    architecture.read(read)
    known = read.used | set(FOREIGN) | INERT | generic | {"vocab_size"}
    assert {field.name for field in dataclasses.fields(config_class)} - known == set()


def test_the_registry_maps_names_and_types() -> None:
    for one in NATIVE:
        assert native({"architectures": [one.name]}) is one
        assert native({"model_type": one.model_type}) is one
        assert native({"architectures": [one.name], "model_type": one.model_type}) is one
    unknowns: list[dict[str, Any]] = [
        {}, {"architectures": []}, {"architectures": "LlamaForCausalLM"}, {"model_type": "gpt2"},
        {"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"},
    ]  # fmt: skip
    for unknown in unknowns:
        assert native(unknown) is None


@pytest.mark.parametrize(
    ("architecture", "keys", "windows"),
    [
        ("MistralForCausalLM", {"sliding_window": 9}, (9, 9)),
        ("Qwen2ForCausalLM", {"sliding_window": 9}, (0, 0)),
        ("Qwen2ForCausalLM", {"sliding_window": 9, "use_sliding_window": True}, (0, 0)),
        ("Qwen2ForCausalLM", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 0}, (9, 9)),
        ("Qwen3ForCausalLM", {"use_sliding_window": True, "max_window_layers": 1}, (0, 4096)),
        (MOE, {"sliding_window": 9, "use_sliding_window": True}, (9, 9)),
        (GEMMA2, {"sliding_window": 9, "num_hidden_layers": 3}, (9, 0, 9)),
        (GEMMA2, {"sliding_window": 9, "layer_types": ["full_attention", "sliding_attention"]}, (0, 9)),
        (GEMMA3, {"sliding_window": 9, "sliding_window_pattern": None, "num_hidden_layers": 7}, (9,) * 5 + (0, 9)),
        (OPT, {}, (0, 0)),
    ],
)
def test_windows(architecture: str, keys: dict[str, Any], windows: tuple[int, ...]) -> None:
    assert ModelConfig.parse(config_json(architecture, **keys)).windows == windows


def test_defaults_that_differ_between_architectures() -> None:
    absent = {"rms_norm_eps": None, "rope_theta": None, "tie_word_embeddings": None, "head_dim": None}
    told = {one.name: ModelConfig.parse(config_json(one.name, **absent)) for one in NATIVE}
    assert {name for name, config in told.items() if config.eps == 1e-5} == {PHI3, "Olmo2ForCausalLM", OPT, MIXTRAL}
    assert {name for name, config in told.items() if config.tied} == {GEMMA2, GEMMA3, OPT}
    assert {name for name, config in told.items() if config.rope == Rope(1e6, config.head_dim)} == {MIXTRAL, GEMMA3}
    sizes = {name: config.head_dim for name, config in told.items() if config.head_dim != 16}
    assert sizes == {"Qwen3ForCausalLM": 128, GEMMA2: 256, GEMMA3: 256}
    assert {name for name, config in told.items() if config.activation is Activation.GELU_TANH} == {GEMMA2, GEMMA3}


def test_the_copy_of_its_code_that_phi3_carries_is_not_foreign() -> None:
    own = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    assert ModelConfig.parse(config_json(PHI3, auto_map=own)) == ModelConfig.parse(config_json(PHI3))


@pytest.mark.parametrize(
    ("table", "scaling"),
    [
        (YARN, 1.1386294361119891),
        (YARN | {"attention_factor": 2.0}, 2.0),
        (YARN | {"factor": None, "original_max_position_embeddings": 512}, 1.0),
        (YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
    ],
)
def test_yarn_scales_cosine_and_sine(table: dict[str, Any], scaling: float) -> None:
    rope = ModelConfig.parse(config_json(rope_scaling=table)).rope
    assert rope
    assert rope.scaling == pytest.approx(scaling)


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_the_first_phi3_called_longrope_otherwise(kind: str, key: str) -> None:
    """As transformers reads it, which also has its own original context."""
    transformers = pytest.importorskip("transformers")
    table = LONGROPE | {"original_max_position_embeddings": 4096, "rope_type": kind}
    table[key] = table.pop("rope_type")
    raw = config_json(PHI3, rope_scaling=table, max_position_embeddings=8192)
    read = ModelConfig.parse(raw).rope
    assert read
    assert (read.kind, read.factor, read.original_context) == ("longrope", 2.0, 4096)
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**json.loads(json.dumps(raw))))
    rotary = model.model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq, frequencies(read)[0])
    assert rotary.attention_scaling == pytest.approx(read.scaling)


def test_dynamic_scaling_begins_beyond_the_context() -> None:
    dynamic = {"rope_type": "dynamic", "factor": 4.0}
    assert ModelConfig.parse(config_json(rope_scaling=dynamic)) == ModelConfig.parse(config_json())


def test_more_experts_than_tensors_are_refused_before_anything_is_built_for_them() -> None:
    config = ModelConfig.parse(config_json(MIXTRAL, num_local_experts=9999))
    with pytest.raises(CheckpointError, match="9999 experts, but 2 tensors"):
        config.weight_bytes({"a": ("F32", (1,)), "b": ("F32", (1,))})


@pytest.mark.parametrize(
    ("architecture", "tensor"),
    [
        ("Qwen2ForCausalLM", "model.layers.1.self_attn.k_proj.bias"),
        (PHI3, "model.layers.0.self_attn.qkv_proj.weight"),
        (PHI3, "model.layers.0.mlp.gate_up_proj.weight"),
        ("Olmo2ForCausalLM", "model.layers.1.post_feedforward_layernorm.weight"),
        ("Olmo2ForCausalLM", "model.layers.1.self_attn.k_norm.weight"),
        (GEMMA2, "model.layers.0.pre_feedforward_layernorm.weight"),
        (GEMMA3, "model.layers.3.self_attn.q_norm.weight"),
        (OPT, "model.decoder.embed_positions.weight"),
        (OPT, "model.decoder.layers.1.final_layer_norm.bias"),
        (MIXTRAL, "model.layers.1.block_sparse_moe.experts.4.w3.weight"),
        (MOE, "model.layers.0.mlp.gate.weight"),
    ],
)
def test_a_missing_or_misshaped_tensor_is_named(architecture: str, tensor: str) -> None:
    config = ModelConfig.parse(config_json(architecture))
    entries = dict(entries_of(tensors_of(config)))
    dtype, shape = entries.pop(tensor)
    with pytest.raises(CheckpointError, match=rf"{tensor} is missing"):
        config.check(entries)
    with pytest.raises(CheckpointError, match=rf"{tensor} has shape"):
        config.check(entries | {tensor: (dtype, (*shape[:-1], shape[-1] + 4))})
