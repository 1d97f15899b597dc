"""Calls of one tool at a time, over episodes, threads and event loops."""

import asyncio
import random
import threading
import time

import pytest

from trl_steppo.environments import make_playable
from trl_steppo.environments.base import Response
from trl_steppo.environments.slots import Slots


class Meter:
    """Counts who is inside."""

    def __init__(self) -> None:
        self.lock, self.now, self.most, self.total = threading.Lock(), 0, 0, 0

    def __enter__(self) -> None:
        with self.lock:
            self.now += 1
            self.total += 1
            self.most = max(self.most, self.now)

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.now -= 1


def in_threads(count: int, play) -> None:
    threads = [threading.Thread(target=lambda index=index: asyncio.run(play(index))) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("num_slots", [1, 3])
def test_no_more_at_a_time_than_there_are_slots_and_everybody_gets_a_turn(num_slots):
    slots, meters = Slots(num_slots), {"search": Meter(), "read": Meter()}

    async def call(tool: str, pause: float) -> None:
        async with slots.of(tool):
            with meters[tool]:
                await asyncio.sleep(pause)

    async def play(index: int) -> None:
        rng = random.Random(index)
        await asyncio.gather(*(call(tool, rng.random() * 0.004) for tool in ("search", "read") for _ in range(20)))

    in_threads(4, play)
    for meter in meters.values():
        assert (meter.most, meter.total) == (num_slots, 80)
    assert not any(slots._num_taken.values())


def test_a_cancelled_waiter_does_not_keep_a_slot():
    slots, served = Slots(1), []

    async def call(index: int) -> None:
        async with slots.of("search"):
            await asyncio.sleep(0.002)
            served.append(index)

    async def play(index: int) -> None:
        rng = random.Random(index)
        tasks = [asyncio.ensure_future(call(20 * index + number)) for number in range(20)]
        await asyncio.sleep(rng.random() * 0.02)
        for task in rng.sample(tasks, 10):
            task.cancel()
            await asyncio.sleep(0)
        await asyncio.gather(*tasks, return_exceptions=True)

    in_threads(4, play)
    assert 40 <= len(served) == len(set(served))
    asyncio.run(call(-1))
    assert served[-1] == -1


def test_turns_come_in_order():
    slots, served = Slots(1), []

    async def call(index: int) -> None:
        async with slots.of("search", priority=index % 2):
            await asyncio.sleep(0)
            served.append(index)

    async def play() -> None:
        await asyncio.gather(*map(call, range(10)))

    asyncio.run(play())
    assert served == [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]


def test_waiting_for_a_slot_does_not_count_as_the_calls_time():
    meter = Meter()

    def look() -> str:
        """Look."""
        with meter:
            time.sleep(0.1)
        return "seen"

    playables = [make_playable(None, [look], tool_timeout_s=0.35, slots=slots) for slots in [Slots(1)] * 6]
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    response = Response("", {"role": "assistant", "content": "", "tool_calls": [call]})

    async def play() -> list[str]:
        outcomes = await asyncio.gather(*(playable.step(response) for playable in playables))
        return [outcome.observation[0]["content"] for outcome in outcomes]

    assert asyncio.run(play()) == ["seen"] * 6  # the last one after half a second
    assert meter.most == 1
