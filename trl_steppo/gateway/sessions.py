"""One session is one episode: what was recorded of it, what may still be asked, and how it ended."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter
from typing_extensions import TypedDict  # typing's own is not read by pydantic before Python 3.12

from ..inference.base import SamplingParams
from ..types import Episode, EpisodeLimits, Step, StopReason, TokenIds, renamed_keyword
from .bodies import is_finite
from .conversation import Answer, Message, RequestError

T = TypeVar("T")

Observation = str | list[Message]


def key_digest(key: str) -> str:
    """What is kept of a key: enough to know it again, not enough to use it."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


@renamed_keyword("row_index", "stream_position")
@dataclass(frozen=True)
class SessionSpec:
    """
    What an episode is allowed.

    Args:
        limits ([`EpisodeLimits`], *optional*):
            Its budgets.
        sampling ([`SamplingParams`], *optional*):
            How its responses are sampled. Stop tokens: those of the chat template where there are none here.
        training (`bool`, *optional*, defaults to `True`):
            Whether `sampling` holds whatever a client asks for, so that every step can be scored exactly. If not,
            clients choose within it.
        run_seed, stream_position, generation_index (`int`, *optional*):
            Where the episode stands in its run: they seed its responses.
        dataset_row (`int`, *optional*):
            Which row of the dataset it plays; it is recorded.
    """

    limits: EpisodeLimits = field(default_factory=EpisodeLimits)
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_new_tokens=512))
    training: bool = True
    run_seed: int = 0
    stream_position: int = 0
    generation_index: int = 0
    dataset_row: int | None = None

    def to_json(self) -> dict[str, Any]:
        """For the store, as it will be read from there."""
        data = asdict(self)
        data["sampling"]["stop_token_ids"] = list(self.sampling.stop_token_ids)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SessionSpec:
        """What [`to_json`] gave; an error of any kind for what it never gives."""
        for name, kind in (("limits", EpisodeLimits), ("sampling", SamplingParams)):
            _check_names(kind, data[name])
        older = {"stream_position": data["row_index"]} if "row_index" in data else {}
        return _read(cls, {**{name: value for name, value in data.items() if name != "row_index"}, **older})


@dataclass(frozen=True)
class RecordedStep:
    """
    One step, as what it adds to the one it continues.

    Args:
        seed_index (`int`):
            What its response was seeded with, beside the episode's place in the run.
        parent (`int`, *optional*):
            Position of the step that it continues.
        new_ids (`array`):
            The prompt behind that step's response; all of it where there is no parent.
        response_ids (`array`), logprobs (`array`):
            What was sampled.
        stop_reason, policy_version, temperature:
            As in [`Step`].
        observed (`str` or `list[dict]`):
            What the parent was answered.
        history (`str`):
            See [`~gateway.placement.Placement`].
        asked_key (`str`, *optional*):
            Of the conversation that it answers; `None` where that is no messages.
        key (`str`):
            Of the conversation with its response.
        text_length (`int`, *optional*):
            Characters of prompt and response, where the prompt was text.
        request (`str`):
            Which request it answers.
        answer ([`Answer`]):
            What the client is told of it.
        escaped (`int`, *optional*, defaults to `0`):
            See [`~gateway.placement.Placement`].
    """

    seed_index: int
    parent: int | None
    new_ids: array[int]
    response_ids: array[int]
    logprobs: array[float]
    stop_reason: StopReason
    policy_version: int
    temperature: float
    observed: Observation
    history: str
    asked_key: str | None
    key: str
    text_length: int | None
    request: str
    answer: Answer
    escaped: int = 0

    def to_json(self) -> dict[str, Any]:
        """For the store, bit for bit; log-probabilities are in it once."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        packed = {name: _pack(data[name]) for name in ("new_ids", "response_ids", "logprobs")}
        answer = {name: value for name, value in vars(self.answer).items() if name != "logprobs"}
        return {**data, **packed, "stop_reason": self.stop_reason.value, "answer": answer}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, position: int) -> RecordedStep:
        """What [`to_json`] gave of the step at a position; an error of any kind for what it never gives."""
        new_ids, response_ids = _unpack("i", data["new_ids"]), _unpack("i", data["response_ids"])
        logprobs = _unpack("d", data["logprobs"])
        answer = {**data["answer"], "logprobs": logprobs.tolist() if data["answer"]["tokens"] else []}
        step = cls(
            **{
                **data,
                "new_ids": new_ids,
                "response_ids": response_ids,
                "logprobs": logprobs,
                "stop_reason": StopReason(data["stop_reason"]),
                "answer": _read(Answer, answer),
            }
        )
        plain = {name: data[name] for name in _PLAIN}
        _adapter(_PlainFields).validate_json(json.dumps(plain), strict=True)
        if not (response_ids and len(logprobs) == len(response_ids) and is_finite([*logprobs, step.temperature])):
            raise ValueError(f"{len(response_ids)} ids and {len(logprobs)} log-probabilities are no response")
        if min(*response_ids, *new_ids, 0) < 0 or not (new_ids or step.parent is not None):
            raise ValueError("its ids are no token ids, or it has no prompt")
        for key in (step.key, step.asked_key or ""):
            bytes.fromhex(key)
        if step.parent is not None and not 0 <= step.parent < position:
            raise ValueError(f"step {position} continues step {step.parent}")
        return step


class _PlainFields(TypedDict):
    """The fields of a [`RecordedStep`] that JSON holds as they are."""

    seed_index: int
    parent: int | None
    policy_version: int
    temperature: float
    observed: str | list[Message]
    history: str
    asked_key: str | None
    key: str
    text_length: int | None
    request: str


_PLAIN = tuple(_PlainFields.__annotations__)


def _read(kind: type[T], data: Mapping[str, Any]) -> T:
    """A dataclass whose fields are what they are declared to be."""
    _check_names(kind, data)
    if not is_finite(data):
        raise ValueError("a number is none")
    return cast(T, _adapter(cast(Any, kind)).validate_json(json.dumps(data), strict=True))


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _check_names(kind: type[Any], data: Mapping[str, Any]) -> None:
    unknown = set(data) - {one.name for one in fields(kind)}
    if unknown:
        raise ValueError(f"{kind.__name__} has no {sorted(unknown)}")


def _pack(values: array[Any]) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _unpack(kind: str, text: str) -> array[Any]:
    values: array[Any] = array(kind)
    values.frombytes(base64.b64decode(text))
    return values


@dataclass
class Notes:
    """
    What is known of a session beside its steps, which is written whole whenever it changes. Keys of dictionaries are
    positions of steps, as text, because JSON has no other keys.
    """

    created: float = field(default_factory=time.time)
    rewards: dict[str, float] = field(default_factory=dict)
    state_keys: dict[str, Any] = field(default_factory=dict)
    observations: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    final_reward: float = 0.0
    undelivered: list[int] = field(default_factory=list)  # whose client was not told of it to the end (yet)
    unanswered: list[int] = field(default_factory=list)  # whose client was still at work when time was up
    stop_reason: str | None = None  # of an episode that a budget cut
    cut: bool = False  # the last response, by the episode's budget of tokens
    terminated: bool = False  # the agent said that its environment ended the episode
    final_parent: int | None = None  # the state after the last step: this step's, with its response,
    final_new_ids: list[int] | None = None  # and this
    error: str | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, num_steps: int) -> Notes:
        """What is in the store of a session with so many steps; an error of any kind for what cannot be."""
        notes = _read(cls, data)
        named = [int(name) for kept in (notes.rewards, notes.state_keys, notes.observations) for name in kept]
        of_parent = [] if notes.final_parent is None else [notes.final_parent]
        positions = {*named, *notes.undelivered, *notes.unanswered, *of_parent}
        if not positions <= set(range(num_steps)):
            raise ValueError(f"it has {num_steps} steps, and something is noted of steps {sorted(positions)}")
        if notes.stop_reason is not None:
            StopReason(notes.stop_reason)
        if any(not 0 <= token_id < 2**31 for token_id in notes.final_new_ids or ()):
            raise ValueError("the ids of its last state are no token ids")
        return notes


@dataclass(frozen=True)
class _Place:
    """Where a step lies in the buffer of its branch."""

    branch: int
    prompt_length: int
    end: int


class Session:
    """
    One episode's record. Steps are added whole, by [`commit`]; nothing else changes them.

    Args:
        session_id (`str`):
            Unique, and no secret.
        name (`str`):
            The episode's id.
        digest (`str`):
            Of its key ([`key_digest`]).
        spec ([`SessionSpec`]):
            What it is allowed.
        notes ([`Notes`], *optional*):
            What is known already.
        is_over (`bool`, *optional*, defaults to `False`):
            Whether it is finished.
    """

    def __init__(
        self,
        session_id: str,
        name: str,
        digest: str,
        spec: SessionSpec,
        notes: Notes | None = None,
        *,
        is_over: bool = False,
    ) -> None:
        self.session_id = session_id
        self.name = name
        self.digest = digest
        self.spec = spec
        self.notes = notes or Notes()
        self.steps: list[RecordedStep] = []
        self.is_over = is_over
        self.sampler_error: Exception | None = None  # of the last request, if the sampler failed
        self.ending = asyncio.Lock()
        self.turn = asyncio.Lock()  # of its work beside the loop
        self.lost: set[int] = set()  # steps whose client went away while it was told
        self.last_active = time.monotonic()
        # The wall clock may be set while an episode lasts; only what was stored before a restart has no other.
        earlier_s = 0.0 if notes is None else max(0.0, time.time() - notes.created)
        self.began = self.last_active - earlier_s
        self._branches: list[array[int]] = []
        self._places: list[_Place] = []
        self._children: dict[int, int] = {}  # the first of each

    # -- steps --------------------------------------------------------------------------------------------------------

    def commit(self, step: RecordedStep) -> int:
        """Add a step that is in the store; its position."""
        position = len(self.steps)
        branch = self._branch_behind(step.parent)
        buffer = self._branches[branch]
        buffer.extend(step.new_ids)
        prompt_length = len(buffer)
        buffer.extend(step.response_ids)
        self._places.append(_Place(branch, prompt_length, len(buffer)))
        self.steps.append(step)
        if step.parent is not None:
            self._children.setdefault(step.parent, position)
        return position

    def _branch_behind(self, parent: int | None) -> int:
        """A buffer that ends with a step's response: its own while nothing follows there, else a copy."""
        if parent is None:
            self._branches.append(array("i"))
            return len(self._branches) - 1
        place = self._places[parent]
        if len(self._branches[place.branch]) == place.end:
            return place.branch
        self._branches.append(self._branches[place.branch][: place.end])
        return len(self._branches) - 1

    def state_ids(self, position: int | None) -> list[int]:
        """The ids up to the end of a step's response."""
        if position is None:
            return []
        place = self._places[position]
        return self._branches[place.branch][: place.end].tolist()

    def state_length(self, position: int | None) -> int:
        """How many ids [`state_ids`] has."""
        return 0 if position is None else self._places[position].end

    def has_child(self, position: int) -> bool:
        """Whether a step was continued."""
        return position in self._children

    def add(self, step: RecordedStep) -> None:
        """A step that was just recorded: nobody was told of it yet."""
        self.notes.undelivered.append(self.commit(step))

    def told_of(self, answer: Answer, *, to_the_end: bool = True) -> None:
        """
        A client was told of an answer, or went away while it was. What is heard when the session is over comes too
        late: how it ended has been decided.
        """
        found = [p for p in self.notes.undelivered if self.steps[p].answer.answer_id == answer.answer_id]
        if not found or self.is_over:
            return
        if to_the_end:
            self.notes.undelivered.remove(found[0])
            self.lost.discard(found[0])
        else:
            self.lost.add(found[0])

    def visible(self) -> list[int]:
        """The positions of the steps that count: not those whose client never learned of them, or did not go on."""
        left_out = {p for p in self.notes.undelivered if not self.has_child(p)} | set(self.notes.unanswered)
        return [position for position in range(len(self.steps)) if position not in left_out]

    def position_of(self, step: int | str | None) -> int:
        """
        The step of that index or that answer's id; the last one where none is named.

        Raises:
            RequestError: There is no such step.
        """
        visible = self.visible()
        if step is None and visible:
            return visible[-1]
        if isinstance(step, int) and 0 <= step < len(visible):
            return visible[step]
        if isinstance(step, str):
            found = [p for p in range(len(self.steps)) if self.steps[p].answer.answer_id == step]
            for position in found:
                self.told_of(self.steps[position].answer)  # or it would not know the name
            if found and found[0] in self.visible():
                return found[0]
        what = "any step yet" if step is None else f"the step {step!r}"
        raise RequestError(404, f"this session does not have {what}; it has {len(visible)}", param="step")

    # -- budgets ------------------------------------------------------------------------------------------------------

    def check_budget(self, prompt_length: int, num_in_flight: int) -> StopReason | None:
        """
        Which budget is used up before the next step, if one is.

        Raises:
            RequestError: It would be, once the requests in flight are answered.
        """
        limits, num_steps = self.spec.limits, len(self.steps) - len(self.lost)
        if self.is_out_of_time:
            return StopReason.MAX_EPISODE_S
        if self.notes.cut:
            return StopReason.MAX_EPISODE_TOKENS
        if not limits.allows_step(num_steps):
            return StopReason.MAX_INTERACTION_STEPS
        if not limits.allows_step(num_steps + num_in_flight):
            raise RequestError(429, "this episode's last steps are being sampled", code="steps", retry_after_s=1.0)
        if limits.max_prompt_length is not None and prompt_length > limits.max_prompt_length:
            return StopReason.MAX_PROMPT_LENGTH
        if limits.max_episode_tokens is not None and prompt_length >= limits.max_episode_tokens:
            return StopReason.MAX_EPISODE_TOKENS
        return None

    def age_s(self) -> float:
        """Seconds since it was made, restarts included."""
        return time.monotonic() - self.began

    @property
    def is_out_of_time(self) -> bool:
        """Whether it has lasted longer than it may."""
        return self.spec.limits.max_episode_s is not None and self.age_s() > self.spec.limits.max_episode_s

    def end_by(self, budget: StopReason, parent: int | None, new_ids: list[int], observed: Observation) -> None:
        """A budget cut the episode before a step that would have continued `parent`."""
        if self.ended_early:
            return
        if not self.visible():
            self.notes.error = self._no_step(budget, len(new_ids))
            return
        self.notes.stop_reason = budget.value
        self.notes.final_parent, self.notes.final_new_ids = parent, list(new_ids)
        if parent is not None and not self.has_child(parent):
            self.notes.observations.setdefault(str(parent), observed)

    def end_by_time(self) -> None:
        """
        Time was up while the client was at work. As in the rollout's own loop, a step that is not answered by then
        does not count: the state before it is the last.
        """
        if self.ended_early:
            return
        visible = self.visible()
        if visible and str(visible[-1]) in self.notes.rewards:
            self.notes.stop_reason = StopReason.MAX_EPISODE_S.value
        elif visible:
            self.notes.unanswered.append(visible[-1])
            step = self.steps[visible[-1]]
            self.end_by(StopReason.MAX_EPISODE_S, step.parent, step.new_ids.tolist(), step.observed)
        else:
            self.notes.error = self._no_step(StopReason.MAX_EPISODE_S, 0)

    def _no_step(self, budget: StopReason, num_prompt_tokens: int) -> str:
        """Why there is nothing to train on."""
        limits = self.spec.limits
        if budget is StopReason.MAX_EPISODE_S:
            return f"the episode took longer than {limits.max_episode_s:g} s, without one step"
        if self.steps:
            return "the client went away before it was told of any step"
        limit = {
            StopReason.MAX_PROMPT_LENGTH: limits.max_prompt_length,
            StopReason.MAX_EPISODE_TOKENS: limits.max_episode_tokens,
        }[budget]
        return f"the first prompt has {num_prompt_tokens} tokens; `{budget.value}` is {limit}, and no step fits"

    @property
    def ended_early(self) -> bool:
        """Whether a budget or an error ended it, so that nothing more may be asked."""
        return self.notes.stop_reason is not None or self.notes.error is not None

    # -- the result ---------------------------------------------------------------------------------------------------

    def episode(self) -> Episode:
        """The record as an episode, as the rollout's own loop would have made it."""
        notes, visible = self.notes, self.visible()
        error = notes.error if visible or notes.error else "the agent asked for no step"
        reason = self.end_reason()
        truncated = reason not in (StopReason.ERROR, StopReason.ENVIRONMENT)
        buffers = [TokenIds(branch) for branch in self._branches]
        steps = tuple(
            self._step(buffers, position, index, is_last=index == len(visible) - 1)
            for index, position in enumerate(visible)
        )
        final = None
        if truncated and notes.final_new_ids is not None:
            final = TokenIds([*self.state_ids(notes.final_parent), *notes.final_new_ids])
        elif truncated:  # nothing was asked behind the last response
            final = TokenIds(self.state_ids(visible[-1]))
        return Episode(
            self.name,
            stream_position=self.spec.stream_position,
            generation_index=self.spec.generation_index,
            dataset_row=self.spec.dataset_row,
            steps=steps,
            terminated=error is None and not truncated,
            truncated=truncated,
            final_prompt_ids=final,
            error=error,
            metrics=self._metrics(visible),
            stop_reason=reason,
        )

    def end_reason(self) -> StopReason:
        """
        How the episode ended. A reward does not say that the environment ended it: agents pay for cut responses as for
        others. So an agent whose environment ended it with a cut response has to say so.
        """
        visible = self.visible()
        if self.notes.error is not None or not visible:
            return StopReason.ERROR
        if self.notes.stop_reason:
            return StopReason(self.notes.stop_reason)
        if self.notes.terminated:
            return StopReason.ENVIRONMENT
        if self.notes.cut:
            return StopReason.MAX_EPISODE_TOKENS
        is_cut = self.steps[visible[-1]].stop_reason is StopReason.LENGTH
        return StopReason.RESPONSE_LENGTH if is_cut else StopReason.ENVIRONMENT

    def _step(self, buffers: list[TokenIds], position: int, index: int, *, is_last: bool) -> Step:
        recorded, place, name = self.steps[position], self._places[position], str(position)
        buffer = buffers[place.branch]
        child = self._children.get(position)
        observed = self.steps[child].observed if child is not None else ""
        return Step(
            prompt_ids=buffer[: place.prompt_length],
            response_ids=buffer[place.prompt_length : place.end],
            rollout_logprobs=tuple(recorded.logprobs),
            reward=self.notes.rewards.get(name, 0.0) + (self.notes.final_reward if is_last else 0.0),
            step_index=index,
            policy_version=recorded.policy_version,
            temperature=recorded.temperature,
            stop_reason=recorded.stop_reason,
            observation=self.notes.observations.get(name, observed),
            info={"state_key": self.notes.state_keys[name]} if name in self.notes.state_keys else {},
        )

    def _metrics(self, visible: list[int]) -> dict[str, float]:
        """The agent's own, and what is worth knowing of how its steps hang together; nothing where they just grow."""
        counts = {
            "branches": sum(self.steps[position].history == "branch" for position in visible),
            "rewritten_histories": sum(self.steps[position].history == "rewritten" for position in visible),
            "undelivered_steps": len(self.steps) - len(visible),
            "escaped_special_tokens": sum(self.steps[position].escaped for position in visible),
        }
        return {**{name: float(count) for name, count in counts.items() if count}, **self.notes.metrics}


def budget_error(session: Session) -> RequestError:
    """What a client is told that asks for more than its episode has."""
    reason = session.notes.stop_reason or "error"
    return RequestError(
        400,
        f"this episode is over ({reason}): no further step is sampled; end the agent's run",
        code="episode_over",
    )
