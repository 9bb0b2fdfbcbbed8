"""Decoders that transformers computes, with our attention over paged KV, on our weights. An extra: `transformers`.

transformers lets an attention function and a mask function be registered by name. Ours stores the step's keys and
values in the arena and attends over each sequence's blocks, so that batches, chunks of prompts and several sequences
are as for native architectures; positions are given for each token. What a layer asks of attention (heads, scale, cap,
window) is learned from one token when the model is bound, and the whole is then compared with transformers' own
attention on a short text: an architecture whose mathematics does not pass through these two functions is refused.

Shape letters as in `engine.model`. In deterministic mode linear layers run on tiles, as native ones do; other products
that a module may hold, such as those of packed experts, are torch's own, so that the promise is that of its layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from serverless_llm.domain import BLOCK_TOKENS, Sampling
from serverless_llm.engine.arena import Arena
from serverless_llm.engine.blocks import SLAB_STEP
from serverless_llm.engine.config import ForeignConfig
from serverless_llm.engine.kv_groups import View
from serverless_llm.engine.layers import Tensors
from serverless_llm.engine.model import DTYPES, StepInput
from serverless_llm.engine.runner import run
from serverless_llm.engine.scheduler import Chunk
from serverless_llm.engine.sequence import Sequence
from serverless_llm.errors import CheckpointError
from serverless_llm.kernels.attention import Scores
from serverless_llm.kernels.linear import padded, tiled_linear

NAME = "serverless-llm"  # of our attention, to transformers
# Most that logits may differ from transformers' own, as a part of the greatest: an error of order is far over it, and
# the rounding of the dtype, with a choice of experts that it turns over, far under.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
LONG, SHORT, CUT = 23, 9, 10  # tokens of the two texts that are compared, and where the first is cut in two steps

Visible = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Mask(NamedTuple):
    """What transformers calls a mask, not worked out: which keys a query sees, as a function of their positions."""

    visible: Visible


class Call(NamedTuple):
    """What one layer asked of attention, for a single token."""

    layer: int
    kv_heads: int
    key_size: int
    value_size: int
    scores: Scores
    visible: Visible | None


class Pages:
    """One model's KV, as its attention modules see it. Refers to no module, so that it holds no weights."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.step: StepInput | None = None
        self.views: list[int] = []

    def use(self, arena: Arena, config: ForeignConfig) -> None:
        self._kv = arena.rows(DTYPES[config.dtype], 2, BLOCK_TOKENS, config.kv_heads, config.head_dim)
        self._tokens = self._kv.view(-1, config.kv_heads * config.head_dim)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """`q`: [1, A, T, D], `k`, `v`: [1, G, T, D]; returns [1, T, A, D]."""
        assert self.step is not None
        slots = self.step.slots[0] + 2 * BLOCK_TOKENS * layer
        for place, values in ((slots, k), (slots + BLOCK_TOKENS, v)):
            rows = values[0].transpose(0, 1).reshape(-1, self._tokens.shape[1])
            self._tokens.index_copy_(0, place, rows[: self.step.tokens])
        mixed = self.step.attend[self.views[layer]](q[0].transpose(0, 1).contiguous(), self._kv, layer)
        return mixed.view(1, q.shape[2], q.shape[1], q.shape[3])


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls for every layer of a model that is bound here."""
    pages: Pages = module.pages
    if pages.step is not None:
        return pages.attend(module.layer_idx, query, key, value), None
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else float(scaling), softcap or 0.0)
    visible = None if attention_mask is None else attention_mask.visible
    pages.calls.append(Call(module.layer_idx, key.shape[1], key.shape[3], value.shape[3], scores, visible))
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


def _mask(*_: Any, mask_function: Visible, **__: Any) -> Mask:
    return Mask(mask_function)


transformers.AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)


class Foreign:
    """One model of transformers bound to its weights and to the arena where its KV lies. As `engine.model.Model`.

    Raises:
        CheckpointError: transformers lacks or refuses it, needs other tensors or a copy of them, or its attention is
            not one that pages hold.
    """

    def __init__(self, config: ForeignConfig, tensors: Tensors, arena: Arena) -> None:
        self.config = config
        self._device = arena.bytes.device
        self.tiled = config.dtype == "float32" and self._device.type == "cpu"
        self._pages = Pages()
        try:
            with warnings.catch_warnings(action="ignore"), torch.inference_mode():
                self._module = _bound(config, tensors, self._device)
                for module in self._module.modules():
                    module.__dict__["pages"] = self._pages
                    if self.tiled:
                        _tile(module)
                self._learn()
                self._compare()
        except CheckpointError:
            raise
        except Exception as error:  # another project's code, which was not written for this
            why = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{config.architecture} does not run over paged KV: {why}") from error
        self._pages.use(arena, config)

    def _learn(self) -> None:
        self._call(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
        calls, config = self._pages.calls, self.config
        if [call.layer for call in calls] != list(range(config.layers)):
            raise self._refused(f"{config.layers} layers attend {len(calls)} times in all")
        for call in calls:
            if {call.key_size, call.value_size} != {config.head_dim} or call.kv_heads != config.kv_heads:
                shape = f"{call.kv_heads} KV heads of {call.key_size} and {call.value_size}"
                raise self._refused(f"{shape}, config.json means {config.kv_heads} of {config.head_dim}")
        if len({call.scores for call in calls}) > 1:
            raise self._refused("its layers weigh scores in different ways")
        windows = [self._window(call.visible) for call in calls]
        self.scores = calls[0].scores
        kinds = list(dict.fromkeys(windows))
        self.views = [View(0, window) for window in kinds]
        self._pages.views = [kinds.index(window) for window in windows]

    def _refused(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.config.architecture} does not run over paged KV: {why}")

    def _window(self, visible: Visible | None) -> int:
        """The tokens that a token sees, itself included; 0 for all before it."""
        context = self.config.context
        if visible is None:
            return 0
        key = torch.arange(context)
        seen = int(self._seen(visible, context - 1, key).sum())
        for query in {0, 1, seen - 1, seen, context // 2, context - 1} & set(range(context)):
            wanted = (key <= query) & (key > query - seen)
            if not torch.equal(self._seen(visible, query, key), wanted):
                raise self._refused("its tokens see others than a window of those before them")
        return seen if seen < context else 0

    def _seen(self, visible: Visible, query: int, key: torch.Tensor) -> torch.Tensor:
        zero = torch.tensor(0)
        return visible(zero, zero, torch.tensor(query), key).expand(len(key))

    def _compare(self) -> None:
        """Two texts, one in two steps and then beside the other, against transformers' own attention."""
        long, short = ([(7 * place + 3) % self.config.vocab for place in range(size)] for size in (LONG, SHORT))
        self._module.set_attn_implementation("eager")
        wanted = torch.cat([self._call(torch.tensor(text), torch.arange(len(text)))[-1:] for text in (long, short)])
        self._module.set_attn_implementation(NAME)
        found = self._paged(long, short)
        limit = TOLERANCE[self.config.dtype] * wanted.abs().max()
        if not (found - wanted).abs().max() <= limit:
            raise self._refused("its numbers are not those of transformers' own attention")

    def _paged(self, long: list[int], short: list[int]) -> torch.Tensor:
        block, each = self.config.kv_block_bytes, -(-LONG // BLOCK_TOKENS)
        self._pages.use(Arena(self._device, 2 * each * block + SLAB_STEP), self.config)
        first, second = (self._sequence(number, text) for number, text in enumerate((long, short)))
        for number, sequence in enumerate((first, second)):
            sequence.blocks = [(number * each + place) * block for place in range(each)]
        run(self, [Chunk(first, CUT)], self._device)
        first.cached = CUT
        return run(self, [Chunk(first, LONG - CUT), Chunk(second, SHORT)], self._device)

    def _sequence(self, number: int, tokens: list[int]) -> Sequence:
        return Sequence(
            number, 0, 0, number, tokens, len(tokens), self.config.context, Sampling(), self.config.kv_groups
        )

    def forward(self, step: StepInput) -> torch.Tensor:
        """As `engine.model.Model.forward`."""
        self._pages.step = step
        try:
            wanted = step.drawn if step.drawn.numel() else step.drawn.new_zeros(1)
            return self._call(step.ids, step.position, wanted)[: step.drawn.numel()]  # padded where the step is
        finally:
            self._pages.step = None

    @torch.inference_mode()
    def _call(self, ids: torch.Tensor, position: torch.Tensor, rows: torch.Tensor | int = 0) -> torch.Tensor:
        """float32 logits of these rows of T, of all where it is 0."""
        ids, position = (values.to(self._device)[None] for values in (ids, position))
        # With a mask of no padding, transformers does not take positions that begin anew for packed texts.
        whole = torch.ones_like(ids)
        out = self._module(
            input_ids=ids, position_ids=position, attention_mask=whole, use_cache=False, logits_to_keep=rows
        )
        logits: torch.Tensor = out.logits[0].float()
        return logits


def _tile(module: Any) -> None:
    """Lets a linear layer run on tiles, where their rows are known not to depend on one another."""
    if type(module) is torch.nn.Linear:
        weight_t = module.weight.t()
    elif type(module) is Conv1D:
        weight_t = module.weight
    else:
        return
    if weight_t.shape[0] % 4 == 0:
        module.forward = partial(_on_tiles, weight_t, module.bias)


def _on_tiles(weight_t: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    missing = padded(len(rows)) - len(rows)
    whole = torch.cat((rows, rows.new_zeros(missing, rows.shape[1]))) if missing else rows
    return tiled_linear(whole.contiguous(), weight_t, bias)[: len(rows)].view(*x.shape[:-1], -1)


def _bound(config: ForeignConfig, tensors: Tensors, device: torch.device) -> Any:
    """The module of transformers whose parameters are `tensors` themselves."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    kind = config.values["model_type"]
    # Which kernels run is for us to say, not for a checkpoint: such a key may name code to download.
    values = {key: value for key, value in config.values.items() if not key.endswith("_implementation")}
    settings = CONFIG_MAPPING[kind].from_dict(values)
    module, told = getattr(transformers, config.architecture).from_pretrained(
        None,
        config=settings,
        state_dict=dict(tensors),
        dtype=DTYPES[config.dtype],
        attn_implementation=NAME,
        output_loading_info=True,
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        for name in sorted(map(str, told[what])):
            raise CheckpointError(f"tensor {name} is one of the {what.replace('_', ' ')} of {config.architecture}")
    ours = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    for name, parameter in module.named_parameters():
        if parameter.untyped_storage().data_ptr() not in ours:
            raise CheckpointError(f"{config.architecture}: transformers wants a copy of {name}, which is not supported")
    for module_buffers in module.modules():
        for name, buffer in module_buffers.named_buffers(recurse=False):
            module_buffers._buffers[name] = buffer.to(device)
    return module.eval()
