"""OPT: learned positions, LayerNorm, ReLU, biases."""

from __future__ import annotations

from serverless_llm.engine.architectures.decoder import read_activation, read_layers, same_windows
from serverless_llm.engine.architectures.description import Activation, Description, Names, Norm
from serverless_llm.engine.architectures.reader import Reader

POSITION_OFFSET = 2
NORM_EPS = 1e-5  # torch's default, which OPT's code leaves as it is
NAMES = Names(
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    last_norm="model.decoder.final_layer_norm",
    layer="model.decoder.layers.{}.",
    before_attention="self_attn_layer_norm",
    before_mlp="final_layer_norm",
    output="self_attn.out_proj",
    up=("fc1",),
    down="fc2",
)


def opt(read: Reader) -> Description:
    hidden, heads = read.size("hidden_size"), read.size("num_attention_heads")
    if hidden % heads:
        read.refuse("num_attention_heads", f"does not divide hidden_size {hidden}")
    if not read.flag("layer_norm_elementwise_affine", default=True):
        read.refuse("layer_norm_elementwise_affine")
    activation = read_activation(read, "activation_function", "relu")
    if activation is not Activation.RELU:
        read.refuse("activation_function")
    layers, bias = read_layers(read), read.flag("enable_bias", default=True)
    embedding = read.size("word_embed_proj_dim", hidden)
    return Description(
        architecture="OPTForCausalLM",
        vocab=read.size("vocab_size"),
        hidden=hidden,
        intermediate=read.size("ffn_dim"),
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        context=read.size("max_position_embeddings"),
        eps=NORM_EPS,
        embedding=embedding,
        score_scale=(hidden // heads) ** -0.5,
        windows=same_windows(read, layers, 0),
        rope=None,
        names=_names(read, projected=embedding != hidden),
        tied=read.flag("tie_word_embeddings", default=True),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        norm=Norm.LAYER,
        activation=activation,
        mlp_gated=False,
        position_offset=POSITION_OFFSET,
    )


def _names(read: Reader, projected: bool) -> Names:
    """Norms lie before what they belong to, or (OPT-350m) on the sum after it, and then there is none at the end."""
    names = NAMES
    before = read.flag("do_layer_norm_before", default=True)
    if not before:
        names = names._replace(
            before_attention=None, above_attention=names.before_attention, before_mlp=None, above_mlp=names.before_mlp
        )
    if not before or read.flag("_remove_final_layer_norm"):
        names = names._replace(last_norm=None)
    if projected:
        names = names._replace(inward="model.decoder.project_in", outward="model.decoder.project_out")
    return names
