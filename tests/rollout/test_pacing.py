import asyncio
import time

from trl_steppo.rollout import InFlight


def test_settled_returns_at_once_when_nobody_is_away():
    async def run():
        await asyncio.wait_for(InFlight().settled(), 10)

    asyncio.run(run())


def test_settled_waits_for_everyone_to_come_back():
    async def run():
        in_flight = InFlight(grace_s=30)
        in_flight.away()
        in_flight.away()
        waiting = asyncio.ensure_future(in_flight.settled())
        for expected in (False, True):
            await asyncio.sleep(0.01)
            assert not waiting.done()
            in_flight.back()
            for _ in range(10):
                await asyncio.sleep(0)
            assert waiting.done() is expected

    asyncio.run(run())


def test_settled_sees_who_has_just_been_answered():
    """The sampler resolves a future and asks at once: the episode has not run since, and is away all the same."""

    async def run():
        in_flight, log = InFlight(grace_s=30), []
        in_flight.away()
        answered = asyncio.get_running_loop().create_future()

        async def episode():
            with in_flight.at_sampler():
                await answered
            await asyncio.sleep(0.02)
            log.append("environment answered")
            in_flight.back()

        playing = asyncio.ensure_future(episode())
        await in_flight.settled()
        answered.set_result(None)
        await in_flight.settled()
        log.append("settled")
        await playing
        assert log == ["environment answered", "settled"]

    asyncio.run(run())


def test_the_wait_that_takes_too_long_is_the_last():
    async def run():
        in_flight = InFlight(grace_s=0.05)
        in_flight.away()
        await in_flight.settled()
        begun = time.monotonic()
        for _ in range(100):
            await in_flight.settled()
        assert time.monotonic() - begun < 0.05 * 50

    asyncio.run(run())


def test_an_episode_is_away_again_when_its_sample_fails():
    in_flight = InFlight()
    in_flight.away()
    try:
        with in_flight.at_sampler():
            raise ValueError
    except ValueError:
        pass
    assert not in_flight._all_back.is_set()
