"""Requests on their way, without a sampler and without HTTP: who shares a step, and what is given up when."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

import pytest

pytest.importorskip("starlette", reason="needs the extra `gateway`")
from tests.gateway.gateway_policy import make_spec
from tests.gateway.wire import SAID
from trl_steppo.gateway.conversation import Answer, RequestError
from trl_steppo.gateway.flights import Flight, Flights, Retry, end_by_time
from trl_steppo.gateway.placement import Placement
from trl_steppo.gateway.sessions import Session, SessionStep
from trl_steppo.types import StopReason

T = TypeVar("T")


def make_session(**changes: Any) -> Session:
    return Session("s", "s", "", make_spec(**changes))


def record(session: Session, name: str, *, seed_index: int | None = None) -> SessionStep:
    """A step that answers a request of this name."""
    index = len(session.steps)
    step = SessionStep(
        parent=index - 1 if index else None,
        new_ids=array("i", [1, 2]),
        response_ids=array("i", [3]),
        logprobs=array("d", [-1.0]),
        stop_reason=StopReason.STOP,
        policy_version=0,
        temperature=1.0,
        observed="",
        seed_index=index if seed_index is None else seed_index,
        history="continued" if index else "first",
        asked_key=None,
        key=f"{index:02x}",
        text_length=None,
        request=name,
        answer=replace(SAID, answer_id=f"a{index}"),
    )
    session.add(step)
    return step


def told(session: Session, name: str) -> None:
    """A step whose client was told of it."""
    session.told_of(record(session, name).answer)


def run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    async def within_time() -> T:
        return await asyncio.wait_for(work(), 20)

    return asyncio.run(within_time())


def begin(flights: Flights, name: str, work: Awaitable[Answer]) -> Flight:
    async def answer() -> Answer:
        return await work

    flight = flights.new(name)
    flights.start(flight, answer())
    return flight


async def turns(number: int = 5) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


# -- who asked before -------------------------------------------------------------------------------------------------


FIRST, AGAIN, SILENT = (Retry("r", is_retry=is_retry) for is_retry in (False, True, None))


@pytest.mark.parametrize(
    ("recorded", "retry", "position"),
    [
        ([], SILENT, None),
        (["r"], SILENT, 0),  # the last step: a client that says nothing asks again
        (["r"], AGAIN, 0),
        (["r"], FIRST, None),  # a call of its own
        (["r", "x"], SILENT, None),  # long ago: asked anew
        (["r", "x"], AGAIN, 0),
        (["r", "r"], AGAIN, 1),
        (["x"], AGAIN, None),
    ],
)
def test_a_retry_is_answered_by_the_step_of_its_request(recorded, retry, position):
    session = make_session()
    for name in recorded:
        told(session, name)
    assert Flights(session).asked_before(retry) == position


def test_an_idempotency_key_tells_requests_apart():
    session = make_session()
    keyed = Retry("r", idempotency_key="k")
    told(session, keyed.name)
    told(session, "x")
    flights = Flights(session)
    assert flights.asked_before(keyed) == 0
    assert flights.asked_before(Retry("r", idempotency_key="l")) is None
    assert flights.asked_before(SILENT) is None


def test_a_step_that_nobody_was_told_of_is_the_next_ones():
    session = make_session()
    answer = record(session, "r").answer
    told(session, "x")
    flights = Flights(session)
    assert flights.asked_before(SILENT) == 0
    assert flights.asked_before(FIRST) is None  # it may still be told
    session.told_of(answer, to_the_end=False)
    assert flights.asked_before(FIRST) == 0


def test_a_retry_whose_first_attempt_left_nothing_takes_no_step_of_others():
    session = make_session()
    flights = Flights(session)
    assert flights.asked_before(FIRST) is None
    assert flights.asked_before(FIRST) is None
    told(session, "r")
    assert flights.asked_before(AGAIN) is None
    told(session, "r")
    assert flights.asked_before(AGAIN) == 1


def test_seeds_are_those_of_no_other_step_or_flight():
    async def work() -> list[int]:
        session = make_session()
        record(session, "x", seed_index=1)
        flights = Flights(session)
        never = asyncio.get_running_loop().create_future()
        seeds = [begin(flights, f"r{number}", never).seed_index for number in range(3)]
        await flights.land()
        return [*seeds, flights.new("r").seed_index]

    assert run(work) == [0, 2, 3, 0]


# -- waiting ----------------------------------------------------------------------------------------------------------


def test_those_that_wait_share_one_answer():
    async def work() -> None:
        flights = Flights(make_session())
        answered = asyncio.get_running_loop().create_future()
        flight = begin(flights, "r", answered)
        waiting = [asyncio.ensure_future(flights.wait_for(flight)) for _ in range(3)]
        await turns()
        assert (flight.num_waiting, len(flights), flights.asked_before(SILENT)) == (3, 1, flight)
        waiting[0].cancel()
        await turns()
        assert not flight.is_given_up
        answered.set_result(SAID)
        assert await asyncio.gather(*waiting[1:]) == [SAID, SAID]
        await turns()
        assert (flight.num_waiting, len(flights)) == (0, 0)

    run(work)


def test_of_several_flights_a_retry_joins_the_one_that_fewest_wait_for():
    async def work() -> None:
        flights = Flights(make_session())
        never = asyncio.get_running_loop().create_future()
        assert [flights.asked_before(FIRST) for _ in range(2)] == [None, None]
        one, two = (begin(flights, "r", never) for _ in range(2))
        one.num_waiting, two.num_waiting = 2, 1
        assert flights.asked_before(AGAIN) is two
        assert [flights.num_before(one), flights.num_before(two), flights.num_before(flights.new("x"))] == [0, 1, 2]
        await flights.land()

    run(work)


@pytest.mark.parametrize("is_recording", [False, True])
def test_what_nobody_waits_for_is_given_up_unless_it_is_being_recorded(is_recording):
    async def work() -> None:
        session = make_session()
        flights = Flights(session)
        answered = asyncio.get_running_loop().create_future()
        flight = begin(flights, "r", answered)
        waiting = asyncio.ensure_future(flights.wait_for(flight))
        await turns()
        flight.is_recording = is_recording
        waiting.cancel()
        await turns()
        assert flight.is_given_up != is_recording
        assert (flights.asked_before(AGAIN) is flight) == is_recording
        if is_recording:
            answer = record(session, "r").answer
            answered.set_result(answer)
            await turns()
            assert flights.asked_before(FIRST) == 0  # its client was never told: it is the next one's
        assert len(flights) == 0

    run(work)


def test_a_failure_reaches_all_that_wait_and_leaves_nothing():
    async def work() -> None:
        flights = Flights(make_session())
        answered = asyncio.get_running_loop().create_future()
        flight = begin(flights, "r", answered)
        waiting = [asyncio.ensure_future(flights.wait_for(flight)) for _ in range(2)]
        await turns()
        answered.set_exception(RequestError(502, "no"))
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        assert [getattr(error, "status", None) for error in errors] == [502, 502]
        assert (len(flights), flights.asked_before(SILENT)) == (0, None)

    run(work)


# -- the session's end ------------------------------------------------------------------------------------------------


def test_a_session_that_ends_gives_up_all_but_what_is_being_recorded():
    async def work() -> None:
        session = make_session()
        flights = Flights(session)
        loop = asyncio.get_running_loop()
        answered, never = loop.create_future(), loop.create_future()
        recorded, given_up = begin(flights, "r", answered), begin(flights, "s", never)
        waiting = [asyncio.ensure_future(flights.wait_for(flight)) for flight in (recorded, given_up)]
        await turns()
        recorded.is_recording = session.is_over = True
        loop.call_soon(answered.set_result, SAID)
        assert await flights.land() == [recorded, given_up]
        answer, refusal = await asyncio.gather(*waiting, return_exceptions=True)
        assert (answer, getattr(refusal, "status", None)) == (SAID, 401)

    run(work)


def placement(parent: int | None) -> Placement:
    return Placement(parent, [7, 8], "and?", "continued", None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("is_placed", [False, True])
def test_an_episode_ends_while_a_response_is_sampled(is_placed):
    """Before the step that is sampled, whose prompt is the last state; or before the one that waits to be answered."""

    async def work() -> None:
        session = make_session(max_episode_s=60)
        told(session, "x")
        told(session, "y")
        session.began -= 60
        flights = Flights(session)
        flight = begin(flights, "r", asyncio.get_running_loop().create_future())
        flight.placement = placement(1) if is_placed else None
        with pytest.raises(RequestError, match="max_episode_s") as refused:
            await flights.wait_for(flight)
        assert (refused.value.code, len(flights)) == ("episode_over", 0)
        episode = session.episode()
        assert (episode.stop_reason, len(episode.steps)) == (StopReason.MAX_EPISODE_S, 2 if is_placed else 1)
        assert episode.final_prompt_ids.tolist() == ([1, 2, 3, 1, 2, 3, 7, 8] if is_placed else [1, 2, 3, 1, 2])

    run(work)


def test_time_that_is_up_changes_nothing_where_all_is_being_recorded():
    async def work() -> None:
        session = make_session(max_episode_s=60)
        told(session, "x")
        session.began -= 60
        flights = Flights(session)
        answered = asyncio.get_running_loop().create_future()
        flight = begin(flights, "r", answered)
        flight.is_recording = True
        asyncio.get_running_loop().call_later(0.05, answered.set_result, SAID)
        assert await flights.wait_for(flight) == SAID
        assert not session.ended_early

    run(work)


def test_time_is_up_after_a_step_that_was_paid():
    session = make_session(max_episode_s=60)
    told(session, "x")
    session.notes.rewards[0] = 1.0
    end_by_time(session, [Flight("r", 1)])
    assert (session.end_reason(), len(session.episode().steps)) == (StopReason.MAX_EPISODE_S, 1)
