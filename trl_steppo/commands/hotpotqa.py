"""`trl-steppo hotpotqa prepare`: questions, corpus and search index in one directory."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import ConfigurationError

HELP = "prepare data sets of multi-hop questions for training"
EXAMPLES = """\
  trl-steppo hotpotqa prepare data/hotpotqa
  trl-steppo hotpotqa prepare data/musique --dataset musique
  accelerate launch examples/hotpotqa_steppo.py --config RECIPE --dataset_name data/hotpotqa
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    tasks = parser.add_subparsers(dest="task", metavar="TASK", help="what is prepared: see below")
    prepare = tasks.add_parser(
        "prepare",
        formatter_class=parser.formatter_class,
        help="questions, corpus and search index in one directory; a run takes it as --dataset_name",
    )
    prepare.add_argument(
        "directory", metavar="DIRECTORY", help="where to write; run it again after a stop, and it goes on"
    )
    prepare.add_argument(
        "--dataset", choices=["hotpotqa", "2wikimultihopqa", "musique"], default="hotpotqa", help="which questions"
    )
    prepare.add_argument(
        "--train", nargs="+", default=[], metavar="NAME", help="training rows from elsewhere: files, or a hub id"
    )
    prepare.add_argument("--validation", nargs="+", default=[], metavar="NAME", help="evaluation rows from elsewhere")
    prepare.add_argument("--revision", metavar="REV", help="revision of data sets on the hub")
    prepare.add_argument("--aliases", metavar="FILE", help="2WikiMultiHopQA's id_aliases.json")
    prepare.add_argument(
        "--eval_share", type=float, default=0.1, metavar="X", help="share of training files without --validation (0.1)"
    )
    prepare.add_argument("--seed", type=int, default=0, metavar="N", help="which of their rows")
    prepare.add_argument(
        "--title_weight", type=int, default=3, metavar="N", help="BM25: how often a title's words count"
    )
    prepare.add_argument("--k1", type=float, default=1.5, metavar="X", help="BM25: how slowly repetition saturates")
    prepare.add_argument(
        "--b", type=float, default=0.75, metavar="X", help="BM25: how much long passages are marked down"
    )
    prepare.add_argument("--dense", metavar="MODEL", help="an encoder: searches then compare embeddings")
    prepare.add_argument(
        "--check_counts",
        action="store_true",
        default=None,
        help="numbers other than the full data set's are an error; by default for its own place on the hub",
    )
    prepare.add_argument("--no_check_counts", dest="check_counts", action="store_false", help="they never are")


def run(args: argparse.Namespace) -> None:
    """Prepare a data set, and print a line for each stage."""
    if args.task is None:
        raise ConfigurationError("say what to do: `trl-steppo hotpotqa prepare DIRECTORY`")
    from ..environments.hotpotqa import Preparation

    preparation = Preparation(
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
    preparation.write(Path(args.directory))
