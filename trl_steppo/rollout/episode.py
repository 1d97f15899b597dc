"""Plays one episode: a dataset row in, an [`Episode`] out, whatever breaks on the way."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

from ..calls import CallTimeoutError, MainThreadNeededError, NewEnvironmentNeededError, error_text, within
from ..chat import ChatFormat
from ..environments.base import Message, Outcome, Playable, Response
from ..errors import ConfigurationError, DataError, SamplerError
from ..inference.base import Sample, Sampler, SamplingParams, step_seed
from ..types import Episode, EpisodeLimits, Step, StopReason, TokenIds, renamed_keyword
from .pacing import InFlight
from .rows import EMPTY_PROMPT, own

logger = logging.getLogger(__name__)

_EPISODE = "the episode"
_LONG_TEXT = 20_000  # characters; tokenizing more holds up the other episodes, and is not done in vain


@renamed_keyword("row_index", "stream_position")
async def run_episode(
    env: Playable | None,
    sampler: Sampler,
    row: Mapping[str, Any],
    *,
    chat: ChatFormat | None,
    limits: EpisodeLimits,
    sampling: SamplingParams,
    run_seed: int,
    stream_position: int,
    generation_index: int,
    episode_id: str | None = None,
    pacer: InFlight | None = None,
    closes: bool = True,
) -> Episode:
    """
    Play one episode. What breaks in it becomes its `error`, and the steps so far are kept.

    Args:
        env ([`Playable`], *optional*):
            The environment; `None`: one step, without a reward.
        sampler ([`Sampler`]):
            The policy.
        row (`Mapping[str, Any]`):
            A dataset row. One with `input_ids` is one step from these ids, which stops only at `sampling`'s own stop
            tokens; one with `prompt` is text or messages, and stops at the chat template's end of turn unless
            `sampling` has stop tokens. All of it goes to the environment's `reset`.
        chat ([`ChatFormat`], *optional*):
            Needed for rows with `prompt`, and for an environment.
        limits ([`EpisodeLimits`]):
            Budgets.
        sampling ([`SamplingParams`]):
            How to sample; the seed is replaced by each step's own ([`step_seed`]).
        run_seed (`int`):
            Seed of the run.
        stream_position (`int`):
            Position of the row in the shuffled stream of rows.
        generation_index (`int`):
            Which of the row's episodes this is.
        episode_id (`str`, *optional*):
            Unique within the run; `"{stream_position}-{generation_index}"` if not given.
        pacer ([`InFlight`], *optional*):
            Counts the episode as away whenever it is not waiting for the sampler. The caller has counted it before,
            and takes it back afterwards.
        closes (`bool`, *optional*, defaults to `True`):
            Whether to close the environment afterwards.

    Returns:
        [`Episode`]: terminated, truncated, or with an `error`.

    Raises:
        SamplerError: The sampler failed, which is no fault of the episode's.
        MainThreadNeededError, NewEnvironmentNeededError: This environment cannot play the episode; another one can.
    """
    name = episode_id or f"{stream_position}-{generation_index}"
    play = _Play(env, sampler, row, chat, limits, sampling, (run_seed, stream_position, generation_index), name, pacer)
    try:
        await play.run()
    finally:
        if closes:
            await play.close()
    return play.episode()


@renamed_keyword("row_index", "stream_position")
def failed_episode(
    stream_position: int, generation_index: int, error: BaseException, *, stage: str, episode_id: str | None = None
) -> Episode:
    """An episode that broke before its first step."""
    name = episode_id or f"{stream_position}-{generation_index}"
    return Episode(
        name,
        stream_position,
        generation_index,
        (),
        False,
        False,
        error=describe(error, stage),
        stop_reason=StopReason.ERROR,
    )


def describe(error: BaseException, stage: str) -> str:
    """What broke, in one line: the stage, the exception, and where in the user's code it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{stage}: {type(error).__name__}: {error_text(error)}{where}"


@dataclass(frozen=True)
class _Played:
    """A step, as lengths into the ids that it shares with all steps since the prompt was last rewritten."""

    run_index: int
    prompt_length: int
    sample: Sample
    outcome: Outcome


@dataclass
class _Play:
    """
    One episode while it is being played. `ids` is always the state after the last step in `played`; `runs` are the ids
    that grew until the environment rewrote the prompt.
    """

    env: Playable | None
    sampler: Sampler
    row: Mapping[str, Any]
    chat: ChatFormat | None
    limits: EpisodeLimits
    sampling: SamplingParams
    seeds: tuple[int, int, int]
    episode_id: str
    pacer: InFlight | None
    ids: list[int] = field(default_factory=list)
    runs: list[TokenIds] = field(default_factory=list)
    played: list[_Played] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    scores: dict[str, float] = field(default_factory=dict)
    final_reward: float | None = None
    reset_text: str | None = None
    stage: str = "reset"
    ending: StopReason | None = None
    error: str | None = None

    @property
    def step_index(self) -> int:
        return len(self.played)

    async def run(self) -> None:
        try:
            try:
                self.ending = await self._play_within_time()
            finally:
                self.sampler.release(self.episode_id)
            await self._finish()
        except (SamplerError, MainThreadNeededError, NewEnvironmentNeededError):
            raise
        except Exception as error:
            self._fail(error)

    async def close(self) -> None:
        if self.env is None:
            return
        try:
            await within(self.env.close(), self.limits.max_episode_s, "close()")
        except Exception:  # the episode is complete; what its cleanup does to itself must not cost it
            logger.warning("closing episode %s failed", self.episode_id, exc_info=True)

    def episode(self) -> Episode:
        buffer = TokenIds(self._all_ids())
        buffers = [*self.runs, buffer]
        reason = StopReason.ERROR if self.error is not None or self.ending is None else self.ending
        truncated = reason not in (StopReason.ERROR, StopReason.ENVIRONMENT)
        return Episode(
            self.episode_id,
            stream_position=self.seeds[1],
            generation_index=self.seeds[2],
            steps=tuple(self._step(buffers, index) for index in range(len(self.played))),
            terminated=self.error is None and not truncated,
            truncated=truncated,
            final_prompt_ids=buffer if truncated else None,
            error=self.error,
            metrics={**self.counts, **self.scores},
            stop_reason=reason,
            reset_text=self.reset_text,
            needs_reward=self.final_reward is None,
        )

    # -- playing ------------------------------------------------------------------------------------------------------

    async def _play_within_time(self) -> StopReason:
        try:
            return await within(self._play(), self.limits.max_episode_s, _EPISODE)
        except CallTimeoutError as error:
            # An environment's own time limit arrives here, too; only the episode's leaves something to train on.
            if not self.played or error.what != _EPISODE:
                raise
            return StopReason.MAX_EPISODE_S

    async def _play(self) -> StopReason:
        extra = await self.env.reset(self.row) if self.env is not None else None
        self.reset_text = extra
        self.ids = await self._first_prompt(await self._rewritten(""), extra)
        while True:
            over = self._over_budget()
            if over is not None:
                return over
            ending = await self._play_step()
            if ending is not None:
                return ending

    async def _play_step(self) -> StopReason | None:
        """One step; how it ends the episode, if it does."""
        params = self._params()
        self.stage = f"sampling step {self.step_index}"
        sample = await self._sample(params)
        self.stage = f"environment step {self.step_index}"
        outcome = await self._answer(sample)
        # An environment may go on to change what it returned, a list of all messages for one.
        recorded = replace(outcome, observation=own(outcome.observation, "an observation"))
        self.played.append(_Played(len(self.runs), len(self.ids), sample, recorded))
        self.counts.update(outcome.metrics)
        over = None
        if not outcome.done:
            self.stage = f"observation of step {self.step_index - 1}"
            over = await self._proceed(sample, outcome)
        return self._ending(params, sample, outcome) or over

    def _ending(self, params: SamplingParams, sample: Sample, outcome: Outcome) -> StopReason | None:
        """How a step ends the episode, if it does."""
        if outcome.done and not outcome.ended_by_response:
            return StopReason.ENVIRONMENT
        if sample.stop_reason is StopReason.LENGTH:
            if params.max_new_tokens < self.sampling.max_new_tokens:
                return StopReason.MAX_EPISODE_TOKENS
            if outcome.done and params.stop_token_ids:  # without one, its full length is the response's planned end
                return StopReason.RESPONSE_LENGTH
        return StopReason.ENVIRONMENT if outcome.done else None

    async def _sample(self, params: SamplingParams) -> Sample:
        order = (*self.seeds[1:], self.step_index)
        try:
            with self.pacer.at_sampler() if self.pacer is not None else nullcontext():
                sample = await self.sampler.sample(self.ids, params, episode_id=self.episode_id, order=order)
        except (ConfigurationError, DataError):  # this request can never be answered
            raise
        except Exception as error:
            raise SamplerError(f"episode {self.episode_id}, {describe(error, self.stage)}") from error
        if not len(sample.token_ids):
            raise RuntimeError("the sampler returned an empty response")
        return sample

    async def _answer(self, sample: Sample) -> Outcome:
        if self.env is None:
            return Outcome("", 0.0, done=True, ended_by_response=True)
        chat = self._chat("an environment")
        response_ids = TokenIds(sample.token_ids).tolist()
        parsed = chat.parse(response_ids, self.ids)
        outcome = await self.env.step(Response(chat.decode(response_ids), parsed.message, parsed.malformed))
        if "input_ids" in self.row and not outcome.done:
            return replace(outcome, done=True, ended_by_response=True)
        return outcome

    async def _proceed(self, sample: Sample, outcome: Outcome) -> StopReason | None:
        """To the next state; or else which budget keeps from it, where a long text is not even tokenized."""
        chat = self._chat("a second step")
        response_ids = TokenIds(sample.token_ids).tolist()
        prompt = await self._rewritten(outcome.observation)
        if prompt is not None:
            over = self._cannot_fit(0, prompt, chat)
            if over is None:
                self._count_control_tokens(chat, prompt, is_state_prompt=isinstance(prompt, str))
                ids = await _in_time(lambda: chat.prepare(prompt, is_observed=True), prompt)
                self.runs.append(TokenIds([*self.ids, *response_ids]))
                self.ids = ids
            return over
        messages = _as_messages(outcome.observation)
        over = self._cannot_fit(len(self.ids) + len(response_ids), messages, chat)
        if over is not None:
            return over
        self._count_control_tokens(chat, messages)
        names = [message.get("name", "") for message in messages if message.get("role") == "tool"]
        appended = await _in_time(lambda: chat.append(messages, tool_call_names=names), messages)
        # A new list: the sampler may have kept the old one.
        self.ids = [*self.ids, *response_ids, *chat.close(response_ids), *appended]
        return None

    async def _rewritten(self, observation: str | list[Message]) -> str | list[Message] | None:
        return await self.env.state_prompt(observation) if self.env is not None else None

    async def _finish(self) -> None:
        if self.env is None:
            return
        self.stage = "get_reward"
        self.final_reward = await within(self.env.get_reward(), self.limits.max_episode_s, "get_reward()")
        self.scores = dict(self.env.metrics())

    def _fail(self, error: Exception) -> None:
        self.error = describe(error, self.stage)
        logger.info("episode %s failed", self.episode_id, exc_info=error)

    # -- prompts and budgets ------------------------------------------------------------------------------------------

    def _chat(self, purpose: str) -> ChatFormat:
        if self.chat is None:
            raise DataError(f"{purpose} needs a chat format, and this rollout has none")
        return self.chat

    async def _first_prompt(self, rewritten: str | list[Message] | None, extra: str | None) -> list[int]:
        if rewritten is not None:
            return await self._prepared(self._chat("an environment"), rewritten, extra, is_observed=True)
        if "input_ids" in self.row:
            ids = [int(token_id) for token_id in self.row["input_ids"]]
            if any(not 0 <= token_id < 2**31 for token_id in ids):
                raise DataError(f"`input_ids` has {min(ids)} to {max(ids)}; token ids are in [0, 2**31)")
            if not extra:
                return ids
            chat = self._chat("text from reset()")
            self._check_fits(len(ids), extra, chat)
            self._count_control_tokens(chat, extra)
            encode = partial(chat.encode_text, extra, add_special_tokens=False, is_observed=True)
            return ids + await _in_time(encode, extra)
        prompt = self.row.get("prompt")
        if prompt is None:  # which the environment's `reset` has given, if there is one beside the tools
            if getattr(self.env, "environment", self.env) is None:
                found = sorted(name for name in self.row if self.row[name] is not None)
                raise DataError(f"the row has neither `prompt` nor `input_ids`, but {found}")
            prompt = EMPTY_PROMPT
        return await self._prepared(self._chat("a row with `prompt`"), prompt, extra)

    async def _prepared(
        self, chat: ChatFormat, prompt: str | list[Message], extra: str | None, *, is_observed: bool = False
    ) -> list[int]:
        """The episode's first prompt; a `DataError`, before it is tokenized, where it cannot fit."""
        self._check_fits(0, prompt, chat)
        self._check_fits(0, extra or "", chat)
        means_what_it_says = isinstance(prompt, str) and not is_observed
        shown = [extra] if means_what_it_says else [prompt, extra]
        self._count_control_tokens(chat, shown, is_state_prompt=is_observed and isinstance(prompt, str))
        return await _in_time(lambda: chat.prepare(prompt, extra, is_observed=is_observed), [prompt, extra])

    def _count_control_tokens(self, chat: ChatFormat, shown: Any, *, is_state_prompt: bool = False) -> None:
        count = chat.count_control_tokens(shown)
        if count:
            self.counts["escaped_special_tokens"] += count
            if is_state_prompt:
                _warn_of_state_prompt()

    def _over_budget(self) -> StopReason | None:
        """How the episode ends before its next step; an error if that would be its first."""
        if not self.limits.allows_step(self.step_index):
            return StopReason.MAX_INTERACTION_STEPS
        over = self._beyond(len(self.ids))
        if over is not None and not self.played:
            raise self._too_long(str(len(self.ids)), over)
        return over

    def _cannot_fit(self, length: int, shown: str | list[Message], chat: ChatFormat) -> StopReason | None:
        """The budget that a long text is beyond behind so many tokens, however it is tokenized."""
        if not _is_long(shown) or self._beyond(length + chat.min_tokens(shown)) is None:
            return None
        if not self.limits.allows_step(self.step_index):
            return StopReason.MAX_INTERACTION_STEPS
        return self._beyond(length + chat.min_tokens(shown))

    def _check_fits(self, length: int, shown: str | list[Message], chat: ChatFormat) -> None:
        over = self._cannot_fit(length, shown, chat)
        if over is not None:
            raise self._too_long(f"at least {length + chat.min_tokens(shown)}", over)

    def _beyond(self, length: int) -> StopReason | None:
        """The budget that a state of this many tokens is beyond."""
        limits = self.limits
        if limits.max_prompt_length is not None and length > limits.max_prompt_length:
            return StopReason.MAX_PROMPT_LENGTH
        if limits.max_episode_tokens is not None and length >= limits.max_episode_tokens:
            return StopReason.MAX_EPISODE_TOKENS
        return None

    def _too_long(self, length: str, budget: StopReason) -> DataError:
        limit = getattr(self.limits, budget.value)
        return DataError(f"the first prompt has {length} tokens; `{budget.value}` is {limit}")

    def _params(self) -> SamplingParams:
        stop = self.sampling.stop_token_ids
        if not stop and "input_ids" not in self.row:
            stop = self._chat("a row with `prompt`").stop_token_ids
        budget = self.sampling.max_new_tokens
        if self.limits.max_episode_tokens is not None:
            budget = min(budget, self.limits.max_episode_tokens - len(self.ids))
        seed = step_seed(*self.seeds, self.step_index)
        return replace(self.sampling, max_new_tokens=budget, stop_token_ids=stop, seed=seed)

    # -- the result ---------------------------------------------------------------------------------------------------

    def _all_ids(self) -> list[int]:
        """
        The state after the last step, or its prompt and response where nothing follows them: holds every id since the
        prompt was last rewritten.
        """
        if not self.played:
            return self.ids
        last = self.played[-1]
        if last.run_index < len(self.runs):  # the prompt was rewritten after it
            return self.ids
        ends_at = last.prompt_length + len(last.sample.token_ids)
        return self.ids if len(self.ids) >= ends_at else [*self.ids, *last.sample.token_ids]

    def _step(self, buffers: list[TokenIds], index: int) -> Step:
        played = self.played[index]
        buffer = buffers[played.run_index]
        sample, outcome = played.sample, played.outcome
        is_last = index == len(self.played) - 1
        return Step(
            prompt_ids=buffer[: played.prompt_length],
            response_ids=buffer[played.prompt_length : played.prompt_length + len(sample.token_ids)],
            rollout_logprobs=sample.logprobs,
            reward=outcome.reward + ((self.final_reward or 0.0) if is_last else 0.0),
            step_index=index,
            policy_version=sample.policy_version,
            temperature=self.sampling.temperature,
            stop_reason=sample.stop_reason,
            observation=outcome.observation,
            info={} if outcome.state_key is None else {"state_key": outcome.state_key},
        )


@lru_cache(maxsize=1)
def _warn_of_state_prompt() -> None:
    logger.warning(
        "state_prompt() returned text that spells control tokens, which are tokenized as text: return messages, and "
        "the chat template writes the turns (told once)"
    )


async def _in_time(tokenize: Callable[[], list[int]], shown: Any) -> list[int]:
    """Tokenize; a long text in a thread, so that no other episode waits for it."""
    return await asyncio.to_thread(tokenize) if _is_long(shown) else tokenize()


def _is_long(shown: Any) -> bool:
    """Whether there is much text in a nested value."""
    waiting, characters = [shown], _LONG_TEXT
    while waiting and characters >= 0:
        value = waiting.pop()
        if isinstance(value, str):
            characters -= len(value)
        elif isinstance(value, Mapping):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple):
            waiting.extend(value)
    return characters < 0


def _as_messages(observation: str | Iterable[Message]) -> list[Message]:
    return [{"role": "user", "content": observation}] if isinstance(observation, str) else list(observation)
