"""
Asynchronous against synchronous training, with slow tools.

    python benchmarks/async.py [--max_staleness N] --json benchmarks/results/async.json

The mini wiki, whose `search` takes 0, 0.2 or 1 s in the mean (log-normal, with a tail), the same for the same
question and step in every run. For each latency one run that updates between its rollouts, and one whose rollouts
begin up to `--max_staleness` updates ahead, sampled in a process of its own; every process computes with one thread.
Unless it is given, that is one more than the updates that fit into a rollout, so that the trainer need not wait.
A third run updates between its rollouts, too, and computes with as many threads as there are cores. From the
synchronous run of one thread: the time of a rollout (R) and of an update (U), and the processor time of a rollout
(c). With k rollouts in flight on one machine no run can be faster, over the synchronous one, than (R + U) / max(R /
k, c + U), if the two processes share what they compute with; where each has a core to itself, max(c, U) stands in for
c + U. Both bounds are shown. First and last updates do not count: there is less in flight.

Then rollouts alone: tokens a second at a latency of 1 s over those at 0, with 512 episodes in flight.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common.record import BenchmarkArguments, parse_arguments, print_table, write_record
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

from trl_steppo import StepPOConfig, StepPOTrainer
from trl_steppo.assets import MINI_WIKI_POLICY
from trl_steppo.environments.hotpotqa import HotpotQAEnvironment, hotpotqa_dataset
from trl_steppo.inference import counts_of
from trl_steppo.rollout import EpisodeRequest
from trl_steppo.types import JsonObject

LATENCIES = (0.0, 0.2, 1.0)
SIGMA = 0.75  # of the logarithm: one call in 20 takes 2.6 times the mean
EPISODES = 64  # of an update


@dataclass
class AsyncArguments(BenchmarkArguments):
    """
    Args:
        max_staleness (`int`, *optional*):
            How many updates before its own a rollout may begin, and so how many are in flight during an update.
            `None`: one more than the updates that take as long as a rollout.
        num_updates (`int`, *optional*, defaults to `12`):
            Updates that count.
    """

    max_staleness: int | None = field(
        default=None, metadata={"help": "Updates that a rollout may be ahead. None: as many as keep the trainer busy."}
    )
    num_updates: int = field(default=12, metadata={"help": "Updates that count."})


class SlowWiki(HotpotQAEnvironment):
    """
    A wiki that takes its time.

    Args:
        retriever ([`Retriever`]):
            What `search` asks.
        latency_s (`float`):
            Mean time of a search.
    """

    def __init__(self, retriever: Any, latency_s: float) -> None:
        super().__init__(retriever, top_k=1)
        self._latency_s = latency_s

    def reset(self, answer: str | None = None, answer_aliases: Sequence[str] | None = None, **row: Any) -> str | None:
        """Begin with a row."""
        self._rng = random.Random(str(row["question"]))
        return super().reset(answer, answer_aliases, **row)

    async def search(self, query: str) -> str:  # type: ignore[override]
        """
        Search the wiki.

        Args:
            query: What to look up.

        Returns:
            The best passages.
        """
        pause_s = self._latency_s * math.exp(SIGMA * self._rng.gauss(0.0, 1.0) - SIGMA**2 / 2)
        if pause_s:
            await asyncio.sleep(pause_s)
        return super().search(query)


class Ends(TrainerCallback):
    """When each update ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self.times.append(time.perf_counter())


@dataclass(frozen=True)
class Times:
    """Seconds of a run, in the mean over the updates that count."""

    update: float  # from one end to the next
    waiting: float  # for a rollout, or for a response to end before the weights are new
    rollout_cpu: float  # of the process that plays; with the sampler in it only in a synchronous run

    @property
    def training(self) -> float:
        """The time that is not waiting."""
        return self.update - self.waiting


def make_trainer(directory: str, latency_s: float, num_updates: int, **settings: Any) -> StepPOTrainer:
    """A run on the mini wiki."""
    data = hotpotqa_dataset("mini_wiki")
    args = StepPOConfig(
        output_dir=directory,
        total_episodes=EPISODES * num_updates,
        per_device_train_batch_size=EPISODES,
        response_length=40,
        num_mini_batches=4,
        learning_rate=1e-4,
        gradient_checkpointing=False,
        max_tokens_per_micro_batch=8192,
        num_sample_generations=0,
        log_episodes=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        **settings,
    )
    return StepPOTrainer(
        args=args,
        processing_class=AutoTokenizer.from_pretrained(MINI_WIKI_POLICY),
        model=AutoModelForCausalLM.from_pretrained(MINI_WIKI_POLICY),
        train_dataset=data.train_dataset,
        environment_factory=partial(SlowWiki, data.retriever, latency_s),
    )


def time_run(latency_s: float, num_updates: int, *, margin: int, **settings: Any) -> Times:
    """Train, with `margin` updates that do not count at either end."""
    with TemporaryDirectory() as directory:
        trainer = make_trainer(directory, latency_s, num_updates + 2 * margin, **settings)
        trainer.remove_callback(PrinterCallback)
        ends, cpu_s = Ends(), list[float]()
        trainer.add_callback(ends)
        trainer.player.play = timed(trainer.player.play, cpu_s)  # type: ignore[method-assign]
        trainer.train()
    waits = [
        logs["perf/rollout_s"] + logs["perf/sync_s"] for logs in trainer.state.log_history if "perf/rollout_s" in logs
    ]
    counted = slice(margin, margin + num_updates)
    return Times(
        (ends.times[margin + num_updates - 1] - ends.times[margin - 1]) / num_updates,
        sum(waits[counted]) / num_updates,
        sum(cpu_s[counted]) / num_updates,
    )


def timed(play: Callable[..., Any], cpu_s: list[float]) -> Callable[..., Any]:
    """The same, with a note of this process's processor time for each call."""

    def measured(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return play(*args, **kwargs)
        finally:
            cpu_s.append(time.process_time() - start)

    return measured


def rollout_tokens_per_s(latency_s: float, num_episodes: int, in_flight: int) -> float:
    """Tokens sampled per second while `num_episodes` are played, `in_flight` at a time."""
    with TemporaryDirectory() as directory:
        trainer = make_trainer(directory, latency_s, 1, max_concurrent_episodes=in_flight)
        requests = [EpisodeRequest(trainer.rows[index], index) for index in range(num_episodes)]
        with torch.no_grad():
            start = time.perf_counter()
            trainer.player.play(requests)
            return counts_of(trainer.sampler).sampled_tokens / (time.perf_counter() - start)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within, torch computes with `count` threads, also in processes that are started."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(args: AsyncArguments) -> None:
    """Measure, print, write."""
    num_updates = 3 if args.quick else args.num_updates
    latencies = (0.0, 0.2) if args.quick else LATENCIES
    figures: dict[str, JsonObject] = {
        name: {}
        for name in (
            "speedup",
            "speedup_over_all_threads",
            "bound",
            "bound_of_two_cores",
            "trainer_idle_fraction",
            "synchronous_idle_fraction",
            "updates_per_minute",
            "rollout_s",
            "rollout_cpu_s",
            "update_s",
            "max_staleness",
        )
    }
    with threads(1):
        for latency_s in latencies:
            with threads(os.cpu_count() or 1):
                of_all = time_run(latency_s, num_updates, margin=1)
            sync = time_run(latency_s, num_updates, margin=1)
            rollout, cpu, update = sync.waiting, sync.rollout_cpu, sync.training
            ahead = args.max_staleness or math.ceil(rollout / update) + 1
            asynchronous = time_run(latency_s, num_updates, margin=ahead + 1, max_staleness=ahead)
            key = f"{latency_s:g}"
            figures["speedup"][key] = sync.update / asynchronous.update
            figures["speedup_over_all_threads"][key] = of_all.update / asynchronous.update
            figures["bound"][key] = sync.update / max(rollout / ahead, cpu + update)
            figures["bound_of_two_cores"][key] = sync.update / max(rollout / ahead, cpu, update)
            figures["trainer_idle_fraction"][key] = asynchronous.waiting / asynchronous.update
            figures["synchronous_idle_fraction"][key] = sync.waiting / sync.update
            figures["updates_per_minute"][key] = [60 / sync.update, 60 / asynchronous.update]
            figures["rollout_s"][key], figures["rollout_cpu_s"][key], figures["update_s"][key] = rollout, cpu, update
            figures["max_staleness"][key] = ahead
        num_episodes, in_flight = (128, 64) if args.quick else (3072, 512)
        slow, quick = (rollout_tokens_per_s(latency, num_episodes, in_flight) for latency in (latencies[-1], 0.0))
    rows = [[name, *(shown(values[f"{latency:g}"]) for latency in latencies)] for name, values in figures.items()]
    print_table("asynchronous over synchronous", ["", *(f"{latency:g} s a call" for latency in latencies)], rows)
    print(f"rollouts alone, {in_flight} episodes in flight: {slow:.0f} tokens/s over {quick:.0f}, {slow / quick:.2f}")
    write_record(
        args.json,
        {
            **figures,
            "rollout_throughput_over_no_latency": slow / quick,
            "updates": num_updates,
        },
    )


def shown(value: float | list[float]) -> str:
    """A figure, or a pair."""
    return ", ".join(f"{one:.2f}" for one in (value if isinstance(value, list) else [value]))


if __name__ == "__main__":
    main(parse_arguments(AsyncArguments))
