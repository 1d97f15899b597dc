"""
What sharing prefixes saves: tokens, seconds and memory of updates and rollouts, with it and without it, in one run.

    python benchmarks/prefix_sharing.py [--quick] [--json FILE]
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import math
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from common.processes import in_new_process, peak_bytes
from common.record import BenchmarkArguments, parse_arguments, print_table, write_record
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from trl_steppo import Episode, Step, StepPOConfig, StepPOTrainer, StopReason
from trl_steppo.batching import StepRolloutCollator, Trie, micro_batches, num_unique_tokens, step_ids
from trl_steppo.inference.base import SamplingParams
from trl_steppo.inference.local import LocalSampler
from trl_steppo.rollout import dump_episodes, episode_file
from trl_steppo.types import JsonObject, TokenIds

MICRO_BATCH_TOKENS = 8_192
MICRO_BATCH_TOKENS_SMALL = 16_384
PROMPT_TOKENS, RESPONSE_TOKENS, OBSERVATION_TOKENS = 256, 64, 192
VOCABULARY = 4096
UPDATE_COLUMNS = ("forwarded_over_unique", "token_ratio", "seconds", "update_speedup", "peak_memory_ratio")


@dataclass
class PrefixSharingArguments(BenchmarkArguments):
    """
    Args:
        quick (`bool`, *optional*, defaults to `False`):
            Up to 4 steps, one update and one rollout of each kind; less than five minutes.
        steps (`list[int]`, *optional*, defaults to `[1, 2, 4, 8, 16]`):
            Numbers of steps of an episode.
        growth (`list[int]`, *optional*, defaults to `[1, 2, 4, 8, 16, 32]`):
            Numbers of steps over which the growth of an update's time is measured, with a small model.
        max_timed_tokens (`int`, *optional*, defaults to `40000`):
            An update that would forward more tokens without sharing is counted, but not timed; of groups a fifth.
        repetitions (`int`, *optional*, defaults to `3`):
            Updates of append-only episodes alone, whose median counts; everything that takes long is done once.
        threads (`int`, *optional*, defaults to `2`):
            Threads.
    """

    quick: bool = field(default=False, metadata={"help": "Up to 4 steps, once each; less than five minutes."})
    steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16], metadata={"help": "Steps of an episode."})
    growth: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16, 32], metadata={"help": "Steps over which growth is measured."}
    )
    max_timed_tokens: int = field(
        default=40_000, metadata={"help": "Updates with more tokens than this without sharing are only counted."}
    )
    repetitions: int = field(default=3, metadata={"help": "Updates and rollouts of each kind."})
    threads: int = field(default=2, metadata={"help": "Threads."})


@dataclass(frozen=True)
class Work:
    """Episodes of one dataset row, or of several."""

    num_steps: int
    group_size: int = 1
    num_rows: int = 1
    rebuilt: bool = False  # whether the prompt is rewritten every step, after its first half
    small: bool = False  # a model for the growth of long episodes
    seed: int = 0
    threads: int = 2


def make_episodes(work: Work) -> list[Episode]:
    rng = random.Random(work.seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(count)]

    questions = [ids(PROMPT_TOKENS) for _ in range(work.num_rows)]
    episodes = []
    for row, generation in itertools.product(range(work.num_rows), range(work.group_size)):
        prompt, steps = questions[row], []
        for index in range(work.num_steps):
            response = ids(RESPONSE_TOKENS)
            logprobs = (-math.log(VOCABULARY),) * RESPONSE_TOKENS
            step = Step(TokenIds(prompt), TokenIds(response), logprobs, rng.random(), index, 0, 1.0, StopReason.STOP)
            steps.append(step)
            observation = ids(OBSERVATION_TOKENS)
            # Rebuilt: the question, and a new account of what happened.
            prompt = questions[row] + observation if work.rebuilt else prompt + response + observation
        episodes.append(Episode(f"r{row}g{generation}", row, generation, tuple(steps), True, False))
    return episodes


def make_model(work: Work) -> Qwen2ForCausalLM:
    torch.manual_seed(work.seed)
    size: JsonObject = {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    if not work.small:  # 30 million parameters
        size = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    heads: JsonObject = {
        "num_key_value_heads": size["num_attention_heads"] // 2,
        "max_position_embeddings": 16_384,
    }
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, **size, **heads))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Only to name the special tokens."""
    backend = Tokenizer(models.WordLevel({"<eos>": 0, "<pad>": 1}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


@dataclass(frozen=True)
class Cost:
    """What an update took."""

    seconds: float
    peak_bytes: int
    tokens_forwarded: float  # in an epoch of the policy
    unique_tokens: float


def update_once(work: Work, sharing: bool) -> Cost:
    """One whole update on recorded episodes; to be called in a new process, whose peak memory is then the update's."""
    prepare_process(work.threads)
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        dump_episodes(episode_file(directory, 0, 0), make_episodes(work))
        args = StepPOConfig(
            output_dir=directory,
            replay_episodes_dir=directory,
            per_device_train_batch_size=work.group_size,
            max_steps=1,
            num_generations=work.group_size,
            prefix_sharing=sharing,
            max_tokens_per_micro_batch=MICRO_BATCH_TOKENS_SMALL
            if work.small
            else MICRO_BATCH_TOKENS,  # the same bound of memory for both
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to="none",
            num_sample_generations=0,
            log_episodes=0,
            logging_steps=1,
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = StepPOTrainer(
            args=args,
            processing_class=make_tokenizer(),
            model=make_model(work),
            train_dataset=[{"input_ids": [2, 3]}],
            reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        logs = next(logs for logs in trainer.state.log_history if "perf/tokens_forwarded" in logs)
    return Cost(seconds, peak_bytes(), logs["perf/tokens_forwarded"], logs["perf/unique_tokens"])


def bare_update(work: Work) -> float:
    """
    Seconds of the forward passes, backward passes and optimizer steps of such an update, on the same packed tokens,
    and nothing else: no values, no ratios, no credit.
    """
    prepare_process(work.threads)
    batch = StepRolloutCollator(layout="chains")(make_episodes(work))
    policy, critic = make_model(work), make_model(work).model
    optimizers = [torch.optim.AdamW(network.parameters(), lr=1e-6) for network in (policy, critic)]
    reads = batch.logit_positions[batch.action_mask]
    start = time.perf_counter()
    with torch.no_grad():
        critic(input_ids=batch.input_ids, use_cache=False)
    for network, optimizer in zip((policy, critic), optimizers, strict=True):
        backbone = network.model if network is policy else network
        states = backbone(input_ids=batch.input_ids, use_cache=False).last_hidden_state.flatten(0, 1)[reads]
        if network is policy:
            logprobs = policy.lm_head(states).log_softmax(-1)
            loss = -logprobs.gather(-1, batch.action_ids[batch.action_mask][:, None]).mean()
        else:
            loss = states.square().mean()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - start


def roll_out(work: Work, keep: bool) -> tuple[float, float, list[list[int]]]:
    """Seconds of a greedy rollout, prefilled tokens over unique prompt tokens, and what was said."""
    prepare_process(work.threads)
    model, episodes = make_model(work).eval(), make_episodes(work)
    sampler = LocalSampler(model)
    params = SamplingParams(RESPONSE_TOKENS, temperature=0.0)
    observations = random.Random(1)
    prompts: set[tuple[int, ...]] = set()
    continued: set[tuple[int, ...]] = set()  # of these, the ones whose response is the start of another

    async def play(episode: Episode) -> list[int]:
        prompt, said = episode.steps[0].prompt_ids.tolist(), []
        for step in range(work.num_steps):
            if not keep:
                sampler.release(episode.episode_id)
            order = (episode.stream_position, episode.generation_index, step)
            sample = await sampler.sample(prompt, params, episode_id=episode.episode_id, order=order)
            said += sample.token_ids.tolist()
            prompts.add(tuple(prompt))
            if step < work.num_steps - 1:
                continued.add(tuple(prompt))
            prompt = [*prompt, *sample.token_ids]
            prompt += [observations.randrange(VOCABULARY) for _ in range(OBSERVATION_TOKENS)]
        return said

    async def play_all() -> list[list[int]]:
        return [*await asyncio.gather(*map(play, episodes))]

    start = time.perf_counter()
    said = asyncio.run(play_all())
    seconds = time.perf_counter() - start
    trie = Trie()
    for prompt in prompts:
        trie.insert(np.array(prompt, dtype=np.int32))
    # Sampling has computed each response but for its last token, which was never forwarded. (Greedily, members of a
    # group with the same prompt give the same response, which the trie holds once.)
    sampled = len(continued) * (RESPONSE_TOKENS - 1)
    return seconds, sampler.counts.prefilled_tokens / (trie.num_tokens - sampled), said


def prepare_process(threads: int) -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)


def growth_exponent(steps: Sequence[int], seconds: Sequence[float]) -> float:
    """Slope of log seconds over log steps, by least squares."""
    return statistics.linear_regression(list(map(math.log, steps)), list(map(math.log, seconds))).slope


def forwarded_tokens(work: Work, sharing: bool) -> int:
    """Tokens that a policy's epoch forwards, padding included, as the trainer packs and cuts them."""
    episodes = make_episodes(work)
    layout: Any = "trie" if sharing else "rows"
    sequences = [[step_ids(step) for step in episode.steps] for episode in episodes]
    groups = micro_batches(
        range(len(episodes)), sequences, layout=layout, max_episodes=work.group_size, max_tokens=MICRO_BATCH_TOKENS
    )
    collator = StepRolloutCollator(layout=layout)
    return sum(
        collator([episodes[index] for index, _ in parts], steps=[steps for _, steps in parts]).input_ids.numel()
        for parts in groups
    )


def measure_updates(args: PrefixSharingArguments, works: Sequence[Work], repetitions: int) -> JsonObject:
    """Updates with and without sharing, in turn; each kind of work by its name. Long ones are measured once."""
    found: JsonObject = {}
    for work in works:
        name = f"{'rebuilt' if work.rebuilt else 'append-only'}, group {work.group_size}, {work.num_steps} steps"
        tokens = {sharing: forwarded_tokens(work, sharing) for sharing in (True, False)}
        found[name] = {
            "num_steps": work.num_steps,
            "alone": work.group_size == 1 and not work.rebuilt,
            "forwarded_over_unique": tokens[True] / num_unique_tokens(make_episodes(work)),
            "token_ratio": tokens[False] / tokens[True],
        }
        if tokens[False] > args.max_timed_tokens * (1 if work.group_size == 1 else 0.2):
            continue
        times = repetitions if tokens[False] <= 12_000 and not work.rebuilt and work.group_size == 1 else 1
        pairs = [[in_new_process(update_once, work, sharing) for sharing in (True, False)] for _ in range(times)]
        shared, plain = (list(costs) for costs in zip(*pairs, strict=True))
        assert (shared[0].tokens_forwarded, plain[0].tokens_forwarded) == (tokens[True], tokens[False])
        found[name] |= {
            "seconds": median_seconds(shared),
            "seconds_without": median_seconds(plain),
            "update_speedup": median_seconds(plain) / median_seconds(shared),
            "peak_memory_ratio": max(c.peak_bytes for c in shared) / max(c.peak_bytes for c in plain),
            "repetitions": times,
        }
        print(name, found[name], file=sys.stderr, flush=True)
    return found


def median_seconds(costs: Sequence[Cost]) -> float:
    return statistics.median(cost.seconds for cost in costs)


def measure_overhead(works: Sequence[Work], repetitions: int) -> dict[int, float]:
    """An update's time over that of its bare passes and steps, by number of steps."""
    overheads = {}
    for work in works:
        pairs = [
            (in_new_process(update_once, work, True).seconds, in_new_process(bare_update, work))
            for _ in range(repetitions)
        ]
        ours, bare = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
        overheads[work.num_steps] = ours / bare
    return overheads


def measure_rollouts(works: Sequence[Work], repetitions: int) -> JsonObject:
    """Rollouts that keep each episode's cache, and ones that prefill each step again, in turn."""
    found = {}
    for work in works:
        pairs = [[in_new_process(roll_out, work, keep) for keep in (True, False)] for _ in range(repetitions)]
        kept, fresh = zip(*pairs, strict=True)
        name = f"{work.num_rows} x group {work.group_size}, {work.num_steps} steps"
        found[name] = {
            "num_steps": work.num_steps,
            "together": work.num_rows > 1,
            "rollout_speedup": statistics.median(run[0] for run in fresh) / statistics.median(run[0] for run in kept),
            "prefilled_over_unique": kept[0][1],
            "same_greedy_tokens": all(run[2] == fresh[0][2] for run in (*kept, *fresh)),
        }
    return found


def measure_growth(args: PrefixSharingArguments, steps: Sequence[int], repetitions: int) -> dict[str, float]:
    """The exponent with which an update's time grows with the number of steps."""
    exponents = {}
    for sharing in (True, False):
        works = [Work(count, small=True, seed=args.seed, threads=args.threads) for count in steps]
        seconds = [
            median_seconds([in_new_process(update_once, work, sharing) for _ in range(repetitions)]) for work in works
        ]
        exponents["with" if sharing else "without"] = growth_exponent(steps, seconds)
    return exponents


def main(args: PrefixSharingArguments) -> None:
    repetitions = 1 if args.quick else args.repetitions
    steps = [count for count in args.steps if count <= 4 or not args.quick]
    common: JsonObject = {"seed": args.seed, "threads": args.threads}
    works = [
        Work(count, group_size, rebuilt=rebuilt, **common)
        for group_size in (1, 8)
        for rebuilt in (False, True)
        for count in steps
        if not args.quick or (count == max(steps) if rebuilt or group_size == 8 else count > 1)
    ]
    alone = [work for work in works if work.group_size == 1 and not work.rebuilt]
    updates = measure_updates(args, works, repetitions)
    overhead = measure_overhead([work for work in alone if work.num_steps in (4, 8)], repetitions)
    rollouts = measure_rollouts(
        [
            Work(count, group_size, num_rows, **common)
            for num_rows, group_size in ((1, 1), (8, 1), (1, 8))
            for count in steps
            if count in (2, 8)
        ],
        repetitions,
    )
    growth = measure_growth(args, [n for n in args.growth if n <= 4 or not args.quick], 1)
    print_table(
        f"An update with shared prefixes beside one without ({args.threads} threads)",
        ["episodes", "forwarded / unique", "tokens without / with", "seconds", "time without / with", "peak memory"],
        [[name, *(number(row.get(key)) for key in UPDATE_COLUMNS)] for name, row in updates.items()],
    )
    print_table(
        "A rollout that keeps caches beside one that prefills each step again",
        ["episodes", "time without / with", "prefilled / unique", "same greedy tokens"],
        [
            [
                name,
                number(row["rollout_speedup"]),
                number(row["prefilled_over_unique"]),
                str(row["same_greedy_tokens"]),
            ]
            for name, row in rollouts.items()
        ],
    )
    print_table(
        "An update's time over that of its bare passes",
        ["steps", "ratio"],
        [[str(n), number(x)] for n, x in overhead.items()],
    )
    print_table(
        "Exponent of an update's time in the number of steps",
        ["sharing", "exponent"],
        [[name, number(exponent)] for name, exponent in growth.items()],
    )
    figures = {
        "forwarded_over_unique": {name: row["forwarded_over_unique"] for name, row in updates.items()},
        "update_speedup": by_steps(updates, "update_speedup"),
        "token_ratio": by_steps(updates, "token_ratio"),
        "update_over_bare": overhead,
        "prefilled_over_unique": {name: row["prefilled_over_unique"] for name, row in rollouts.items()},
        "rollout_speedup": {row["num_steps"]: row["rollout_speedup"] for row in rollouts.values() if row["together"]},
        "growth_exponent": growth,
        "updates": updates,
        "rollouts": rollouts,
        "repetitions": repetitions,
        "threads": args.threads,
    }
    write_record(args.json, figures)


def by_steps(updates: JsonObject, figure: str) -> dict[int, float]:
    """Of append-only episodes alone, by their number of steps."""
    return {row["num_steps"]: row[figure] for row in updates.values() if row["alone"] and figure in row}


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main(parse_arguments(PrefixSharingArguments))
