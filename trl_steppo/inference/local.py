"""The in-process engine: one batch over all episodes that are waiting for a response.

`generate` starts and ends with its whole batch; episodes do not. Here a response joins the running batch when its
prompt arrives and leaves it with its last token, so the batch stays full while tools answer. Keys and values live in
storage of our own, where every row has its own length: there is no left padding, a row is continued from where the
episode's previous step ended, and a row that leaves takes its part along.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from ..errors import ConfigurationError
from ..types import StopReason, TokenIds
from .base import Sample, SamplingParams

logger = logging.getLogger(__name__)

_PREFILL_TOKENS = 16_384  # new tokens of one prefill forward pass
_MASK_ELEMENTS = 2**26  # elements of one prefill attention mask


class LocalSampler:
    """
    Samples from a transformers causal language model in this process. Greedy output and log-probabilities equal those
    of one plain forward pass over prompt and response.

    Args:
        model (`PreTrainedModel`):
            Any causal language model. Models whose layers are not all full attention through SDPA or eager (sliding
            windows, state-space layers, flash attention) are sampled without a cache, which is exact and slow.
        cache_tokens (`int`, *optional*, defaults to `262144`):
            Bound on the tokens whose keys and values are held, over running and waiting episodes. Responses that do
            not fit wait for others to end; waiting episodes are forgotten least-recently-used first and prefilled
            again. `None`: no bound.

    Raises:
        ConfigurationError: If `cache_tokens` is not positive; from `sample`, if one response alone exceeds it.
    """

    def __init__(self, model: nn.Module, *, cache_tokens: int | None = 262_144) -> None:
        if cache_tokens is not None and cache_tokens < 1:
            raise ConfigurationError(f"`rollout_cache_tokens` is {cache_tokens}; give a positive number, or None")
        self.model = model
        self.policy_version = 0
        self.cache_tokens = cache_tokens
        self.sampled_tokens = 0
        self.prefilled_tokens = 0
        self.forward_s = 0.0  # seconds in the model's forward passes
        self._waiting: list[_Request] = []
        self._driver: asyncio.Task[None] | None = None
        self._settled: Callable[[], Awaitable[None]] | None = None
        # Any object with the same methods would do: which one is a question of the model's attention alone.
        self._rows = _CachedRows(model) if _takes_a_mask(model) else _UncachedRows(model)

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, episode_id: str, order: tuple[int, ...] = ()
    ) -> Sample:
        """Continue `prompt_ids`; see [`Sampler`]."""
        future: asyncio.Future[Sample] = asyncio.get_running_loop().create_future()
        request = _Request(list(prompt_ids), params, episode_id, order, future)
        if self.cache_tokens is not None and request.max_tokens > self.cache_tokens:
            raise ConfigurationError(
                f"a prompt of {len(prompt_ids)} tokens with up to {params.max_new_tokens} new ones exceeds "
                f"`rollout_cache_tokens`={self.cache_tokens}; raise it, or bound the prompt with `max_prompt_length`"
            )
        self._waiting.append(request)
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive())
        return await future

    def release(self, episode_id: str) -> None:
        """Forget the episode's cache."""
        self._rows.forget(episode_id)

    def pace(self, settled: Callable[[], Awaitable[None]] | None) -> None:
        """Await `settled()` before each batch is formed; see [`Sampler`]."""
        self._settled = settled

    def reset_cache(self) -> None:
        """Forget every waiting episode's keys and values: the weights they were computed with have changed."""
        self._rows.forget_all()

    async def _drive(self) -> None:
        """One forward pass after another, for as long as anyone waits for a token."""
        running: list[_Request] = []
        was_training = self.model.training
        self.model.eval()
        try:
            while running or self._waiting:
                await asyncio.sleep(0)  # lets episodes whose answer just came hand in their next prompt
                if self._settled is not None:
                    await self._settled()
                for request in [r for r in running if r.future.cancelled()]:
                    self._leave(running, request)
                arrived = self._admit(running)
                if arrived or running:
                    start = time.perf_counter()
                    update = self._rows.join(arrived) if arrived else self._rows.step()
                    self.forward_s += time.perf_counter() - start
                    self._advance(running, update)
        except Exception as error:
            for request in running + self._waiting:
                if not request.future.done():
                    request.future.set_exception(error)
            self._waiting.clear()
            self._rows.clear()
        finally:
            self.model.train(was_training)

    def _admit(self, running: list[_Request]) -> list[_Request]:
        """Move waiting requests into the batch, in an order that no coroutine's timing can change."""
        self._waiting = sorted((r for r in self._waiting if not r.future.cancelled()), key=lambda r: r.order)
        reserved = sum(request.max_tokens for request in running)
        admitted = []
        for request in self._waiting:
            reserved += request.max_tokens
            if self.cache_tokens is not None and reserved > self.cache_tokens:
                break
            admitted.append(request)
        if not admitted:
            return []
        del self._waiting[: len(admitted)]
        if self.cache_tokens is not None:
            held = sum(request.max_tokens for request in running + admitted)
            self._rows.shrink(self.cache_tokens - held, keep={request.episode_id for request in admitted})
        return admitted

    def _advance(self, running: list[_Request], update: tuple[list[_Request], torch.Tensor, int]) -> None:
        """Sample one token for each row that has logits, and let go of those that are complete."""
        requests, logits, prefilled = update
        self.prefilled_tokens += prefilled
        present = {id(request) for request in running}
        running.extend(request for request in requests if id(request) not in present)
        tokens, logprobs = sample_tokens(
            logits, [request.params for request in requests], [request.next_uniform() for request in requests]
        )
        self.sampled_tokens += len(requests)
        for request, token, logprob in zip(requests, tokens, logprobs, strict=True):
            request.append(token, logprob)
        for request in [r for r in requests if r.stop_reason is not None]:
            self._leave(running, request)
            if not request.future.done():
                request.future.set_result(request.result(self.policy_version))

    def _leave(self, running: list[_Request], request: _Request) -> None:
        running.remove(request)
        self._rows.leave(request)


@dataclass(eq=False)
class _Request:
    """A response in the making."""

    prompt_ids: list[int]
    params: SamplingParams
    episode_id: str
    order: tuple[int, ...]
    future: asyncio.Future[Sample]
    response_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop_reason: StopReason | None = None
    _uniforms: list[float] | None = None

    @property
    def max_tokens(self) -> int:
        return len(self.prompt_ids) + self.params.max_new_tokens

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.response_ids

    def next_uniform(self) -> float:
        """The number that decides the next token: the response's own stream, whoever shares its batch."""
        if self._uniforms is None:
            generator = np.random.Generator(np.random.Philox(key=self.params.seed))
            self._uniforms = generator.random(self.params.max_new_tokens).tolist()
        return self._uniforms[len(self.response_ids)]

    def append(self, token: int, logprob: float) -> None:
        self.response_ids.append(token)
        self.logprobs.append(logprob)
        if token in self.params.stop_token_ids:
            self.stop_reason = StopReason.STOP
        elif len(self.response_ids) >= self.params.max_new_tokens:
            self.stop_reason = StopReason.LENGTH

    def result(self, policy_version: int) -> Sample:
        assert self.stop_reason is not None
        return Sample(TokenIds(self.response_ids), tuple(self.logprobs), self.stop_reason, policy_version)


def sample_tokens(
    logits: torch.Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> tuple[list[int], list[float]]:
    """
    Sample one token a row by inverting its cumulative distribution at that row's own number.

    Args:
        logits (`torch.Tensor`):
            Shape (n, V).
        params (`Sequence[SamplingParams]`):
            How each row is sampled; `temperature` 0 takes the most likely token.
        uniforms (`Sequence[float]`):
            A number in [0, 1) for each row.

    Returns:
        The tokens, and their log-probabilities under softmax(logits / temperature) (temperature 1 for greedy rows),
        before `top_k` and `top_p`.
    """
    temperatures = [p.temperature for p in params]
    logits = logits.float()
    if any(t not in (0.0, 1.0) for t in temperatures):
        divisors = torch.tensor([t or 1.0 for t in temperatures], device=logits.device)
        logits = logits / divisors[:, None]
    logprobs = logits.log_softmax(-1)  # (n, V)
    if any(temperatures):
        cumulative = _keep_most_likely(logprobs, params).exp().cumsum(-1, dtype=torch.double)
        total = cumulative[:, -1:]
        thresholds = torch.tensor(uniforms, dtype=torch.double, device=logits.device)[:, None] * total
        # Below the total, whatever rounding did: so that the token found has a probability above zero.
        thresholds = torch.minimum(thresholds, torch.nextafter(total, torch.zeros_like(total)))
        tokens = torch.searchsorted(cumulative, thresholds, right=True).squeeze(-1)
    if not all(temperatures):
        greedy = torch.tensor([t == 0.0 for t in temperatures], device=logits.device)
        most_likely = logprobs.argmax(-1)
        tokens = torch.where(greedy, most_likely, tokens) if any(temperatures) else most_likely
    chosen = logprobs.gather(-1, tokens[:, None]).squeeze(-1)
    return tokens.tolist(), chosen.tolist()


def _keep_most_likely(logprobs: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Set what `top_k` and `top_p` exclude to -inf."""
    if all(p.top_p >= 1.0 and p.top_k <= 0 for p in params):
        return logprobs
    vocabulary = logprobs.shape[-1]
    top_k = torch.tensor([p.top_k if p.top_k > 0 else vocabulary for p in params], device=logprobs.device)
    top_p = torch.tensor([p.top_p for p in params], device=logprobs.device)
    descending, order = logprobs.sort(-1, descending=True)
    before = descending.exp().cumsum(-1) - descending.exp()  # probability of all that is more likely
    rank = torch.arange(vocabulary, device=logprobs.device)
    excluded = (rank >= top_k[:, None]) | (before >= top_p[:, None])
    excluded[:, 0] = False
    return logprobs.masked_fill(torch.zeros_like(excluded).scatter(-1, order, excluded), -torch.inf)


def _takes_a_mask(model: nn.Module) -> bool:
    """Whether every layer attends to all before it, through an attention that takes a dense mask."""
    config: Any = model.config
    attention = getattr(config, "_attn_implementation", None)
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) if not hasattr(config, "layer_types") else None
    if layer_types == {"full_attention"} and not windowed and attention in ("sdpa", "eager"):
        return True
    logger.warning(
        "%s (attention %r, layers %s%s) cannot be continued from one key-value storage: sampling will recompute the "
        "whole row for every token",
        type(model).__name__,
        attention,
        sorted(layer_types),
        ", sliding window" if windowed else "",
    )
    return False


# The rows of the running batch. `join` and `step` return the requests that have logits for their next token, these
# logits (n, V), and how many prompt tokens were forwarded.
_Update = tuple[list[_Request], torch.Tensor, int]


class _UncachedRows:
    """Forwards every row whole for every token: for models whose state is not keys and values alone."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.requests: list[_Request] = []

    def join(self, arrived: list[_Request]) -> _Update:
        self.requests += arrived
        return self._forward(arrived)

    def step(self) -> _Update:
        return self._forward(self.requests)

    def leave(self, request: _Request) -> None:
        self.requests.remove(request)

    def clear(self) -> None:
        self.requests = []

    def forget(self, episode_id: str) -> None:
        pass

    def forget_all(self) -> None:
        pass

    def shrink(self, tokens: int, keep: set[str]) -> None:
        pass

    @torch.no_grad()
    def _forward(self, requests: list[_Request]) -> _Update:
        device = next(self.model.parameters()).device
        rows = [torch.tensor(request.ids) for request in requests]
        input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        attention_mask = torch.arange(input_ids.shape[1], device=device) < lengths[:, None]
        output = self.model(input_ids=input_ids, attention_mask=attention_mask.long(), use_cache=False)
        logits = output.logits[torch.arange(len(rows), device=device), lengths - 1]
        return list(requests), logits, int(lengths.sum())


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

    def ensure(self) -> None:
        """Grow to the cursor's capacity."""
        rows, tokens = self.cursor.capacity
        if not self.is_initialized or (self.keys.shape[0] >= rows and self.keys.shape[2] > tokens):
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(max(rows, old.shape[0]), old.shape[1], max(tokens + 1, old.shape[2]), old.shape[3])
            new[: old.shape[0], :, : old.shape[2] - 1] = old[:, :, :-1]
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
        return 0  # positions are always given; a mask is given wherever one is needed

    def get_max_length(self) -> int:
        return -1


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
    """What an episode that waits for its environment keeps: its tokens, and their keys and values per layer."""

    ids: list[int]
    layers: list[tuple[torch.Tensor, torch.Tensor]]  # each (heads, tokens, head size)


class _CachedRows:
    """
    The running batch, in rows 0 to n-1 of the storage. A row that leaves is parked with its episode, and the last row
    takes its place, so that a forward pass always runs over one contiguous block.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.requests: list[_Request] = []
        self.lengths: list[int] = []  # tokens of each row whose keys and values are stored
        self.parked: OrderedDict[str, _Parked] = OrderedDict()  # least recently used first
        self.clear()

    def clear(self) -> None:
        self.requests, self.lengths = [], []
        self.cursor = _Cursor()
        num_layers = self.model.config.num_hidden_layers  # type: ignore[union-attr]
        self.layers = [_Layer(self.cursor) for _ in range(int(num_layers))]  # type: ignore[arg-type]
        self.cache = Cache(layers=list(self.layers))
        self.parked.clear()

    def forget(self, episode_id: str) -> None:
        self.parked.pop(episode_id, None)

    def forget_all(self) -> None:
        self.parked.clear()
        if not self.requests:
            self.clear()  # gives the storage back between rollouts

    def shrink(self, tokens: int, keep: set[str]) -> None:
        """Forget the least recently used episodes until those parked hold at most `tokens`."""
        parked = sum(len(p.ids) for p in self.parked.values())
        for episode_id in [e for e in self.parked if e not in keep] + [e for e in self.parked if e in keep]:
            if parked <= tokens:
                return
            parked -= len(self.parked.pop(episode_id).ids)

    def join(self, arrived: list[_Request]) -> _Update:
        """Add rows and prefill what of their prompts is not stored yet."""
        first = len(self.requests)
        self._reserve(first + len(arrived), max(request.max_tokens for request in arrived))
        for request in arrived:
            self.requests.append(request)
            self.lengths.append(self._unpark(request, len(self.requests) - 1))
        logits, prefilled = [], 0
        for start, stop in self._prefill_groups(first):
            new = [self.requests[row].prompt_ids[self.lengths[row] :] for row in range(start, stop)]
            logits.append(self._forward(start, stop, new))
            prefilled += sum(len(ids) for ids in new)
        return arrived, torch.cat(logits), prefilled

    def step(self) -> _Update:
        """Forward the last sampled token of every row."""
        new = [[request.response_ids[-1]] for request in self.requests]
        return list(self.requests), self._forward(0, len(self.requests), new), 0

    def leave(self, request: _Request) -> None:
        row, last = self.requests.index(request), len(self.requests) - 1
        length = self.lengths[row]
        self.parked[request.episode_id] = _Parked(
            request.ids[:length],
            [(layer.keys[row, :, :length].clone(), layer.values[row, :, :length].clone()) for layer in self.layers],
        )
        self.parked.move_to_end(request.episode_id)
        if row != last:
            length = self.lengths[last]
            for layer in self.layers:
                layer.keys[row, :, :length] = layer.keys[last, :, :length]
                layer.values[row, :, :length] = layer.values[last, :, :length]
            self.requests[row], self.lengths[row] = self.requests[last], length
        self.requests.pop()
        self.lengths.pop()

    def _unpark(self, request: _Request, row: int) -> int:
        """Bring back what the episode's last step stored, as far as the new prompt continues it."""
        parked = self.parked.pop(request.episode_id, None)
        if parked is None:
            return 0
        # At least one token is forwarded: its logits start the response.
        shared = min(_common_prefix(parked.ids, request.prompt_ids), len(request.prompt_ids) - 1)
        for layer, (keys, values) in zip(self.layers, parked.layers, strict=True):
            layer.keys[row, :, :shared] = keys[:, :shared]
            layer.values[row, :, :shared] = values[:, :shared]
        return shared

    def _reserve(self, rows: int, tokens: int) -> None:
        """Storage for this many rows of this many tokens; grown by half, so that growing stays rare."""
        have_rows, have_tokens = self.cursor.capacity
        if rows > have_rows or tokens > have_tokens:
            rows = rows if rows <= have_rows else max(rows, have_rows * 3 // 2)
            tokens = tokens if tokens <= have_tokens else max(tokens, have_tokens * 3 // 2)
            self.cursor.capacity = (max(rows, have_rows), max(tokens, have_tokens))
            for layer in self.layers:
                layer.ensure()

    def _prefill_groups(self, first: int) -> list[tuple[int, int]]:
        """Split rows `first` onwards so that neither the tokens nor the mask of a forward pass grow without bound."""
        groups, start = [], first
        for row in range(first, len(self.requests)):
            rows = range(start, row + 1)
            new = max(len(self.requests[r].prompt_ids) - self.lengths[r] for r in rows)
            seen = max(len(self.requests[r].prompt_ids) for r in rows)
            tokens = new * len(rows)
            if row > start and (tokens > _PREFILL_TOKENS or tokens * seen > _MASK_ELEMENTS):
                groups.append((start, row))
                start = row
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
            mask = None  # every row starts here: plain causal attention, and padding comes last
        else:
            mask = (torch.arange(seen) <= positions[:, :, None])[:, None].to(device)  # (rows, 1, width, seen)
        input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in new], device=device)
        backbone: Any = getattr(self.model, str(self.model.base_model_prefix))
        hidden = backbone(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions.to(device),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        for row, count in zip(range(first, last), new_lengths.tolist(), strict=True):
            self.lengths[row] += count
        ends = hidden[torch.arange(last - first, device=device), (new_lengths - 1).to(device)]
        return self.model.get_output_embeddings()(ends)  # type: ignore[operator]


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    limit = min(len(a), len(b))
    if a[:limit] == b[:limit]:
        return limit
    return next(i for i in range(limit) if a[i] != b[i])
