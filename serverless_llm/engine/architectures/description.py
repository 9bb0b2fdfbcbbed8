"""What tells one decoder from another: sizes, norms, biases, activation, caps, windows, names of tensors. As values.

The defaults are Llama's; an architecture says only what differs. Shapes are those of the checkpoint: a product is
[out, in].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from serverless_llm.kernels.rope_kinds import Rope

Shape = tuple[int, ...]


class Norm(StrEnum):
    RMS = "rms"  # rounded to the served dtype, then times the weight
    WIDE = "wide"  # times the weight, then rounded
    ONE_PLUS = "one plus"  # times 1 + the weight, then rounded
    LAYER = "layer"  # with mean and bias


class QueryNorm(StrEnum):
    NONE = "none"
    HEAD = "head"  # over each head of queries and keys
    WHOLE = "whole"  # over all heads at once


class Activation(StrEnum):
    SILU = "silu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"


class Names(NamedTuple):
    """Names of tensors, without `.weight`; those of a layer without the layer's prefix. None: there is no such."""

    embedding: str = "model.embed_tokens"
    positions: str | None = None
    inward: str | None = None  # from the embedding's width to the model's
    outward: str | None = None  # and back, before the head
    last_norm: str | None = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{}."
    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None  # on what attention adds
    above_attention: str | None = None  # on the sum
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    above_mlp: str | None = None
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # or one fused tensor
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    output: str = "self_attn.o_proj"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")  # gate and up, one tensor of both, or up alone
    down: str = "mlp.down_proj"
    router: str = ""
    expert_up: tuple[str, ...] = ()  # with the expert's number in place of {}
    expert_down: str = ""


LLAMA = Names()


class Product(NamedTuple):
    """Weights [rows[n], columns] that one input is multiplied with; a device holds their rows next to each other."""

    names: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int
    bias: bool = False

    def tensors(self) -> Iterator[tuple[str, Shape]]:
        for name, rows in zip(self.names, self.rows, strict=True):
            yield f"{name}.weight", (rows, self.columns)
            if self.bias:
                yield f"{name}.bias", (rows,)

    def groups(self) -> Iterator[tuple[str, ...]]:
        """Tensors whose rows are next to each other."""
        yield tuple(f"{name}.weight" for name in self.names)
        if self.bias:
            yield tuple(f"{name}.bias" for name in self.names)


class Mlp(NamedTuple):
    up: Product
    down: Product


class LayerNames(NamedTuple):
    """Full names of one layer's tensors. `mlps`: one, or all experts, and then `router` is there."""

    before_attention: str | None
    after_attention: str | None
    above_attention: str | None
    before_mlp: str | None
    after_mlp: str | None
    above_mlp: str | None
    query_norm: str
    key_norm: str
    qkv: Product
    output: Product
    router: Product | None
    mlps: tuple[Mlp, ...]

    def products(self) -> Iterator[Product]:
        yield self.qkv
        yield self.output
        if self.router:
            yield self.router
        for mlp in self.mlps:
            yield from mlp

    def norms(self) -> tuple[str | None, ...]:
        """Those of the residual stream."""
        return (
            self.before_attention, self.after_attention, self.above_attention,
            self.before_mlp, self.after_mlp, self.above_mlp,
        )  # fmt: skip


class Experts(NamedTuple):
    """A mixture of MLPs in place of one. `dense`: layers that have one MLP all the same."""

    total: int
    each: int  # used for a token
    intermediate: int
    normalised: bool  # the weights of a token's experts are scaled to a sum of 1
    dense: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """The mathematics of one model.

    Attributes:
        intermediate: width of an MLP that is not an expert.
        context: most tokens of a sequence.
        windows: of each layer, tokens that a token sees, itself included; 0 for all.
        rope: None where positions are learned.
        local_rope: of layers with a window, where it is not `rope`.
        position_offset: rows of the table of learned positions before that of the first token.
        score_scale: of the product of query and key.
        score_cap, logit_cap: c, where x becomes c * tanh(x / c); 0 for none.
        embedding: width of a token's embedding.
        mlp_gated: the activation's value is multiplied with a second product.
    """

    architecture: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    eps: float
    embedding: int
    score_scale: float
    windows: tuple[int, ...]
    rope: Rope | None
    local_rope: Rope | None = None
    names: Names = LLAMA
    tied: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    norm: Norm = Norm.RMS
    query_norm: QueryNorm = QueryNorm.NONE
    activation: Activation = Activation.SILU
    mlp_gated: bool = True
    score_cap: float = 0.0
    logit_cap: float = 0.0
    embedding_scale: float = 1.0
    position_offset: int = 0
    experts: Experts | None = None

    @property
    def rope_switch(self) -> int:
        """Tokens of a sequence beyond which all its keys are turned by other frequencies; 0: they never are."""
        return self.rope.original_context if self.rope and self.rope.regimes > 1 else 0

    def layer(self, number: int) -> LayerNames:
        """What layer `number` consists of."""
        return self._layer(self.names.layer.format(number), self.sparse(number))

    def _layer(self, prefix: str, sparse: bool) -> LayerNames:
        names = self.names
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        rows = (query, key, key) if len(names.qkv) == 3 else (query + 2 * key,)

        def full(name: str | None) -> str | None:
            return None if name is None else prefix + name

        return LayerNames(
            before_attention=full(names.before_attention),
            after_attention=full(names.after_attention),
            above_attention=full(names.above_attention),
            before_mlp=full(names.before_mlp),
            after_mlp=full(names.after_mlp),
            above_mlp=full(names.above_mlp),
            query_norm=prefix + names.query_norm,
            key_norm=prefix + names.key_norm,
            qkv=Product(tuple(prefix + name for name in names.qkv), rows, self.hidden, self.qkv_bias),
            output=Product((prefix + names.output,), (self.hidden,), query, self.output_bias),
            router=self._router(prefix) if sparse else None,
            mlps=tuple(self._experts(prefix)) if sparse else (self._mlp(prefix),),
        )

    def sparse(self, number: int) -> bool:
        """Whether a layer has experts."""
        return self.experts is not None and number not in self.experts.dense

    def _router(self, prefix: str) -> Product:
        assert self.experts
        return Product((prefix + self.names.router,), (self.experts.total,), self.hidden)

    def _experts(self, prefix: str) -> Iterator[Mlp]:
        assert self.experts
        for number in range(self.experts.total):
            up = tuple(prefix + name.format(number) for name in self.names.expert_up)
            down = prefix + self.names.expert_down.format(number)
            yield self._pair(up, down, self.experts.intermediate)

    def _mlp(self, prefix: str) -> Mlp:
        return self._pair(tuple(prefix + name for name in self.names.up), prefix + self.names.down, self.intermediate)

    def _pair(self, up: tuple[str, ...], down: str, width: int) -> Mlp:
        whole = width * (2 if self.mlp_gated else 1)
        rows = (whole // len(up),) * len(up)
        return Mlp(
            Product(up, rows, self.hidden, self.mlp_bias), Product((down,), (self.hidden,), width, self.mlp_bias)
        )

    def tensors(self) -> dict[str, Shape]:
        """Every tensor that a checkpoint must hold, with its shape."""
        shapes = dict(self._first())
        kinds = {sparse: list(self._layer_tensors(self._layer("", sparse))) for sparse in self._kinds()}
        for number in range(self.layers):
            prefix = self.names.layer.format(number)
            for name, shape in kinds[self.sparse(number)]:
                shapes[prefix + name] = shape
        shapes.update(self._last())
        return shapes

    def groups(self) -> Iterator[tuple[str, ...]]:
        """Every tensor once, those together whose rows a device holds next to each other."""
        yield from ((name,) for name, _ in self._first())
        kinds = {sparse: list(self._layer_groups(self._layer("", sparse))) for sparse in self._kinds()}
        for number in range(self.layers):
            prefix = self.names.layer.format(number)
            for group in kinds[self.sparse(number)]:
                yield tuple([prefix + name for name in group])
        yield from ((name,) for name, _ in self._last())

    def _kinds(self) -> set[bool]:
        """Whether there are layers without experts, and with."""
        return {self.sparse(number) for number in range(self.layers)}

    def _first(self) -> Iterator[tuple[str, Shape]]:
        names = self.names
        yield f"{names.embedding}.weight", (self.vocab, self.embedding)
        if names.positions:
            yield f"{names.positions}.weight", (self.context + self.position_offset, self.hidden)
        if names.inward:
            yield f"{names.inward}.weight", (self.hidden, self.embedding)

    def _last(self) -> Iterator[tuple[str, Shape]]:
        names = self.names
        if names.last_norm:
            yield from self._norm(names.last_norm, self.hidden)
        if names.outward:
            yield f"{names.outward}.weight", (self.embedding, self.hidden)
        if not self.tied:
            yield f"{names.head}.weight", (self.vocab, self.embedding)

    def _layer_groups(self, layer: LayerNames) -> Iterator[tuple[str, ...]]:
        products = {name: group for product in layer.products() for group in product.groups() for name in group}
        for name, _ in self._layer_tensors(layer):
            group = products.get(name, (name,))
            if group[0] == name:
                yield group

    def _layer_tensors(self, layer: LayerNames) -> Iterator[tuple[str, Shape]]:
        for product in layer.products():
            yield from product.tensors()
        for name in filter(None, layer.norms()):
            yield from self._norm(name, self.hidden)
        if self.query_norm is not QueryNorm.NONE:
            whole = self.query_norm is QueryNorm.WHOLE
            yield f"{layer.query_norm}.weight", (self.head_dim * (self.heads if whole else 1),)
            yield f"{layer.key_norm}.weight", (self.head_dim * (self.kv_heads if whole else 1),)

    def _norm(self, name: str, size: int) -> Iterator[tuple[str, Shape]]:
        yield f"{name}.weight", (size,)
        if self.norm is Norm.LAYER:
            yield f"{name}.bias", (size,)
