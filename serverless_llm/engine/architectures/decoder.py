"""What most decoders' config.json have in common, read with transformers' defaults."""

from __future__ import annotations

from collections.abc import Callable

from serverless_llm.engine.architectures.description import Activation, Description
from serverless_llm.engine.architectures.reader import MOST_PARTS, Reader
from serverless_llm.engine.architectures.rope import read_rope
from serverless_llm.errors import CheckpointError

ACTIVATIONS = {
    "silu": Activation.SILU, "swish": Activation.SILU, "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_new": Activation.GELU_TANH, "relu": Activation.RELU,
}  # fmt: skip


def read_decoder(
    read: Reader, architecture: str, *, eps: float = 1e-6, head_dim: int | None = None, theta: float = 10000.0,
    tied: bool = False, activation: str = "hidden_act", activates: str = "silu", partial: bool = False,
) -> Description:  # fmt: skip
    """A Llama by this config.json; the arguments are defaults of keys that are absent, and the activation's key.

    Raises:
        CheckpointError: names the key that is missing, malformed or not supported.
    """
    hidden, heads = read.size("hidden_size"), read.size("num_attention_heads")
    size = read.size("head_dim", head_dim or max(1, hidden // heads))
    layers = read_layers(read)
    return Description(
        architecture=architecture,
        vocab=read.size("vocab_size"),
        hidden=hidden,
        intermediate=read.size("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=read.size("num_key_value_heads", heads),
        head_dim=size,
        context=read.size("max_position_embeddings"),
        eps=read.number("rms_norm_eps", eps),
        embedding=hidden,
        score_scale=size**-0.5,
        windows=(0,) * layers,
        rope=read_rope(read, size, theta, partial=partial),
        tied=read.flag("tie_word_embeddings", tied),
        activation=read_activation(read, activation, activates),
    )


def read_layers(read: Reader) -> int:
    return read.size("num_hidden_layers", most=MOST_PARTS)


def read_activation(read: Reader, key: str, default: str) -> Activation:
    name = read.get(key) or default
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise CheckpointError(f"config.json: {key} {name!r} is not supported, only {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def read_windows(read: Reader, layers: int, window: int, slides: Callable[[int], bool]) -> tuple[int, ...]:
    """The window of each layer: `layer_types` where it is given says who has one, else `slides(layer)`."""
    kinds = read.get("layer_types")
    if kinds is None:
        return tuple(window if slides(number) else 0 for number in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise CheckpointError(f"config.json: layer_types must be a list of {layers}, one for each layer")
    sizes = {"full_attention": 0, "sliding_attention": window}
    for kind in kinds:
        if kind not in sizes or (kind == "sliding_attention" and not window):
            raise CheckpointError(f"config.json: layer_types {kind!r} is not supported with sliding_window {window}")
    return tuple(sizes[kind] for kind in kinds)


def switched_window(read: Reader) -> int:
    """`sliding_window` where `use_sliding_window` switches it on, else 0."""
    window = read.size_or_off("sliding_window", 4096)
    return window if read.flag("use_sliding_window") else 0


def same_windows(read: Reader, layers: int, window: int) -> tuple[int, ...]:
    """One window for all layers, for architectures that do not read `layer_types`: it may only say the same."""
    same = (window,) * layers
    if read_windows(read, layers, window, lambda _: bool(window)) != same:
        raise CheckpointError("config.json: layer_types is not supported where layers differ in this architecture")
    return same
