"""
`StepPOTrainer` with `advantage_estimator="grpo"` against TRL's `GRPOTrainer`: tokens sampled per second of training,
and peak memory, in one run.

Held equal: the policy and its precision (float32, on a CPU), the rows, 8 rows x 8 generations an update in
micro-batches of 8, one optimizer step an update, the temperature, the learning rate, the longest response and no
gradient checkpointing. As an agent, each plays episodes of five responses in the mini wiki; besides, each gives single
responses without an environment. `GRPOTrainer` cannot end an episode when an answer was given, so an answer is looked
up like a search here, and no episode of either ends early. The learning rate is so small that the policy stays the
same: both then sample nearly the same number of tokens, which is checked.

`GRPOTrainer` has no setting for the longest response of an episode that has several. It is given one through
`generation_kwargs`, with which it is the fastest on the machine this was written on; `GRPOTrainer, defaults` is the
same without, and with gradient checkpointing, as its documentation leaves it. The trainers take turns, each in a
process of its own. The version of TRL is the installed one.

    python benchmarks/vs_grpo_trainer.py [--quick] [--json FILE]
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
import trl
from common.processes import in_new_process, peak_bytes
from common.record import BenchmarkArguments, parse_arguments, print_table, write_record
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen3_template

from trl_steppo import StepPOConfig, StepPOTrainer
from trl_steppo.assets import MINI_WIKI_POLICY
from trl_steppo.environments.hotpotqa import HotpotQAEnvironment, hotpotqa_dataset
from trl_steppo.types import JsonObject

OURS, THEIRS, DEFAULTS = "StepPOTrainer", "GRPOTrainer", "GRPOTrainer, defaults"
CASES = {"agent": 5, "single turn": 1}
"""Responses of an episode."""

TIMED = {"agent": 1, "single turn": 5}
"""Updates that are timed for one of an agent's, as they are that much shorter."""

ROWS, GENERATIONS, MICRO_BATCH = 8, 8, 8
EPISODES = ROWS * GENERATIONS
RESPONSE_TOKENS = 40
EPISODE_TOKENS = 512  # that follow the prompt: more than an episode has in which no response is longer than that
TOLERANCE = 0.1  # by which the numbers of sampled tokens may differ


@dataclass
class VsGRPOTrainerArguments(BenchmarkArguments):
    """
    Args:
        quick (`bool`, *optional*, defaults to `False`):
            Two updates of each trainer, once, with one thread; less than two minutes.
        threads (`list[int]`, *optional*, defaults to `[1, 2]`):
            Numbers of threads, of both trainers.
        updates (`int`, *optional*, defaults to `3`):
            Updates of an agent's process; the first warms it up, and is not timed. `--quick` makes 2. For single
            turns five times as many are timed.
        repetitions (`int`, *optional*, defaults to `3`):
            Processes of each trainer in each case; `--quick` starts 1.
    """

    quick: bool = field(default=False, metadata={"help": "Two updates of each trainer, once, with one thread."})
    threads: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Numbers of threads."})
    updates: int = field(default=3, metadata={"help": "Updates of a process, the first of which is not timed."})
    repetitions: int = field(default=3, metadata={"help": "Processes of each trainer in each case."})


@dataclass(frozen=True)
class Work:
    """What one process trains."""

    case: str
    threads: int
    updates: int
    seed: int


@dataclass(frozen=True)
class Cost:
    """What a process took; of its timed updates the means."""

    seconds: float
    cpu_seconds: float  # of all threads, those that wait for one another among them
    sampled_tokens: float
    responses: float  # of an episode
    peak_bytes: int
    import_bytes: int

    @property
    def tokens_per_s(self) -> float:
        return self.sampled_tokens / self.seconds

    @property
    def tokens_per_cpu_s(self) -> float:
        return self.sampled_tokens / self.cpu_seconds


class EndlessWiki(HotpotQAEnvironment):
    """The mini wiki, in which an answer ends nothing: it is looked up like a search."""

    def answer(self, text: str) -> str:
        """
        Give the final answer.

        Args:
            text: The answer alone, as short as possible.

        Returns:
            A confirmation.
        """
        return self.search(text)


class Clock(TrainerCallback):
    """When each update was over, in seconds and in CPU seconds."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.times.append((time.perf_counter(), time.process_time()))


def length_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """Something that differs within a group, for the case without an environment."""
    return [float(len(str(completion))) for completion in completions]


def common_settings(work: Work, output_dir: str) -> JsonObject:
    """What both are told by the same name."""
    return {
        "output_dir": output_dir,
        "per_device_train_batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": EPISODES // MICRO_BATCH,
        "num_generations": GENERATIONS,
        "max_steps": work.updates,
        "learning_rate": 1e-6,
        "temperature": 1.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": work.seed,
    }


def make_trainer(name: str, work: Work, output_dir: str) -> Any:
    """Either trainer, with the same policy, rows and environment."""
    tokenizer = AutoTokenizer.from_pretrained(MINI_WIKI_POLICY)
    model = AutoModelForCausalLM.from_pretrained(MINI_WIKI_POLICY, dtype=torch.float32)
    data = hotpotqa_dataset("mini_wiki")
    responses, common = CASES[work.case], common_settings(work, output_dir)
    played: JsonObject = {"environment_factory": partial(EndlessWiki, data.retriever, top_k=1)}
    if work.case == "single turn":
        played = {"reward_funcs": length_reward}
    if name == OURS:
        args: Any = StepPOConfig(
            **common,
            advantage_estimator="grpo",
            importance_sampling_level="token",
            loss_aggregation="token",
            response_length=RESPONSE_TOKENS,
            max_interaction_steps=responses,
            num_sample_generations=0,
            log_episodes=0,
        )
        return StepPOTrainer(
            args=args, processing_class=tokenizer, model=model, train_dataset=data.train_dataset, **played
        )
    tokenizer.response_template = qwen3_template  # it does not know the policy's chat template
    if name == THEIRS:
        common["generation_kwargs"] = {"max_new_tokens": RESPONSE_TOKENS}  # of one response
    else:
        del common["gradient_checkpointing"]
    args = GRPOConfig(
        **common,
        max_completion_length=EPISODE_TOKENS if responses > 1 else RESPONSE_TOKENS,
        max_tool_calling_iterations=responses - 1,
    )
    return GRPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=model,
        train_dataset=data.train_dataset,
        **{"reward_funcs": [], **played},
    )


def train(name: str, work: Work) -> Cost:
    """All updates of a process; to be called in a new one."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(work.threads)
    import_bytes = peak_bytes()
    with tempfile.TemporaryDirectory() as output_dir, contextlib.redirect_stdout(io.StringIO()):
        trainer, clock = make_trainer(name, work, output_dir), Clock()
        trainer.add_callback(clock)
        trainer.train()
        timed = updates_of(name, trainer.state.log_history)[1:]
    assert len(clock.times) == work.updates == len(timed) + 1, f"{name} made {len(clock.times)} updates"
    (start, cpu_start), (end, cpu_end) = clock.times[0], clock.times[-1]
    return Cost(
        seconds=(end - start) / len(timed),
        cpu_seconds=(cpu_end - cpu_start) / len(timed),
        sampled_tokens=statistics.mean(tokens for tokens, _ in timed),
        responses=statistics.mean(responses for _, responses in timed),
        peak_bytes=peak_bytes(),
        import_bytes=import_bytes,
    )


def updates_of(name: str, history: Sequence[Mapping[str, float]]) -> list[tuple[float, float]]:
    """The tokens that each update sampled, and the responses of its episodes, as the trainer logs them."""
    if name == OURS:
        return [
            (logs["perf/sampled_tokens"], logs["env/episode_steps"])
            for logs in history
            if "perf/sampled_tokens" in logs
        ]
    return [
        (logs["completions/mean_length"] * EPISODES, logs.get("tools/call_frequency", 0.0) + 1.0)
        for logs in history
        if "completions/mean_length" in logs
    ]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def compare(costs: Mapping[str, Sequence[Cost]], theirs: str) -> JsonObject:
    """Ratios of ours to theirs over pairs of processes that ran after each other."""
    pairs = list(zip(costs[OURS], costs[theirs], strict=True))
    return {
        "tokens_per_s": spread([ours.tokens_per_s / other.tokens_per_s for ours, other in pairs]),
        "tokens_per_cpu_s": spread([ours.tokens_per_cpu_s / other.tokens_per_cpu_s for ours, other in pairs]),
        "seconds": spread([ours.seconds / other.seconds for ours, other in pairs]),
        "peak_memory": spread([ours.peak_bytes / other.peak_bytes for ours, other in pairs]),
        "sampled_tokens": mean_tokens(costs[OURS]) / mean_tokens(costs[theirs]),
    }


def mean_tokens(costs: Sequence[Cost]) -> float:
    return statistics.mean(cost.sampled_tokens for cost in costs)


def name_of(case: str, threads: int) -> str:
    return f"{case}, {threads} thread{'s' if threads > 1 else ''}"


def main(args: VsGRPOTrainerArguments) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # in the processes of both
    threads = args.threads[:1] if args.quick else args.threads
    updates, repetitions = (2, 1) if args.quick else (args.updates, args.repetitions)
    measured: dict[str, dict[str, list[Cost]]] = {}
    for case, count in itertools.product(CASES, threads):
        work = Work(case, count, 1 + (updates - 1) * TIMED[case], args.seed)
        costs: dict[str, list[Cost]] = {name: [] for name in (THEIRS, DEFAULTS, OURS)}
        measured[name_of(case, count)] = costs
        for _ in range(repetitions):
            for name in costs:
                costs[name].append(in_new_process(train, name, work))
    ratios = {
        case: {theirs: compare(costs, theirs) for theirs in (THEIRS, DEFAULTS)} for case, costs in measured.items()
    }
    print_table(
        f"{EPISODES} episodes an update beside TRL {trl.__version__} (medians of {repetitions} processes; ratios: "
        f"{OURS}'s over this trainer's, with their range)",
        ["case and trainer", "s / update", "tokens", "tokens / s", "ratio", "ratio of CPU s", "peak MB", "ratio"],
        [
            table_row(f"{case}: {name}", costs, ratios[case].get(name))
            for case, by_name in measured.items()
            for name, costs in by_name.items()
        ],
    )
    figures = {
        "ratios": ratios,
        "processes": {
            case: {name: [asdict(cost) for cost in costs] for name, costs in by_name.items()}
            for case, by_name in measured.items()
        },
        "episodes": EPISODES,
        "updates": updates,
        "repetitions": repetitions,
    }
    write_record(args.json, figures)
    for case, by_name in ratios.items():
        check_work(case, by_name[THEIRS]["sampled_tokens"])


def check_work(case: str, ratio: float) -> None:
    """Raise if the trainers did not sample nearly the same number of tokens."""
    if abs(ratio - 1.0) > TOLERANCE:
        raise SystemExit(f"{case}: {OURS} sampled {ratio:.2f} times as many tokens as {THEIRS}: the work differs")


def table_row(name: str, costs: Sequence[Cost], ratios: Mapping[str, Any] | None) -> list[str]:
    return [
        name,
        f"{statistics.median(cost.seconds for cost in costs):.2f}",
        f"{mean_tokens(costs):,.0f}",
        f"{statistics.median(cost.tokens_per_s for cost in costs):,.0f}",
        shown(ratios["tokens_per_s"]) if ratios else "",
        shown(ratios["tokens_per_cpu_s"]) if ratios else "",
        f"{statistics.median(cost.peak_bytes for cost in costs) / 1e6:,.0f}",
        shown(ratios["peak_memory"]) if ratios else "",
    ]


def shown(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"


if __name__ == "__main__":
    main(parse_arguments(VsGRPOTrainerArguments))
