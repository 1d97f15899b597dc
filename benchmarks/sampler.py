"""
The in-process sampler against transformers' `generate`: sampled tokens per second of a rollout, in one run.

Responses of a rollout differ in length. `generate` runs its batch until the longest one ends, so only the tokens
within each response's own budget count, for both. `generate` is not asked for log-probabilities, which the sampler
always reports.

    python benchmarks/sampler.py [--quick] [--json FILE]
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from common.record import BenchmarkArguments, parse_arguments, print_table, write_record
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, Qwen2Config

from trl_steppo.assets import MINI_WIKI_POLICY
from trl_steppo.inference.base import SamplingParams
from trl_steppo.inference.local import LocalSampler

PROMPT_TOKENS = (40, 250)
RESPONSE_TOKENS = (8, 40)
OBSERVATION_TOKENS = (10, 40)
QUICK_EPISODES = 32  # of the cases besides the main one
TIE = 1e-4  # logits this close may be ordered either way by rounding


@dataclass
class SamplerArguments(BenchmarkArguments):
    """
    Args:
        episodes (`list[int]`, *optional*, defaults to `[64, 256]`):
            Numbers of concurrent episodes.
        repetitions (`int`, *optional*, defaults to `5`):
            Measurements of each engine, after a warm-up; `--quick` takes 3.
        threads (`int`, *optional*, defaults to `1`):
            Threads of both engines. The built-in policy is too small to gain from more, and where other programs keep
            the cores busy, threads that wait for one another would be all that is measured.
    """

    episodes: list[int] = field(
        default_factory=lambda: [64, 256], metadata={"help": "Numbers of concurrent episodes."}
    )
    repetitions: int = field(default=5, metadata={"help": "Measurements of each engine; --quick takes 3."})
    threads: int = field(default=1, metadata={"help": "Threads of both engines."})


@dataclass(frozen=True)
class Workload:
    """What the episodes of one rollout read and may write: `budgets[t]` and `observations[t]` belong to step t."""

    prompts: list[list[int]]
    budgets: list[list[int]]
    observations: list[list[list[int]]]

    @property
    def num_tokens(self) -> int:
        return sum(map(sum, self.budgets))

    def part(self, episodes: int) -> Workload:
        """The first episodes alone."""
        budgets, observations = ([step[:episodes] for step in steps] for steps in (self.budgets, self.observations))
        return Workload(self.prompts[:episodes], budgets, observations)  # type: ignore[arg-type]


Engine = Callable[[PreTrainedModel, Workload], object]


def make_workload(episodes: int, steps: int, vocabulary: int, seed: int, *, equal: bool = False) -> Workload:
    rng = random.Random(seed)

    def ids(bounds: tuple[int, int]) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(rng.randint(*bounds))]

    prompts = [ids(PROMPT_TOKENS) for _ in range(episodes)]
    mean = sum(RESPONSE_TOKENS) // 2
    budgets = [[mean if equal else rng.randint(*RESPONSE_TOKENS) for _ in range(episodes)] for _ in range(steps)]
    observations = [[ids(OBSERVATION_TOKENS) for _ in range(episodes)] for _ in range(steps)]
    return Workload(prompts, budgets, observations)


def play_with_sampler(model: PreTrainedModel, work: Workload, *, temperature: float = 1.0) -> list[list[int]]:
    """Every episode at its own pace; its first response is returned."""
    sampler = LocalSampler(model)

    async def play(index: int) -> list[int]:
        prompt, responses = work.prompts[index], []
        for step, (budgets, observations) in enumerate(zip(work.budgets, work.observations, strict=True)):
            params = SamplingParams(budgets[index], temperature=temperature, seed=index * 100 + step)
            sample = await sampler.sample(prompt, params, episode_id=str(index), order=(index, step))
            responses.append(sample.token_ids.tolist())
            prompt = [*prompt, *sample.token_ids, *observations[index]]
        sampler.release(str(index))
        return responses[0]

    async def play_all() -> list[list[int]]:
        return list(await asyncio.gather(*(play(index) for index in range(len(work.prompts)))))

    return asyncio.run(play_all())


@torch.no_grad()
def play_with_generate(model: PreTrainedModel, work: Workload, *, temperature: float = 1.0) -> list[list[int]]:
    """All episodes in step; their first responses are returned."""
    prompts, played = work.prompts, []
    for budgets, observations in zip(work.budgets, work.observations, strict=True):
        longest = max(map(len, prompts))
        input_ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        attention_mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        config = GenerationConfig(max_new_tokens=max(budgets), do_sample=temperature > 0.0, pad_token_id=0)
        if temperature > 0.0:
            config.temperature, config.top_k, config.top_p = temperature, 0, 1.0
        generate: Any = model.generate
        output = generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=config)
        responses = [row[longest:][:budget] for row, budget in zip(output.tolist(), budgets, strict=True)]
        assert [len(response) for response in responses] == budgets, "`generate` stopped early"
        played.append(responses)
        prompts = [p + r + o for p, r, o in zip(prompts, responses, observations, strict=True)]
    return played[0]


def tokens_per_s(model: PreTrainedModel, work: Workload, repetitions: int) -> dict[str, float]:
    """Median of each engine; the engines take turns, after a warm-up on a small part of the work."""
    engines: dict[str, Engine] = {"sampler": play_with_sampler, "generate": play_with_generate}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for play in engines.values():
        play(model, work.part(8))
    for _ in range(repetitions):
        for name, play in engines.items():
            start = time.perf_counter()
            play(model, work)
            seconds[name].append(time.perf_counter() - start)
    return {name: work.num_tokens / statistics.median(times) for name, times in seconds.items()}


def check_greedy(model: PreTrainedModel, work: Workload) -> int:
    """Both engines choose the same tokens; how many were compared. Where logits tie, either may be chosen."""
    once = replace(work, budgets=work.budgets[:1], observations=work.observations[:1])
    ours = play_with_sampler(model, once, temperature=0.0)
    theirs = play_with_generate(model, once, temperature=0.0)
    compared = 0
    for prompt, one, other in zip(work.prompts, ours, theirs, strict=True):
        difference = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
        compared += len(one) if difference is None else difference
        if difference is not None:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + one[:difference]])).logits[0, -1]
            gap = float(logits.max() - logits[[one[difference], other[difference]]].min())
            assert gap < TIE, f"greedy tokens differ where the logits are {gap} apart"
    return compared


def load_policy() -> tuple[PreTrainedModel, str]:
    """The built-in policy, or one of its size with random weights."""
    torch.manual_seed(0)
    if (Path(MINI_WIKI_POLICY) / "config.json").exists():
        model, name = AutoModelForCausalLM.from_pretrained(MINI_WIKI_POLICY, dtype=torch.float32), "mini wiki policy"
    else:
        config = Qwen2Config(
            vocab_size=1540,
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=True,
        )
        model, name = AutoModelForCausalLM.from_config(config, dtype=torch.float32), "random weights"
    model.generation_config = GenerationConfig(pad_token_id=0)  # no end of turn: lengths are the workload's
    return model.eval(), f"{name}, {model.num_parameters():,} parameters"


def main(args: SamplerArguments) -> None:
    torch.set_num_threads(args.threads)
    model, name = load_policy()
    vocabulary, repetitions = model.config.vocab_size, 3 if args.quick else args.repetitions
    other_episodes = [QUICK_EPISODES] if args.quick else args.episodes
    cases: list[tuple[str, int, bool, list[int]]] = [
        ("one step, lengths differ", 1, False, args.episodes),
        ("one step, equal lengths", 1, True, other_episodes),
        ("4 steps, lengths differ", 4, False, other_episodes),
    ]
    measured: dict[str, dict[int, dict[str, float]]] = {}
    for case, steps, equal, numbers in cases:
        measured[case] = {}
        for episodes in numbers:
            work = make_workload(episodes, steps, vocabulary, args.seed, equal=equal)
            measured[case][episodes] = tokens_per_s(model, work, repetitions)
    compared = check_greedy(model, make_workload(min(args.episodes), 1, vocabulary, args.seed))
    print_table(
        f"Sampled tokens per second ({name}; median of {repetitions})",
        ["", "episodes", "sampler", "generate", "ratio"],
        [
            [case, str(episodes), f"{speed['sampler']:,.0f}", f"{speed['generate']:,.0f}", f"{ratio(speed):.2f}"]
            for case, by_episodes in measured.items()
            for episodes, speed in by_episodes.items()
        ],
    )
    print(f"{compared} greedy tokens equal those of generate")
    one, equal_lengths, several = measured.values()
    figures = {
        "tokens_per_s_over_generate": ratios(one),
        "tokens_per_s_over_generate_equal_lengths": ratios(equal_lengths),
        "tokens_per_s_over_generate_4_steps": ratios(several),
        "tokens_per_s": measured,
        "greedy_tokens_compared": compared,
        "model": name,
        "repetitions": repetitions,
    }
    write_record(args.json, figures)


def ratio(speed: dict[str, float]) -> float:
    return speed["sampler"] / speed["generate"]


def ratios(by_episodes: dict[int, dict[str, float]]) -> dict[int, float]:
    return {episodes: round(ratio(speed), 3) for episodes, speed in by_episodes.items()}


if __name__ == "__main__":
    main(parse_arguments(SamplerArguments))
