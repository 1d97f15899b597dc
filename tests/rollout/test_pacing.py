import asyncio
import time

from trl_steppo.rollout import EpisodePacer


def test_quiet_returns_at_once_when_no_episode_is_away():
    async def run():
        await asyncio.wait_for(EpisodePacer().quiet(), 10)

    asyncio.run(run())


def test_quiet_waits_until_every_episode_has_arrived():
    async def run():
        pacer = EpisodePacer(grace_s=30)
        pacer.left()
        pacer.left()
        waiting = asyncio.ensure_future(pacer.quiet())
        for expected in (False, True):
            await asyncio.sleep(0.01)
            assert not waiting.done()
            pacer.arrived()
            for _ in range(10):
                await asyncio.sleep(0)
            assert waiting.done() is expected

    asyncio.run(run())


def test_quiet_sees_an_episode_that_was_just_answered():
    """The sampler resolves a future and asks at once: the episode has not run since, and is away all the same."""

    async def run():
        pacer, log = EpisodePacer(grace_s=30), []
        pacer.left()
        answered = asyncio.get_running_loop().create_future()

        async def episode():
            with pacer.at_sampler():
                await answered
            await asyncio.sleep(0.02)
            log.append("environment answered")
            pacer.arrived()

        playing = asyncio.ensure_future(episode())
        await pacer.quiet()
        answered.set_result(None)
        await pacer.quiet()
        log.append("quiet")
        await playing
        assert log == ["environment answered", "quiet"]

    asyncio.run(run())


def test_a_rollout_waits_for_slow_environments_once():
    async def run():
        pacer = EpisodePacer(grace_s=0.05)
        pacer.left()
        await pacer.quiet()
        begun = time.monotonic()
        for _ in range(100):
            await pacer.quiet()
        assert time.monotonic() - begun < 0.05 * 50

    asyncio.run(run())


def test_an_episode_is_away_again_when_its_sample_fails():
    pacer = EpisodePacer()
    pacer.left()
    try:
        with pacer.at_sampler():
            raise ValueError
    except ValueError:
        pass
    assert not pacer._none_away.is_set()
