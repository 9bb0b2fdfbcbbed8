"""Every decoder that transformers lists, tiny: is it served, and if so, with transformers' numbers?

`python -m tests.unit.engine.every` writes the table of docs/decoders.md.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from serverless_llm.domain import Sampling
from serverless_llm.engine.architectures import foreign
from serverless_llm.engine.architectures.registry import native
from serverless_llm.engine.config import ModelConfig
from serverless_llm.engine.engine import Engine
from serverless_llm.errors import CheckpointError
from tests.unit.engine.tiny import Tensors, oracle_logits, prompt, serve, start

PAGE = Path(__file__).parents[3] / "docs" / "decoders.md"
ROW = re.compile(r"\| `([\w-]+)` \| `(\w+)` \| (native|transformers|no) \| (.*?) *\|")
TOLD = Sampling(temperature=0.0, max_tokens=4, logprobs=20)
TOLERANCE = 2e-3  # of a log probability

SIZES: dict[str, Any] = {
    "vocab_size": 160, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "n_embed", "word_embed_proj_dim", "embedding_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim", "ffn_hidden_size", "dff"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(foreign.CONTEXT, 256),
    "head_dim": 16, "sliding_window": 20, "num_global_key_value_heads": 2,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "num_shared_experts"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "index_topk": 4, "index_n_heads": 2, "index_head_dim": 16,
}  # fmt: skip
LATENT = {"num_key_value_heads": 4, "head_dim": 8}
SPARSE = {"index_block_size": 4, "index_topk_blocks": 2, "index_n_heads": 2}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
NEAR = ROPE | {"original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.1}
# What shows its kind only otherwise: layers of each sort, thresholds that a short text passes.
KEYS: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 4, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), ROPE)},
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 160, "hidden_size_per_layer_input": 8},
    "gemma4_text": {"vocab_size_per_layer_input": 160, "hidden_size_per_layer_input": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "llama4_text": {"floor_scale": 8, "layer_types": ["full_attention"] * 2, "no_rope_layers": [0, 0]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minimax_m3_vl_text": {"layer_types": ["minimax_m3_sparse", "full_attention"]} | SPARSE,
    "ministral3": {"rope_parameters": NEAR},
    "roc_bert": {"pronunciation_vocab_size": 16, "shape_vocab_size": 16},
    "zamba": {"num_hidden_layers": 16},
    "zamba2": {"num_hidden_layers": 54},
    "zaya": {"num_experts_per_tok": 1},
}


class Outcome(NamedTuple):
    """`how`: `native`, `transformers` or `no`, and then `why`."""

    how: str
    why: str = ""


def every() -> tuple[tuple[str, str], ...]:
    """(model_type, architecture)"""
    import transformers

    return foreign.decoders(str(Path(transformers.__file__).parent))


def written() -> Iterator[tuple[str, str, Outcome]]:
    for kind, name, how, why in ROW.findall(PAGE.read_text(encoding="utf-8")):
        yield kind, name, Outcome(how, why)


def outcome(kind: str, name: str) -> Outcome:
    """Raises AssertionError where it is served with other numbers than transformers'."""
    values = values_of(kind, name)
    try:
        config = ModelConfig.parse(values)
    except CheckpointError as error:
        return Outcome("no", _short(error))
    own = native(values)
    if own is not None and own.model_type == kind:
        return Outcome("native")
    model, tensors = model_of(values)
    engine = Engine(budget=24 << 20)
    try:
        serve(engine, config, tensors)
    except CheckpointError as error:
        return Outcome("no", _short(error))
    assert_same(engine, model)
    return Outcome("transformers")


def values_of(kind: str, name: str) -> dict[str, Any]:
    """A config.json as transformers would write it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[kind]
    known = {field.name for field in dataclasses.fields(config_class)} | set(getattr(config_class, "attribute_map", {}))
    keys = {key: size for key, size in SIZES.items() if key in known}
    keys |= LATENT if "kv_lora_rank" in known else {}
    settings = config_class(**keys | KEYS.get(kind, {}))
    values: dict[str, Any] = json.loads(settings.to_json_string(use_diff=False))
    return values | {"architectures": [name], "model_type": kind, "dtype": "float32"}


def model_of(values: dict[str, Any]) -> tuple[Any, Tensors]:
    """transformers' model of random weights, and the tensors that its checkpoint would hold."""
    import transformers
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    decoded = transformers.PreTrainedConfig._decode_special_floats(dict(values))
    settings = CONFIG_MAPPING[values["model_type"]].from_dict(decoded)
    settings._attn_implementation = "eager"
    torch.manual_seed(5)
    model = getattr(transformers, values["architectures"][0])(settings).float().eval()
    for tensor in model.parameters():
        tensor.data += 0.3 * torch.randn_like(tensor) * max(1, tensor.shape[-1]) ** -0.5
    once = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    held = {name: tensor.clone() for name, tensor in model.state_dict().items() if name in once}
    stored = revert_weight_conversion(model, held)
    return model, {name: tensor.contiguous() for name, tensor in stored.items()}


def assert_same(engine: Engine, model: Any) -> None:
    """Two sequences at once, one of them longer than any window here."""
    prompts = {1: prompt(45, 1), 2: prompt(7, 2)}
    for number, tokens in prompts.items():
        engine.add(start(number, tokens, TOLD))
    while engine.runnable:
        for number, (told,) in engine.step().likelihoods.items():
            row = oracle_logits(model, prompts[number])[-1].log_softmax(-1)
            found = torch.tensor(told.logprobs)
            assert (found - row.topk(len(found)).values).abs().max() < TOLERANCE, "other numbers"
            assert (found - row[told.tokens]).abs().max() < TOLERANCE, "other tokens"
            prompts[number].append(told.tokens[0])


def _short(error: CheckpointError) -> str:
    """Without what it says of this one config."""
    text = str(error).removeprefix("config.json: ").replace("\n", " ")
    text = re.sub(r"^\w+ does not run over paged KV: ", "", text)
    return re.split(r" \(|, only|, which paged", text)[0]


def main() -> None:
    torch.set_num_threads(1)
    only = set(sys.argv[1:])
    for kind, name in sorted(every()):
        if not only or kind in only:
            with warnings.catch_warnings(action="ignore"):
                how, why = outcome(kind, name)
            print(f"| `{kind}` | `{name}` | {how} | {why} |", flush=True)


if __name__ == "__main__":
    main()
