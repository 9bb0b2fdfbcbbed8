"""Decoders that transformers computes, with our attention over paged KV, on our weights. An extra: `transformers`.

transformers lets an attention function and a mask function be registered by name. Ours stores the step's keys and
values in the arena and attends over each sequence's blocks, so that batches, chunks of prompts and several sequences
are as for native architectures; positions are given for each token. What a layer asks of attention (heads, scale, cap,
window) is learned from one token when the model is bound, and two texts are then compared with what transformers makes
of them by itself: an architecture whose mathematics does not pass through these two functions is refused. What two
short texts could not show is looked at beforehand: that nothing but attention carries anything from one token to
another, that the position of a token says all of its place, which keys a mask hides over the whole context, and what
else attention is given.

Shape letters as in `engine.model`. In deterministic mode linear layers run on tiles, as native ones do; other products
that a module may hold, such as those of packed experts, are torch's own, so that the promise is that of its layers.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from transformers.masking_utils import AttentionMaskInterface

from serverless_llm.domain import BLOCK_TOKENS, Sampling
from serverless_llm.engine.arena import Arena
from serverless_llm.engine.blocks import SLAB_STEP
from serverless_llm.engine.config import ForeignConfig
from serverless_llm.engine.foreign_module import bound, tile
from serverless_llm.engine.kv_groups import View
from serverless_llm.engine.layers import Tensors
from serverless_llm.engine.model import DTYPES, StepInput
from serverless_llm.engine.runner import run
from serverless_llm.engine.scheduler import Chunk
from serverless_llm.engine.sequence import Sequence
from serverless_llm.errors import CheckpointError
from serverless_llm.kernels.attention import Scores

NAME = "serverless-llm"  # of our attention, to transformers
# Most that logits may differ from transformers' own, as a part of the greatest: an error of order is far over it, and
# the rounding of the dtype, with a choice of experts that it turns over, far under.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
ALONE = {"float32": 1e-4, "bfloat16": 0.02}  # likewise, of a token after others, where each sees itself alone
LONG, SHORT, CUT = 23, 9, 10  # tokens of the two texts that are compared, and where the first is cut in two steps
HEARD = {"dropout", "sliding_window", "position_ids", "use_cache"}  # by the mask, by the step, or in training only

Visible = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Mask:
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
        self._size = config.head_dim
        self._kv = arena.rows(DTYPES[config.dtype], 2, BLOCK_TOKENS, config.kv_heads, config.head_dim)
        self._tokens = self._kv.view(-1, config.kv_heads * config.head_dim)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """`q`: [1, A, T, D], `k`: [1, G, T, D], `v`: [1, G, T, E]; returns [1, T, A, E].

        The longer of D and E is the config's head size; the other is filled up with zeros.
        """
        assert self.step is not None
        slots = self.step.slots[0] + 2 * BLOCK_TOKENS * layer
        for place, values in ((slots, k), (slots + BLOCK_TOKENS, v)):
            rows = self._filled(values)[0].transpose(0, 1).reshape(-1, self._tokens.shape[1])
            self._tokens.index_copy_(0, place, rows[: self.step.tokens])
        queries = self._filled(q)[0].transpose(0, 1).contiguous()
        mixed = self.step.attend[self.views[layer]](queries, self._kv, layer, sinks_A=sinks)
        return mixed.view(1, q.shape[2], q.shape[1], self._size)[..., : v.shape[3]]

    def _filled(self, values: torch.Tensor) -> torch.Tensor:
        missing = self._size - values.shape[-1]
        return F.pad(values, (0, missing)) if missing else values


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls for every layer of a model that is bound here. `s_aux`: sinks."""
    pages: Pages = module.pages
    if pages.step is not None:
        return pages.attend(module.layer_idx, query, key, value, s_aux), None
    for name, given in others.items():
        if given is not None and given is not (name == "is_causal") and name not in HEARD:
            raise CheckpointError(f"{type(module).__name__} asks paged attention for {name}, which is not supported")
    if not isinstance(attention_mask, Mask | None):
        raise CheckpointError(f"{type(module).__name__} has a mask of its own, which is not supported")
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else float(scaling), softcap or 0.0)
    visible = None if attention_mask is None else attention_mask.visible
    pages.calls.append(Call(module.layer_idx, key.shape[1], key.shape[3], value.shape[3], scores, visible))
    return _alone(query, key, value, scores.scale), None


def _alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """In place of attention: a token sees itself alone, as much as its query and key agree. [1, T, A, E]"""
    k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], dim=1) for one in (k, v))
    return ((q * k).sum(dim=-1, keepdim=True).mul_(scale).tanh_() * v).transpose(1, 2).contiguous()


def _mask(*_: Any, mask_function: Visible, **__: Any) -> Mask:
    return Mask(mask_function)


transformers.AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)


class Seen(transformers.DynamicCache):  # type: ignore[misc]
    """A cache that claims to have seen so many tokens, and gives back what it is told."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._seen = tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._seen

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._seen + query_length, 0

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return key, value


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
                self._module = bound(config, tensors, self._device, NAME)
                self._picks = "logits_to_keep" in inspect.signature(self._module.forward).parameters
                for module in self._module.modules():
                    module.__dict__["pages"] = self._pages
                    if self.tiled:
                        tile(module)
                self._stand_alone()
                self._stand_far()
                self._learn()
                self._compare()
        except CheckpointError:
            raise
        except Exception as error:  # another project's code, which was not written for this
            raise self._refused(_cause(error)) from error
        self._pages.use(arena, config)

    def _stand_alone(self) -> None:
        """A token after some and after others: while it sees itself alone, it cannot tell them apart."""
        after = [torch.tensor([*others, 0]) % self.config.vocab for others in ((1, 2, 3, 4), (5, 6, 7, 8))]
        one, other = (self._call(text, torch.arange(len(text)))[-1] for text in after)
        if not (one - other).abs().max() <= ALONE[self.config.dtype] * one.abs().max():
            raise self._refused("its tokens meet elsewhere than in attention that transformers lets others compute")

    def _stand_far(self) -> None:
        """A token far on in the context: given its position, it is as after so many tokens in a cache."""
        seen = self.config.context // 2
        token = torch.zeros(1, dtype=torch.int64)
        here = self._call(token, torch.tensor([seen]))
        ids = token.to(self._device)[None]
        there = self._module(input_ids=ids, past_key_values=Seen(seen), use_cache=True).logits[0].float()
        if not (here - there).abs().max() <= ALONE[self.config.dtype] * here.abs().max():
            raise self._refused("it takes the place of a token from elsewhere than its position")

    def _learn(self) -> None:
        self._pages.calls.clear()
        self._call(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
        calls, config = self._pages.calls, self.config
        if [call.layer for call in calls] != list(range(config.layers)):
            raise self._refused("its layers do not attend once each, in their order")
        for call in calls:
            if max(call.key_size, call.value_size) != config.head_dim or call.kv_heads != config.kv_heads:
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
        """Two texts, one in two steps and then beside the other, against transformers by itself."""
        long, short = ([(7 * place + 3) % self.config.vocab for place in range(size)] for size in (LONG, SHORT))
        self._module.set_attn_implementation("eager")
        wanted = torch.cat([self._call(torch.tensor(text))[-1:] for text in (long, short)])
        self._module.set_attn_implementation(NAME)
        found = self._paged(long, short)
        limit = TOLERANCE[self.config.dtype] * wanted.abs().max()
        if not (found - wanted).abs().max() <= limit:
            raise self._refused("its numbers are not those that transformers computes by itself")

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
    def _call(
        self, ids: torch.Tensor, position: torch.Tensor | None = None, rows: torch.Tensor | int = 0
    ) -> torch.Tensor:
        """float32 logits of these rows of T, of all where it is 0. Without positions: those of transformers."""
        ids = ids.to(self._device)[None]
        given: dict[str, Any] = {} if position is None else {"position_ids": position.to(self._device)[None]}
        given |= {"logits_to_keep": rows} if self._picks else {}
        # With a mask of no padding, transformers does not take positions that begin anew for packed texts.
        out = self._module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **given)
        logits: torch.Tensor = out.logits[0].float()
        return logits if self._picks or isinstance(rows, int) else logits[rows]


def _cause(error: Exception) -> str:
    """What went wrong in transformers; where it met our mask, or does not know of our attention, more plainly."""
    told = f"{type(error).__name__}: {error}"
    own = NAME in str(error) or Mask.__name__ in str(error)
    return f"its attention is not one that transformers lets others compute ({told})" if own else told
