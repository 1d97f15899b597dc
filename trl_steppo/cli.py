"""The `trl-steppo` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import StepPOError
from .launch_file import CONFIGS


class _Parser(argparse.ArgumentParser):
    """Options are written with underscores, or with hyphens, as in TRL's scripts."""

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        hyphenated = [name.replace("_", "-") for name in names if name.startswith("--") and "_" in name]
        return super().add_argument(*names, *hyphenated, **settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; errors that name their cure are printed without a traceback."""
    parser = _Parser(prog="trl-steppo", description="Step-level PPO for LLM agents.")
    commands = parser.add_subparsers(dest="command", required=True)

    config = commands.add_parser(
        "config", help="where an accelerate configuration lies that is shipped with the package"
    )
    config.add_argument("name", nargs="?", help="its name; left out, all names are listed")
    config.set_defaults(run=show_config)

    memory = commands.add_parser("memory", help="what a run needs of each GPU's memory, from the model's shape alone")
    memory.add_argument("model", help="Qwen2.5-3B, Qwen3-1.7B, Qwen3-4B (built in), a directory, or a name on the hub")
    engines = ["single", "ddp", "zero2", "zero3", "zero3_offload", "fsdp2"]
    memory.add_argument("--engine", nargs="+", choices=engines, default=engines)
    memory.add_argument("--gpus", nargs="+", type=int, default=[1, 2, 4, 8])
    memory.add_argument(
        "--weights", choices=["float32", "bfloat16"], default="float32", help="what they are loaded as"
    )
    memory.add_argument("--no_bf16", dest="bf16", action="store_false", help="no mixed precision")
    memory.add_argument("--no_critic", dest="critic", action="store_false", help="an estimator without a critic")
    memory.add_argument("--reference", action="store_true", help="with a KL term")
    memory.add_argument("--lora_rank", type=int, default=0, help="adapters on all linear layers; 0: none")
    memory.add_argument("--critic_shares_base", action="store_true")
    memory.add_argument("--no_gradient_checkpointing", dest="gradient_checkpointing", action="store_false")
    memory.add_argument("--micro_batch_tokens", type=int, default=16_384, help="max_tokens_per_micro_batch")
    memory.add_argument("--cache_tokens", type=int, default=262_144, help="rollout_cache_tokens")
    memory.add_argument("--concurrent_episodes", type=int, default=64)
    memory.add_argument(
        "--samples_in",
        choices=("trainer", "worker", "vllm"),
        default="trainer",
        help="what samples: the trainer, a process beside it (max_staleness), servers on other GPUs (use_vllm)",
    )
    memory.add_argument("--details", action="store_true", help="a table for each engine, by what the memory is for")
    memory.set_defaults(run=show_memory)

    check = commands.add_parser("check", help="a dry run of a recipe: its settings, and one small update")
    check.add_argument("config", help="a YAML file of settings, as `--config` takes it")
    check.add_argument("--dataset_name", help="rows to play instead of the recipe's; `mini_wiki` is built in")
    check.add_argument(
        "--config_file", help="the accelerate file it will be launched with: a shipped one's name, or a path"
    )
    check.set_defaults(run=run_check)

    report = commands.add_parser("report", help="runs as one HTML file: curves, final figures, episodes step by step")
    report.add_argument("runs", nargs="+", metavar="RUN", help="a finished run's output_dir")
    report.add_argument("--output", default="report.html", metavar="FILE.html", help="plots lie beside it as PNG")
    report.set_defaults(run=make_report)

    _add_gateway(commands)
    _add_hotpotqa(commands)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except (StepPOError, OSError, ValueError, TypeError) as error:  # transformers checks settings by the last two
        print(f"trl-steppo {args.command}: {error}", file=sys.stderr)
        return 1


def _add_gateway(commands: argparse._SubParsersAction[_Parser]) -> None:
    gateway = commands.add_parser(
        "gateway", help="serve a model to agents over the OpenAI and Anthropic APIs, and record what it says"
    )
    gateway.add_argument("--model", required=True, help="`mini_wiki` (built in), a directory, or a name on the hub")
    gateway.add_argument("--host", default="127.0.0.1", help="address to listen on; by default this machine's own")
    gateway.add_argument("--port", type=int, default=8000, help="0: any free one")
    gateway.add_argument("--directory", default="runs/gateway", help="where sessions are kept, and the admin's key")
    gateway.add_argument("--dtype", default="auto", help="the weights' type: auto, float32, bfloat16")
    gateway.add_argument("--response_length", type=int, default=512, help="most tokens of one response")
    gateway.add_argument("--temperature", type=float, default=1.0)
    gateway.add_argument("--max_interaction_steps", type=int, default=5, help="most steps of a session")
    gateway.add_argument(
        "--idle_s", type=float, default=3600.0, help="seconds without a request after which a session is finished"
    )
    gateway.add_argument(
        "--allow_uncached_sampling",
        action="store_true",
        help="serve a model that cannot be sampled with a cache all the same, many times slower",
    )
    gateway.set_defaults(run=run_gateway)


def _add_hotpotqa(commands: argparse._SubParsersAction[_Parser]) -> None:
    hotpotqa = commands.add_parser("hotpotqa", help="data sets of multi-hop questions")
    tasks = hotpotqa.add_subparsers(dest="task", required=True)
    prepare = tasks.add_parser(
        "prepare", help="questions, corpus and search index in one directory; a run takes it as --dataset_name"
    )
    prepare.add_argument("directory", help="where to write; run it again after a stop, and it goes on")
    prepare.add_argument(
        "--dataset", choices=["hotpotqa", "2wikimultihopqa", "musique"], default="hotpotqa", help="which questions"
    )
    prepare.add_argument(
        "--train", nargs="+", default=[], metavar="NAME", help="training rows from elsewhere: files, or a hub id"
    )
    prepare.add_argument("--validation", nargs="+", default=[], metavar="NAME", help="evaluation rows from elsewhere")
    prepare.add_argument("--revision", help="of data sets on the hub")
    prepare.add_argument("--aliases", metavar="FILE", help="2WikiMultiHopQA's id_aliases.json")
    prepare.add_argument("--eval_share", type=float, default=0.1, help="of training files without --validation")
    prepare.add_argument("--seed", type=int, default=0, help="which of their rows")
    prepare.add_argument("--title_weight", type=int, default=3, help="BM25: how often a title's words count")
    prepare.add_argument("--k1", type=float, default=1.5, help="BM25: how slowly repetition saturates")
    prepare.add_argument("--b", type=float, default=0.75, help="BM25: how much long passages are marked down")
    prepare.add_argument("--dense", metavar="MODEL", help="an encoder: searches then compare embeddings")
    prepare.add_argument(
        "--check_counts",
        action="store_true",
        default=None,
        help="numbers other than the full data set's are an error; by default for its own place on the hub",
    )
    prepare.add_argument("--no_check_counts", dest="check_counts", action="store_false", help="they never are")
    prepare.set_defaults(run=prepare_hotpotqa)


def show_config(args: argparse.Namespace) -> int:
    """Print a path for `accelerate launch --config_file`."""
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    if args.name is None:
        for name in names:
            comment = (CONFIGS / f"{name}.yaml").read_text().splitlines()[0].removeprefix("# ")
            print(f"{name:16}{comment}")
        return 0
    if args.name not in names:
        print(f"trl-steppo config: there is no {args.name!r}; choose one of {', '.join(names)}", file=sys.stderr)
        return 1
    print(CONFIGS / f"{args.name}.yaml")
    return 0


def show_memory(args: argparse.Namespace) -> int:
    """Print what each GPU needs under each engine, and the smallest that has it."""
    from rich.console import Console
    from rich.table import Table

    from .memory import GIB, RESERVED, Setting, load_config, plan, shape_of

    shape = shape_of(load_config(args.model))
    names = [
        *("weights", "bf16", "critic", "reference", "lora_rank", "critic_shares_base", "gradient_checkpointing"),
        *("micro_batch_tokens", "cache_tokens", "concurrent_episodes", "samples_in"),
    ]
    common = {name: getattr(args, name) for name in names}
    console = Console()
    table = Table(
        title=f"{args.model}, {shape.parameters / 1e9:.2f} billion parameters: GB on each GPU (smallest that fits)",
        title_justify="left",
    )
    table.add_column("engine")
    for num_gpus in args.gpus:
        table.add_column(f"{num_gpus} GPU{'s' if num_gpus > 1 else ''}", justify="right")
    for engine in args.engine:
        plans = {n: plan(shape, Setting(engine, n, **common)) for n in args.gpus if engine != "single" or n == 1}
        cells = []
        for num_gpus in args.gpus:
            found = plans.get(num_gpus)
            cells.append(
                ""
                if found is None
                else f"{(found.peak + RESERVED) / 1e9:.0f} ({f'{found.fits} GB' if found.fits else 'none'})"
            )
        table.add_row(engine, *cells)
        if not args.details:
            continue
        details = Table(title=f"{engine}: GiB on each GPU", title_justify="left")
        details.add_column("what")
        for num_gpus in plans:
            details.add_column(str(num_gpus), justify="right")
        for phase in ("held", "training", "rollout", "host"):
            for name in dict.fromkeys(n for p in plans.values() for n in getattr(p, phase)):
                values = [getattr(p, phase).get(name, 0.0) / GIB for p in plans.values()]
                details.add_row(f"{phase}: {name}", *(f"{value:.1f}" for value in values))
        console.print(details)
    console.print(table)
    return 0


def run_check(args: argparse.Namespace) -> int:
    """See [`trl_steppo.dry_run`]."""
    from .dry_run import dry_run

    for line in dry_run(Path(args.config), dataset_name=args.dataset_name, config_file=args.config_file):
        print(line)
    return 0


def make_report(args: argparse.Namespace) -> int:
    """See [`trl_steppo.report`]."""
    from .report import write_report

    for path in write_report(args.runs, args.output):
        print(path)
    return 0


def run_gateway(args: argparse.Namespace) -> int:
    """See [`trl_steppo.serve`]."""
    from .serve import serve

    serve(
        args.model,
        host=args.host,
        port=args.port,
        directory=Path(args.directory),
        dtype=args.dtype,
        response_length=args.response_length,
        temperature=args.temperature,
        max_interaction_steps=args.max_interaction_steps,
        idle_s=args.idle_s,
        allow_uncached_sampling=args.allow_uncached_sampling,
    )
    return 0


def prepare_hotpotqa(args: argparse.Namespace) -> int:
    """See [`trl_steppo.environments.hotpotqa.prepare`]."""
    from .environments.hotpotqa import prepare

    prepare(
        args.directory,
        args.dataset,
        train=args.train,
        validation=args.validation,
        revision=args.revision,
        aliases_file=args.aliases,
        eval_share=args.eval_share,
        seed=args.seed,
        title_weight=args.title_weight,
        k1=args.k1,
        b=args.b,
        dense_model=args.dense,
        check_counts=args.check_counts,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
