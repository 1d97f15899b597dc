"""Rows that are continued from stored keys and values, and whether a model can be sampled so.

Every row of the storage has its own length: there is no left padding, a row is continued from where the episode's
previous step ended, and a row that leaves takes its part along.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import Cache, PreTrainedModel

from ..compat.transformers import (
    CacheLayerMixin,
    attention_of,
    cache_argument,
    special_attention,
    takes_positions,
)
from ..errors import ConfigurationError
from ..models.attention import WITH_DENSE_MASK, register_attention
from ..modes import evaluating
from ..numerics import deviates
from ..types import num_shared
from .base import SamplingParams
from .rows import Request, Update, last_logits

logger = logging.getLogger(__name__)

_PREFILL_TOKENS = 16_384  # new tokens of one prefill forward pass, padding included
_PREFILL_PADDING = 1_024  # padding of one prefill forward pass
_MASK_ELEMENTS = 2**26  # elements of one prefill attention mask


class _Layer(CacheLayerMixin):
    """Keys and values of one layer: (rows, heads, tokens, head size). The last column takes what padding writes."""

    is_sliding = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, cursor: _Cursor) -> None:
        super().__init__()
        self.cursor = cursor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows, tokens = self.cursor.capacity
        self.keys = key_states.new_zeros(rows, key_states.shape[1], tokens + 1, key_states.shape[3])
        self.values = value_states.new_zeros(rows, value_states.shape[1], tokens + 1, value_states.shape[3])
        self.is_initialized = True

    def resize(self) -> None:
        """Change to the cursor's capacity, and keep what is stored within it."""
        if not self.is_initialized:
            return
        rows, tokens = self.cursor.capacity
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(rows, old.shape[1], tokens + 1, old.shape[3])
            kept_rows, kept_tokens = min(rows, old.shape[0]), min(tokens, old.shape[2] - 1)
            new[:kept_rows, :, :kept_tokens] = old[:kept_rows, :, :kept_tokens]
            setattr(self, name, new)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, last, columns, seen = self.cursor.first, self.cursor.last, self.cursor.columns, self.cursor.seen
        rows = torch.arange(first, last, device=key_states.device)[:, None]
        self.keys[rows, :, columns] = key_states.transpose(1, 2).to(self.keys.dtype)
        self.values[rows, :, columns] = value_states.transpose(1, 2).to(self.values.dtype)
        return self.keys[first:last, :, :seen], self.values[first:last, :, :seen]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cursor.seen, 0

    def get_seq_length(self) -> int:
        return 0  # positions are always given, and a mask where one is needed

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers before 5.13


@dataclass
class _Cursor:
    """Where a forward pass writes: rows `first` to `last`, at `columns` (rows, new tokens), of `seen` tokens."""

    capacity: tuple[int, int] = (0, 0)  # rows, tokens
    first: int = 0
    last: int = 0
    columns: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    seen: int = 0


@dataclass
class _Parked:
    """What is kept for an episode that waits for its environment: its tokens, with keys and values per layer."""

    ids: list[int]
    layers: list[tuple[torch.Tensor, torch.Tensor]]  # each (heads, tokens, head size)


class CachedRows:
    """
    The running batch, in rows 0 to n-1 of the storage. A row that leaves is parked with its episode, and the last row
    takes its place, so that a forward pass always runs over one contiguous block.
    """

    def __init__(self, model: PreTrainedModel, cache_tokens: int | None) -> None:
        self.model = model
        self.cache_argument = str(cache_argument(model))
        self.cache_tokens = cache_tokens
        self.requests: list[Request] = []
        self.lengths: list[int] = []  # tokens of each row whose keys and values are stored
        self.parked: OrderedDict[str, _Parked] = OrderedDict()  # least recently used first
        self.cursor = _Cursor()
        self.clear()

    def clear(self) -> None:
        self.requests, self.lengths = [], []
        self.cursor = _Cursor(self.cursor.capacity)  # the next rollout usually needs as much, and allocates it at once
        config = self.model.config.get_text_config()
        self.layers = [_Layer(self.cursor) for _ in range(config.num_hidden_layers)]
        layers: list[Any] = list(self.layers)
        self.cache = Cache(layers=layers)
        self.parked.clear()

    def forget(self, episode_id: str) -> None:
        self.parked.pop(episode_id, None)

    def forget_all(self) -> None:
        self.parked.clear()
        if not self.requests:
            self.clear()  # frees the storage between rollouts

    def shrink(self, tokens: int, keep: set[str]) -> None:
        others = [episode_id for episode_id in self.parked if episode_id not in keep]
        held = sum(len(self.parked[episode_id].ids) for episode_id in others)
        for episode_id in others:
            if held <= tokens:
                return
            held -= len(self.parked.pop(episode_id).ids)

    def join(self, arrived: list[Request]) -> Update:
        """Add rows, and forward what is not stored yet of their prompts; equal prompts of several rows only once."""
        first = len(self.requests)
        self._reserve(self.requests + arrived)
        parked = [self.parked.pop(request.episode_id, None) for request in arrived]
        begun: list[tuple[Request, _Parked | None, int]] = []  # with the number of prompt tokens that are stored
        twins: list[tuple[Request, Request]] = []  # with the request that has the same prompt, and is forwarded
        leaders: dict[tuple[int, ...], Request] = {}  # of the members of a group, whose episodes begin alike
        for request, stored in zip(arrived, parked, strict=True):
            leader = leaders.setdefault(tuple(request.prompt_ids), request) if stored is None else request
            if leader is request:
                begun.append((request, stored, _num_shared(request, stored)))
            else:
                twins.append((request, leader))
        # Rows of similar length side by side: a forward pass pads them to the longest.
        for request, stored, shared in sorted(begun, key=lambda entry: len(entry[0].prompt_ids) - entry[2]):
            if stored is not None:
                self._unpark(stored, len(self.requests), shared)
            self.requests.append(request)
            self.lengths.append(shared)
        logits, num_prefilled = self._prefill(first)
        rows = [self.requests.index(leader) for _, leader in twins]
        for (request, _), row in zip(twins, rows, strict=True):
            self._copy_row(row, len(self.requests))
            self.requests.append(request)
            self.lengths.append(self.lengths[row])
        if twins:
            order = torch.tensor([*range(len(begun)), *(row - first for row in rows)])
            logits = logits[order.to(logits.device)]
        return Update(self.requests[first:], logits, num_prefilled)

    def _prefill(self, first: int) -> tuple[torch.Tensor, int]:
        """Forward what is not stored of the prompts from row `first` on: their logits, and the tokens forwarded."""
        logits, num_prefilled = [], 0
        for start, stop in self._prefill_groups(first):
            new = [self.requests[row].prompt_ids[self.lengths[row] :] for row in range(start, stop)]
            logits.append(self._forward(start, stop, new))
            num_prefilled += sum(len(ids) for ids in new)
        return torch.cat(logits), num_prefilled

    def step(self) -> Update:
        """Forward the last sampled token of every row."""
        new = [[request.response_ids[-1]] for request in self.requests]
        return Update(list(self.requests), self._forward(0, len(self.requests), new), 0)

    def leave(self, request: Request, *, keep: bool) -> None:
        row, last = self.requests.index(request), len(self.requests) - 1
        if keep:
            length = self.lengths[row]
            layers = [(x.keys[row, :, :length].clone(), x.values[row, :, :length].clone()) for x in self.layers]
            self.parked[request.episode_id] = _Parked(request.ids[:length], layers)
            self.parked.move_to_end(request.episode_id)
        if row != last:
            self._copy_row(last, row)
            self.requests[row], self.lengths[row] = self.requests[last], self.lengths[last]
        self.requests.pop()
        self.lengths.pop()

    def _copy_row(self, source: int, target: int) -> None:
        length = self.lengths[source]
        for layer in self.layers:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]

    def _unpark(self, parked: _Parked, row: int, shared: int) -> None:
        """Restore what the episode's last step stored, as far as the new prompt continues it."""
        for layer, (keys, values) in zip(self.layers, parked.layers, strict=True):
            layer.keys[row, :, :shared] = keys[:, :shared]
            layer.values[row, :, :shared] = values[:, :shared]

    def _reserve(self, requests: Sequence[Request]) -> None:
        """Make storage for these rows. It grows by half, as far as the bound allows, so that it grows rarely."""
        rows, tokens = len(requests), max(request.max_tokens for request in requests)
        have_rows, have_tokens = self.cursor.capacity
        if rows <= have_rows and tokens <= have_tokens:
            return
        more_rows = max(rows, have_rows * 3 // 2) if rows > have_rows else have_rows
        more_tokens = max(tokens, have_tokens * 3 // 2) if tokens > have_tokens else have_tokens
        fits = self.cache_tokens is None or more_rows * more_tokens <= self.cache_tokens
        self.cursor.capacity = (more_rows, more_tokens) if fits else (rows, tokens)
        for layer in self.layers:
            layer.resize()

    def _prefill_groups(self, first: int) -> list[tuple[int, int]]:
        """
        Split rows `first` onwards, sorted by new tokens, so that neither the tokens, the padding nor the mask of a
        forward pass grow without bound.
        """
        groups: list[tuple[int, int]] = []
        start, total, seen = first, 0, 0
        for row in range(first, len(self.requests)):
            length = len(self.requests[row].prompt_ids)
            new = length - self.lengths[row]
            total, seen = total + new, max(seen, length)
            tokens = new * (row + 1 - start)
            too_large = tokens > _PREFILL_TOKENS or tokens - total > _PREFILL_PADDING or tokens * seen > _MASK_ELEMENTS
            if row > start and too_large:
                groups.append((start, row))
                start, total, seen = row, new, length
        return [*groups, (start, len(self.requests))]

    @torch.no_grad()
    def _forward(self, first: int, last: int, new: list[list[int]]) -> torch.Tensor:
        """Forward `new` tokens of rows `first` to `last`; the logits after each row's last token (rows, V)."""
        device = next(self.model.parameters()).device
        width = max(map(len, new))
        old_lengths = torch.tensor(self.lengths[first:last])
        new_lengths = torch.tensor([len(ids) for ids in new])
        offsets = torch.arange(width)
        positions = old_lengths[:, None] + offsets  # (rows, width)
        is_new = offsets < new_lengths[:, None]
        seen = int((old_lengths + new_lengths).max())
        self.cursor.first, self.cursor.last, self.cursor.seen = first, last, seen
        self.cursor.columns = positions.masked_fill(~is_new, self.cursor.capacity[1]).to(device)
        if bool((old_lengths == 0).all()):
            mask = None  # every row starts here: causal attention without a mask, since padding comes last
        else:
            mask = (torch.arange(seen) <= positions[:, :, None])[:, None].to(device)  # (rows, 1, width, seen)
            if attention_of(self.model.config) == "eager":
                dtype = next(self.model.parameters()).dtype  # eager attention adds its mask to the scores
                mask = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, torch.finfo(dtype).min)
        input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in new], device=device)
        logits = last_logits(
            self.model,
            (new_lengths - 1).to(device),
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions.to(device),
            use_cache=True,
            **{self.cache_argument: self.cache},
        )
        for row, count in zip(range(first, last), new_lengths.tolist(), strict=True):
            self.lengths[row] += count
        return logits


def _num_shared(request: Request, parked: _Parked | None) -> int:
    """Number of prompt tokens stored with the episode. The last one is forwarded anyway, for its logits."""
    return min(num_shared(parked.ids, request.prompt_ids), len(request.prompt_ids) - 1) if parked else 0


def samples_with_a_cache(model: PreTrainedModel, *, allow_uncached: bool) -> bool:
    """
    Whether responses of a model can be sampled with stored keys and values: by its configuration, and by a trial, once
    for each class of model and attention implementation.

    Args:
        model (`PreTrainedModel`):
            A causal language model, whole on this rank.
        allow_uncached (`bool`):
            Whether it may be sampled without, which takes several times as long.

    Raises:
        ConfigurationError: If it can only be sampled without, and `allow_uncached` is not set.
    """
    register_attention()  # a model from another process may attend by it
    obstacles = list(_obstacles(model)) or list(_disagreements(model))
    if not obstacles:
        return True
    problem = f"{type(model).__name__} cannot be continued from stored keys and values ({', '.join(obstacles)})"
    if not allow_uncached:
        raise ConfigurationError(
            f"{problem}: each token would cost a forward pass over its whole row. Load the model with "
            "`attn_implementation='sdpa'` if that is what it lacks, sample on a server (`use_vllm`), or set "
            "`allow_uncached_sampling` to sample it nevertheless"
        )
    logger.warning("%s: sampling recomputes the whole row for every token (`allow_uncached_sampling`)", problem)
    return False


def _obstacles(model: PreTrainedModel) -> Iterator[str]:
    """Why a model's rows cannot be continued with a dense mask over one storage; nothing if they can."""
    config = model.config.get_text_config()
    yield from special_attention(config)
    if not takes_positions(model):
        yield "its forward pass takes no position ids"
    if cache_argument(model) is None:
        yield f"its forward pass takes no cache by a name that is known for transformers {transformers.__version__}"
    if attention_of(config) not in WITH_DENSE_MASK:
        yield f"{attention_of(config)!r} attention takes no dense mask"


def _disagreements(model: PreTrainedModel) -> Iterator[str]:
    """Which rows that are continued from their storage have other logits than the same rows whole."""
    config = model.config.get_text_config()
    key = (type(model), attention_of(config), next(model.parameters()).dtype)
    if key not in _tried:
        with evaluating(model):
            _tried[key] = _first_disagreement(model, config.vocab_size)
    if _tried[key]:
        yield f"{_tried[key]} with transformers {transformers.__version__} gives other logits than a whole row"


_tried: dict[tuple[type, str, torch.dtype], str] = {}  # for this process and its library versions; "": they agree


@torch.no_grad()
def _first_disagreement(model: PreTrainedModel, vocab_size: int) -> str:
    """Try two rows of different lengths: begin both, add a token to each, and continue one after a pause."""
    rows = CachedRows(model, None)
    no_future: Any = None  # nothing waits for these responses

    def row(episode_id: str, ids: Sequence[int]) -> Request:
        return Request([token % vocab_size for token in ids], SamplingParams(4), episode_id, (), no_future)

    def plain(ids: Sequence[int]) -> torch.Tensor:
        device = next(model.parameters()).device
        last: torch.Tensor = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[:, -1]
        return last

    def differs(update: Update) -> bool:
        for request, logits in zip(update.requests, update.logits, strict=True):
            expected = plain(request.ids)
            # The size of a mistake: the same last token after other ones.
            mistake = plain([*((token + 1) % vocab_size for token in request.ids[:-1]), request.ids[-1]]) - expected
            if deviates(logits[None], expected, mistake):
                return True
        return False

    long, short = row("long", range(1, 8)), row("short", range(11, 14))
    if differs(rows.join([long, short])):
        return "a prompt"
    long.response_ids.append(21 % vocab_size)
    short.response_ids.append(22 % vocab_size)
    if differs(rows.step()):
        return "a token that continues a row"
    rows.leave(long, keep=True)
    if differs(rows.join([row("long", [*long.ids, 31, 32, 33])])):
        return "a prompt that continues a row"
    return ""
