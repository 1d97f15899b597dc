"""The gateway without HTTP: one request of a session in, one recorded step and its answer out."""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import secrets
import sqlite3
import time
from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from ..errors import ConfigurationError, DataError
from ..inference.base import MIN_TEMPERATURE, Sample, SamplingParams, step_seed
from ..types import Episode, StopReason, TokenIds, num_shared
from .conversation import Answer, ModelRequest, RequestError, context_error
from .monitor import Monitor
from .sampling import SamplingPort
from .sessions import Notes, RecordedStep, Session, SessionSpec, budget_error, conversation_key, key_digest
from .store import Store, StoredSession, report_damage
from .tokens import ChatFormats, Placement, place, place_beside, read_response, token_texts
from .work import INLINE_BYTES, Worker

logger = logging.getLogger(__name__)

_SHOWN = 60  # tokens of a difference that are logged


@dataclass(frozen=True)
class Retry:
    """
    What a client says of a request beside its body.

    Args:
        request (`str`):
            The request's key; retries have the same.
        is_retry (`bool`, *optional*):
            Whether it has asked this before, where it says so.
        idempotency_key (`str`, *optional*):
            Two requests with different ones are not the same, whatever their bodies.
    """

    request: str
    is_retry: bool | None = None
    idempotency_key: str | None = None

    @property
    def name(self) -> str:
        """The name under which its step is recorded."""
        return self.request if self.idempotency_key is None else f"{self.request}/{key_digest(self.idempotency_key)}"


@dataclass(eq=False)
class _Flight:
    """A request on its way; retries wait for the same one."""

    name: str
    seed_index: int
    placement: Placement | None = None  # unknown while that is found out
    task: asyncio.Task[Answer] | None = None
    alarm: asyncio.TimerHandle | None = None  # when the episode's time is up
    num_waiting: int = 0
    is_recording: bool = False  # from here on it is recorded, whoever goes away
    is_given_up: bool = False  # nobody waits for it any more


@dataclass(frozen=True)
class Reply:
    """An answer, and what its client has to be told beside it."""

    answer: Answer
    notes: tuple[str, ...] = ()


class Gateway:
    """
    Sessions, and what their agents ask. All methods run in one event loop.

    Args:
        formats ([`ChatFormats`]):
            Messages to ids and back.
        port ([`SamplingPort`]):
            Where responses come from.
        store ([`Store`], *optional*):
            Where sessions are kept; in memory if not given.
        monitor ([`Monitor`], *optional*):
            Counts.
        admin_key (`str`, *optional*):
            Who has it may make sessions and read all of them over HTTP; without one, nobody may.
        model_name (`str`, *optional*, defaults to `"policy"`):
            What `/v1/models` calls the policy. Requests may call it anything.
        context (`int`, *optional*):
            Most tokens of a prompt with its response that the policy can read; `None`: no bound is known. A longer
            prompt is refused, and a response gets what is left.
    """

    def __init__(
        self,
        formats: ChatFormats,
        port: SamplingPort,
        *,
        store: Store | None = None,
        monitor: Monitor | None = None,
        admin_key: str | None = None,
        model_name: str = "policy",
        context: int | None = None,
    ) -> None:
        self.formats = formats
        self.context = context
        self.worker = Worker()
        self.port = port
        self.store = store or Store()
        self.monitor = monitor or Monitor()
        self.model_name = model_name
        self.started = int(time.time())
        self._admin_digest = None if admin_key is None else key_digest(admin_key)
        self._sessions: dict[str, Session] = {}
        self._by_digest: dict[str, Session] = {}
        self._flights: dict[str, list[_Flight]] = {}
        self._logged: set[str] = set()
        self.monitor.watch(num_sessions=lambda: len(self._sessions), is_paused=lambda: self.port.is_paused)

    # -- who is who ---------------------------------------------------------------------------------------------------

    def session_of(self, key: str | None) -> Session:
        """
        The session of a key.

        Raises:
            RequestError: It is nobody's.
        """
        digest = key_digest(key or "")
        session = self._by_digest.get(digest)
        if session is None or not hmac.compare_digest(session.digest, digest):
            if self._admin_digest is not None and hmac.compare_digest(self._admin_digest, digest):
                raise RequestError(
                    401,
                    "this is the admin's key, which opens sessions (POST /sessions); ask with the key of one of them",
                    code="invalid_api_key",
                )
            raise unauthorized()
        if not session.ended_early:  # who asks on and on behind its end is not at work
            session.last_active = time.monotonic()
        return session

    async def finished_session_of(self, key: str | None) -> Session | None:
        """The finished session whose key this was, from the store."""
        stored = await asyncio.wrap_future(self.store.of_key(key_digest(key or "")))
        return restored(stored) if stored is not None and stored.is_over else None

    def check_admin(self, key: str | None) -> None:
        """Raises a `RequestError` for any key but the admin's."""
        if self._admin_digest is None or not hmac.compare_digest(self._admin_digest, key_digest(key or "")):
            raise unauthorized()

    # -- sessions -----------------------------------------------------------------------------------------------------

    async def open_session(self, spec: SessionSpec, *, name: str | None = None) -> tuple[Session, str]:
        """A new session and its key, which is not kept."""
        session_id, key = secrets.token_hex(8), f"sk-steppo-{secrets.token_urlsafe(32)}"
        session = Session(session_id, name or session_id, key_digest(key), spec)
        self._add(session)
        notes = asdict(session.notes)
        await _written(self.store.add_session(session_id, session.name, session.digest, spec.to_json(), notes))
        return session, key

    def restore(self) -> int:
        """
        Take up the sessions that were running when the store was last used, but for those whose record is damaged; how
        many there are.
        """
        found = [session for session in map(restored, self.store.running()) if session is not None]
        for session in found:
            self._add(session)
        return len(found)

    def finished_episode(self, name: str, spec: SessionSpec) -> Episode | None:
        """What a session of this name left in the store, if it ended without an error and was allowed the same."""
        for one in self.store.named(name):
            session = restored(one) if one.is_over else None
            if session is not None and session.spec == spec and (episode := session.episode()).valid:
                return episode
        return None

    async def set_reward(
        self,
        session: Session,
        reward: float,
        *,
        step: int | str | None = None,
        state_key: Any = None,
        observation: Any = None,
    ) -> int:
        """What a step is paid, instead of what it was told to be paid before; the step's index."""
        position = session.position_of(step)
        session.notes.rewards[str(position)] = reward
        if state_key is not None:
            session.notes.state_keys[str(position)] = state_key
        if observation is not None:
            session.notes.observations[str(position)] = observation
        await self._save(session)
        return session.visible().index(position)

    async def finish(
        self,
        session: Session,
        *,
        reward: float | None = None,
        metrics: Mapping[str, float] | None = None,
        observation: Any = None,
        error: str | None = None,
        out_of_time: bool = False,
        terminated: bool = False,
    ) -> None:
        """
        The episode is over: its key is nobody's from now on. This alone decides how it ended; whoever calls it again
        can still say what the episode is paid, or that it failed.

        Args:
            session ([`Session`]):
                Which.
            reward (`float`, *optional*), metrics (`Mapping[str, float]`, *optional*), observation (*optional*):
                Of the last step; of the episode; what the last step was answered.
            error (`str`, *optional*):
                Why it failed.
            out_of_time (`bool`, *optional*, defaults to `False`):
                Whether it ends because its time is up, so that what its client is still at does not count.
            terminated (`bool`, *optional*, defaults to `False`):
                Whether the agent's environment ended the episode. Without that, an episode whose last response was
                cut at its length is truncated.
        """
        async with session.ending:
            if not session.is_over:
                session.is_over = True  # no request begins from here on
                flights = await self._land(session)
                session.notes.terminated = terminated
                if out_of_time:
                    _end_by_time(session, flights)
            if reward is not None:
                session.notes.final_reward = reward
            session.notes.metrics |= metrics or {}
            visible = session.visible()
            if observation is not None and visible:
                session.notes.observations[str(visible[-1])] = observation
            if error is not None:
                session.notes.error = error
            await self._save(session)
            if self._sessions.pop(session.session_id, None) is not None:
                self._by_digest.pop(session.digest, None)
                self._flights.pop(session.session_id, None)
                self.port.release(session.session_id)
                self.monitor.undelivered.inc(len(session.steps) - len(visible) - len(session.notes.unanswered))
                ending = session.end_reason()
                self.monitor.episodes.labels("end" if ending is StopReason.ENVIRONMENT else ending.value).inc()

    async def finish_idle(self, idle_s: float) -> None:
        """Finish the sessions whose agents have asked for nothing in so long."""
        for session in list(self._sessions.values()):
            if not self.is_idle(session, idle_s):
                continue
            if session.is_out_of_time:
                await self.finish(session, out_of_time=True)
            else:
                error = f"the agent asked for nothing in {idle_s:g} s, and was given up"
                await self.finish(session, error=None if session.ended_early or session.is_over else error)

    async def collect(self, session: Session, *, keep: bool = True) -> Episode:
        """The episode of a finished session, which stays in the store if it is to be kept there."""
        if not keep:
            await _written(self.store.remove(session.session_id))
        return session.episode()

    def find(self, session_id: str) -> Session:
        """The session of that id, for the admin; from the store if it is over. A `RequestError` if there is none."""
        if session_id in self._sessions:
            return self._sessions[session_id]
        stored = self.store.session(session_id)
        session = None if stored is None else restored(stored)
        if session is None:
            raise RequestError(404, f"there is no session {session_id!r} that can be read", param="session_id")
        return session

    def __contains__(self, session_id: str) -> bool:
        """Whether a session is running."""
        return session_id in self._sessions

    def num_in_flight(self, session: Session) -> int:
        """How many of its requests are on their way."""
        return len(self._flights.get(session.session_id, ()))

    def is_idle(self, session: Session, idle_s: float) -> bool:
        """Whether its agent has asked for nothing in so long; what it asks for behind its end does not count."""
        return time.monotonic() - session.last_active > idle_s and not self.num_in_flight(session)

    def _add(self, session: Session) -> None:
        self._sessions[session.session_id] = session
        self._by_digest[session.digest] = session

    async def _save(self, session: Session) -> None:
        saved = self.store.set_notes(session.session_id, asdict(session.notes), is_over=session.is_over)
        await _written(saved)

    async def _land(self, session: Session) -> list[_Flight]:
        """
        No request of a finished session is left: those that are being recorded are, the others are given up. Which
        ones there were.
        """
        flights = list(self._flights.get(session.session_id, ()))
        tasks = [flight.task for flight in flights if flight.task is not None]
        for flight in flights:
            if flight.task is not None and not flight.is_recording:
                flight.task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        return flights

    # -- a request ----------------------------------------------------------------------------------------------------

    async def respond(self, session: Session, request: ModelRequest, retry: Retry) -> Reply:
        """
        Answer a request by a new step, or a retry by the step that it got.

        Raises:
            RequestError: The request cannot be answered as it is; the episode is over; the sampler failed.
        """
        if session.is_over:  # since its key was checked
            raise unauthorized()
        flights = self._flights.setdefault(session.session_id, [])
        before = self._asked_before(session, retry, flights)
        if before is not None:
            self.monitor.retries.inc()
        if isinstance(before, int):
            session.lost.discard(before)  # it is being told of again
            return Reply(session.steps[before].answer)
        if before is not None:
            return Reply(await self._wait_for(session, before))
        notes = self._check_wishes(session, request)
        flight = self._start(session, request, retry, flights)
        return Reply(await self._wait_for(session, flight), notes)

    def _asked_before(self, session: Session, retry: Retry, flights: list[_Flight]) -> int | _Flight | None:
        """
        Where a request is that was asked before: recorded, or on its way. There are as many steps as clients asked for
        the first time, where they say so; but what one was never told of is the next one's: it may have started over.
        """
        same = [position for position, step in enumerate(session.steps) if step.request == retry.name]
        is_first = retry.is_retry is False and retry.idempotency_key is None
        untold = [
            position for position in same if position in (session.lost if is_first else session.notes.undelivered)
        ]
        if untold:
            return untold[-1]
        if is_first:
            session.num_firsts[retry.name] += 1
            return None
        in_flight = [one for one in flights if one.name == retry.name and not one.is_given_up]
        if len(same) + len(in_flight) < session.num_firsts[retry.name] and retry.is_retry:
            return None  # its first attempt left nothing; what there is is others'
        if in_flight:
            return min(in_flight, key=lambda one: one.num_waiting)
        if same and (retry.is_retry or retry.idempotency_key is not None or same[-1] == len(session.steps) - 1):
            return same[-1]
        return None

    def _start(self, session: Session, request: ModelRequest, retry: Retry, flights: list[_Flight]) -> _Flight:
        """Begin a step: nothing is recorded yet. What takes as long as the request is long is done beside the loop."""
        if session.ended_early:
            raise budget_error(session)
        if self.context is not None and isinstance(request.prompt, tuple) and len(request.prompt) >= self.context:
            raise context_error(self.context, f"this prompt has {len(request.prompt)}", request)
        taken = {step.seed_index for step in session.steps} | {flight.seed_index for flight in flights}
        flight = _Flight(retry.name, next(i for i in range(len(taken) + 1) if i not in taken))
        if request.size <= INLINE_BYTES and self.formats.knows(request.tools):
            placement = place(request, session, self.formats, self.context)
            flying = self._fly(
                session, request, flight, self._admit(session, request, flight, placement, len(flights))
            )
        else:
            flying = self._place_and_fly(session, request, flight)
        flights.append(flight)
        flight.task = asyncio.ensure_future(flying)
        flight.task.add_done_callback(lambda _: self._end(session, flight))
        if session.spec.limits.max_episode_s is not None:
            left_s = session.spec.limits.max_episode_s - session.age_s()
            flight.alarm = asyncio.get_running_loop().call_later(left_s, self._end_in_flight, session)
        return flight

    async def _place_and_fly(self, session: Session, request: ModelRequest, flight: _Flight) -> Answer:
        run = partial(self.worker.run, session.turn)
        placement = await place_beside(request, session, self.formats, self.context, run)
        if session.ended_early:  # meanwhile
            raise budget_error(session)
        num_before = self._flights[session.session_id].index(flight)
        prompt_ids = self._admit(session, request, flight, placement, num_before)
        return await self._fly(session, request, flight, prompt_ids)

    def _admit(
        self, session: Session, request: ModelRequest, flight: _Flight, placement: Placement, num_before: int
    ) -> list[int]:
        """The prompt of a step that the session's budgets, and the model's context, allow."""
        if placement.parent is not None:  # who goes on from an answer was told of it
            session.told_of(session.steps[placement.parent].answer)
        prompt_ids = [*session.state_ids(placement.parent), *placement.new_ids]
        over = session.check_budget(len(prompt_ids), num_before)
        if over is not None:
            session.end_by(over, placement.parent, placement.new_ids, placement.observed)
            raise budget_error(session)
        if self.context is not None and len(prompt_ids) >= self.context:
            raise context_error(self.context, f"this prompt has {len(prompt_ids)}", request)
        if placement.rewritten is not None:
            self._report_mismatch(session, placement.rewritten, prompt_ids)
        flight.placement = placement
        return prompt_ids

    def _end_in_flight(self, session: Session) -> None:
        """Time is up while responses are sampled: those that are not recorded by now are given up."""
        flights = [one for one in self._flights.get(session.session_id, ()) if not one.is_recording]
        if flights and not session.is_over:
            _end_by_time(session, flights)
            for flight in flights:
                assert flight.task is not None
                flight.task.cancel()

    async def _wait_for(self, session: Session, flight: _Flight) -> Answer:
        """Several may wait; when the last one goes away, what it waited for is given up."""
        assert flight.task is not None
        flight.num_waiting += 1
        try:
            return await asyncio.shield(flight.task)
        except asyncio.CancelledError:
            if flight.task.cancelled():  # by us, not the one who waits
                raise (unauthorized() if session.is_over else budget_error(session)) from None
            raise
        finally:
            flight.num_waiting -= 1
            if flight.num_waiting == 0 and not flight.is_recording and not flight.task.done():
                flight.is_given_up = True
                flight.task.cancel()

    def _end(self, session: Session, flight: _Flight) -> None:
        flights = self._flights.get(session.session_id, [])
        if flight in flights:
            flights.remove(flight)
        if flight.alarm is not None:
            flight.alarm.cancel()
        session.last_active = time.monotonic()
        assert flight.task is not None
        if not flight.task.cancelled() and flight.task.exception() is None and flight.num_waiting == 0:
            session.told_of(flight.task.result(), to_the_end=False)

    async def _fly(self, session: Session, request: ModelRequest, flight: _Flight, prompt_ids: list[int]) -> Answer:
        placement = flight.placement
        assert placement is not None
        params = self._params(session, request, flight, len(prompt_ids))
        sample = await self._sample(session, prompt_ids, params, flight.seed_index)
        record = partial(self._record, request, flight, prompt_ids, params, sample)
        is_long = len(prompt_ids) + len(sample.token_ids) > INLINE_BYTES
        step = await self.worker.run(session.turn, record) if is_long else record()
        flight.is_recording = True
        async with session.recording:  # steps are in the store in the order in which they are in memory
            try:
                await _written(self.store.add_step(session.session_id, len(session.steps), step.to_json()))
            except sqlite3.Error as error:
                logger.error("a step of session %s cannot be recorded", session.session_id, exc_info=True)
                raise RequestError(502, "the step cannot be recorded", code="store") from error
            session.add(step)
        if step.stop_reason is StopReason.LENGTH and self._ends_episode(session, request, params, len(prompt_ids)):
            session.notes.cut = True
            await self._save(session)
        self.monitor.steps.labels(placement.history).inc()
        self.monitor.tokens.labels("kept").inc(len(prompt_ids) - len(placement.new_ids))
        self.monitor.tokens.labels("tokenized").inc(len(placement.new_ids))
        self.monitor.tokens.labels("sampled").inc(len(step.response_ids))
        return step.answer

    async def _sample(
        self, session: Session, prompt_ids: list[int], params: SamplingParams, seed_index: int
    ) -> Sample:
        order = (session.spec.stream_position, session.spec.generation_index, seed_index)
        try:
            sample = await self.port.sample(prompt_ids, params, session_id=session.session_id, order=order)
        except RequestError:
            raise
        except (ConfigurationError, DataError) as error:  # more than the engine can take
            raise RequestError(400, str(error)) from error
        except Exception as error:
            session.sampler_error = error
            self.monitor.upstream_failures.inc()
            logger.warning("sampling for session %s failed", session.session_id, exc_info=True)
            raise RequestError(502, f"sampling failed: {type(error).__name__}", code="upstream") from error
        session.sampler_error = None
        if not len(sample.token_ids):
            self.monitor.upstream_failures.inc()
            raise RequestError(502, "the sampler returned an empty response", code="upstream")
        return sample

    def _record(
        self,
        request: ModelRequest,
        flight: _Flight,
        prompt_ids: list[int],
        params: SamplingParams,
        sample: Sample,
    ) -> RecordedStep:
        placement = flight.placement
        assert placement is not None
        chat = placement.chat
        name = secrets.token_hex(12)
        read = read_response(chat, request, prompt_ids, TokenIds(sample.token_ids).tolist(), name=name)
        logprobs = sample.logprobs[: len(read.response_ids)]
        stop_reason = StopReason.STOP if read.stop_sequence is not None else sample.stop_reason
        finish = "length" if stop_reason is StopReason.LENGTH else "tool_calls" if read.tool_calls else "stop"
        answer = Answer(
            answer_id=name,
            created=int(time.time()),
            model=request.model,
            text=read.text,
            tool_calls=read.tool_calls,
            reasoning=read.reasoning,
            finish_reason=finish,
            stop_sequence=read.stop_sequence,
            prompt_tokens=len(prompt_ids),
            kept_tokens=len(prompt_ids) - len(placement.new_ids),
            completion_tokens=len(read.response_ids),
            tokens=token_texts(chat, read.response_ids, self.formats) if request.logprobs else (),
            logprobs=tuple(logprobs) if request.logprobs else (),
        )
        written = self.formats.decode(read.response_ids) if isinstance(request.prompt, str) else read.text
        key, text_length = conversation_key(placement.key, request.prompt, answer, written)
        return RecordedStep(
            seed_index=flight.seed_index,
            parent=placement.parent,
            new_ids=array("i", placement.new_ids),
            response_ids=array("i", read.response_ids),
            logprobs=array("d", logprobs),
            stop_reason=stop_reason,
            policy_version=sample.policy_version,
            temperature=params.temperature,
            observed=placement.observed,
            history=placement.history,
            asked_key=None if placement.key is None else placement.key.hex(),
            key=key,
            text_length=text_length,
            request=flight.name,
            answer=answer,
            escaped=placement.escaped,
        )

    # -- sampling settings --------------------------------------------------------------------------------------------

    def _params(self, session: Session, request: ModelRequest, flight: _Flight, prompt_length: int) -> SamplingParams:
        spec, wishes = session.spec, request.wishes
        sampling, limits = spec.sampling, spec.limits
        budget = min(sampling.max_new_tokens, wishes.max_tokens or sampling.max_new_tokens)
        for longest in (limits.max_episode_tokens, self.context):
            if longest is not None:
                budget = min(budget, longest - prompt_length)
        seed = step_seed(spec.run_seed, spec.stream_position, spec.generation_index, flight.seed_index)
        assert flight.placement is not None
        stop = sampling.stop_token_ids or flight.placement.chat.stop_token_ids
        params = replace(sampling, max_new_tokens=budget, stop_token_ids=stop, seed=seed)
        if spec.training:
            return params
        wished = {name: getattr(wishes, name) for name in ("temperature", "top_p", "top_k")}
        if wishes.seed is not None:
            wished["seed"] = wishes.seed & (2**63 - 1)  # seeds of clients may be negative
        return replace(params, **{name: value for name, value in wished.items() if value is not None})

    def _ends_episode(
        self, session: Session, request: ModelRequest, params: SamplingParams, prompt_length: int
    ) -> bool:
        """Whether a response that was cut was cut by the episode's budget of tokens, and not by its own."""
        longest = session.spec.limits.max_episode_tokens
        own = min(session.spec.sampling.max_new_tokens, request.wishes.max_tokens or math.inf)
        return longest is not None and params.max_new_tokens < own and prompt_length + params.max_new_tokens >= longest

    def _check_wishes(self, session: Session, request: ModelRequest) -> tuple[str, ...]:
        """What of the client's wishes does not hold, for it to be told once; what would falsify scores is refused."""
        wishes, sampling = request.wishes, session.spec.sampling
        found = {name: f"{name} is not used" for name in request.ignored}
        if wishes.max_tokens is not None and wishes.max_tokens > sampling.max_new_tokens:
            found["max_tokens"] = f"a response has at most {sampling.max_new_tokens} tokens"
        if session.spec.training:
            restricts = (("top_p", (wishes.top_p or 1.0) < 1.0), ("top_k", (wishes.top_k or 0) > 0))
            for name, is_restricted in restricts:
                if is_restricted:
                    raise RequestError(
                        400,
                        f"`{name}` restricts sampling, so that a training session could not score its steps exactly; "
                        "leave it out (a session that was opened with `training` false takes it)",
                        param=name,
                    )
            if wishes.temperature is not None and wishes.temperature != sampling.temperature:
                found["temperature"] = f"temperature is {sampling.temperature:g}, as the run samples"
            if wishes.seed is not None:
                found["seed"] = "seed is the run's own"
        elif wishes.temperature is not None and 0 < wishes.temperature < MIN_TEMPERATURE:
            problem = f"`temperature` is {wishes.temperature}; give 0, or at least {MIN_TEMPERATURE:g}"
            raise RequestError(400, problem, param="temperature")
        news = {name: text for name, text in found.items() if name not in session.told}
        session.told |= set(news)
        for name, text in news.items():
            if name not in self._logged:
                self._logged.add(name)
                logger.warning("a client asks for another `%s`: %s (told once)", name, text)
        return tuple(news.values())

    def _report_mismatch(self, session: Session, position: int, prompt_ids: list[int]) -> None:
        self.monitor.mismatches.inc()
        if "history" in session.told:
            return
        session.told.add("history")
        recorded = session.state_ids(position)
        at = num_shared(recorded, prompt_ids)
        shown = slice(max(0, at - _SHOWN // 3), at + _SHOWN)
        logger.warning(
            "session %s rewrote its history, which opens a branch: recorded %r, now %r (told once a session)",
            session.session_id,
            self.formats.decode(recorded[shown]),
            self.formats.decode(prompt_ids[shown]),
        )


def _end_by_time(session: Session, flights: list[_Flight]) -> None:
    """Time is up: before the step that is being sampled, or else before the one that waits to be answered."""
    placed = [flight.placement for flight in flights if flight.placement is not None]
    if placed:
        asked = placed[-1]
        session.end_by(StopReason.MAX_EPISODE_S, asked.parent, asked.new_ids, asked.observed)
    else:
        session.end_by_time()


def restored(stored: StoredSession) -> Session | None:
    """A session as it was when the store last heard of it; `None`, and a warning, if that cannot be."""
    try:
        session = Session(
            stored.session_id,
            stored.name,
            stored.key_digest,
            SessionSpec.from_json(stored.spec),
            Notes.from_json(stored.notes, num_steps=len(stored.steps)),
            is_over=stored.is_over,
        )
        for step in stored.steps:
            session.commit(RecordedStep.from_json(step, position=len(session.steps)))
        session.episode()  # all of it fits together
    except Exception as error:  # whatever reading what others wrote may raise
        report_damage(stored.session_id, stored.name, error)
        return None
    if not session.is_over:
        session.notes.undelivered.clear()  # what was being told when it was last written; clients ask again
    return session


def unauthorized() -> RequestError:
    """One answer for all wrong, missing, foreign and finished keys."""
    return RequestError(401, "this key is not valid here", code="invalid_api_key")


async def _written(future: Any) -> None:
    """Wait until something is in the store. Who stops waiting does not keep it from being written."""
    await asyncio.shield(asyncio.wrap_future(future))
