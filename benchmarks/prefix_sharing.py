"""
What sharing prefixes saves: tokens, seconds and memory of updates and rollouts, with it and without it, in one run.

    python benchmarks/prefix_sharing.py [--quick] [--json FILE]
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import math
import random
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
import transformers
from _record import BenchmarkArguments, print_table, write_record
from tokenizers import Tokenizer, models
from torch import nn
from transformers import HfArgumentParser, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from trl_steppo import Episode, Step, StepPOConfig, StepPOTrainer, StopReason
from trl_steppo.batching import StepRolloutCollator, Trie
from trl_steppo.inference.base import SamplingParams
from trl_steppo.inference.local import LocalSampler
from trl_steppo.rollout import dump_episodes, episode_file

MICRO_BATCH_TOKENS = 8192
PROMPT_TOKENS, RESPONSE_TOKENS, OBSERVATION_TOKENS = 256, 64, 192
VOCABULARY = 4096


@dataclass
class PrefixSharingArguments(BenchmarkArguments):
    """
    Args:
        quick (`bool`, *optional*, defaults to `False`):
            Fewer numbers of steps, one update of each; less than five minutes.
        steps (`list[int]`, *optional*, defaults to `[1, 2, 4, 8, 16]`):
            Numbers of steps of an episode.
        repetitions (`int`, *optional*, defaults to `3`):
            Updates and rollouts of each kind, whose median counts.
        threads (`int`, *optional*, defaults to `2`):
            Threads.
    """

    quick: bool = field(default=False, metadata={"help": "Less than five minutes."})
    steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16], metadata={"help": "Steps of an episode."})
    repetitions: int = field(default=3, metadata={"help": "Updates and rollouts of each kind."})
    threads: int = field(default=2, metadata={"help": "Threads."})


@dataclass(frozen=True)
class Work:
    """Episodes of one dataset row."""

    num_steps: int
    group_size: int = 1
    rebuilt: bool = False  # whether the prompt is rewritten every step, behind its first half
    small: bool = False  # a model for the growth of long episodes
    seed: int = 0
    threads: int = 2


def make_episodes(work: Work) -> list[Episode]:
    rng = random.Random(work.seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(count)]

    question = ids(PROMPT_TOKENS)
    episodes = []
    for generation in range(work.group_size):
        prompt, steps = question, []
        for index in range(work.num_steps):
            response = ids(RESPONSE_TOKENS)
            logprobs = [-math.log(VOCABULARY)] * RESPONSE_TOKENS
            steps.append(Step(prompt, response, logprobs, rng.random(), index, 0, 1.0, StopReason.STOP))
            observation = ids(OBSERVATION_TOKENS)
            if work.rebuilt:  # the question, and a new account of what happened
                prompt = question + ids(OBSERVATION_TOKENS)
            else:
                prompt = prompt + response + observation
        episodes.append(Episode(f"e{generation}", 0, generation, tuple(steps), True, False))
    return episodes


def make_model(work: Work) -> Qwen2ForCausalLM:
    torch.manual_seed(work.seed)
    size = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4}
    if not work.small:  # 30 million parameters
        size = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    heads = {"num_key_value_heads": size["num_attention_heads"] // 2, "max_position_embeddings": 16_384}
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
            max_tokens_per_micro_batch=MICRO_BATCH_TOKENS,  # the same bound of memory for both
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to="none",
            num_sample_generations=0,
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
    Seconds of the forward passes, backward passes and optimizer steps of such an update, on the same packed tokens, and
    nothing else: no values, no ratios, no credit.
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
    seen: set[tuple[int, ...]] = set()

    async def play(episode: Episode) -> list[int]:
        prompt, said = episode.steps[0].prompt_ids.tolist(), []
        for step in range(work.num_steps):
            if not keep:
                sampler.release(episode.episode_id)
            order = (episode.generation_index, step)
            sample = await sampler.sample(prompt, params, episode_id=episode.episode_id, order=order)
            said += sample.token_ids.tolist()
            seen.add(tuple(prompt))
            prompt = [*prompt, *sample.token_ids]
            prompt += [observations.randrange(VOCABULARY) for _ in range(OBSERVATION_TOKENS)]
        return said

    async def play_all() -> list[list[int]]:
        return [*await asyncio.gather(*map(play, episodes))]

    start = time.perf_counter()
    said = asyncio.run(play_all())
    seconds = time.perf_counter() - start
    sampled = len(episodes) * (work.num_steps - 1) * RESPONSE_TOKENS  # stand in later prompts, already computed
    trie = Trie()
    for prompt in seen:
        trie.insert(np.array(prompt, dtype=np.int32))
    return seconds, sampler.prefilled_tokens / max(1, trie.num_tokens - sampled), said


def prepare_process(threads: int) -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)


def peak_bytes() -> int:
    """The most memory that was resident at a time."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def growth_exponent(steps: Sequence[int], seconds: Sequence[float]) -> float:
    """Slope of log seconds over log steps, by least squares."""
    return statistics.linear_regression(list(map(math.log, steps)), list(map(math.log, seconds))).slope
