"""
Prepares a data set of multi-hop questions once, so that every run opens it in seconds; `prepared.py` shows the files.

All is written beside its place, stage by stage. A stage counts when its files are on the disk and in the manifest, so
that a run that was stopped goes on with the next; the directory gets its name when all stages are there.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import durable
from ...errors import ConfigurationError, DataError
from .corpus import MappedCorpus, write_corpus
from .data import is_file, load_rows, make_corpus, split_rows
from .dense import DenseRetriever
from .prepared import (
    BM25,
    CORPUS,
    DENSE,
    MANIFEST,
    TRAIN,
    VALIDATION,
    Manifest,
    check_files,
    is_prepared,
    mark_of,
    read_manifest,
)
from .retrieval import BM25Retriever, check_bm25_settings

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class KnownDataset:
    """
    Where a data set is on the hub, and how large it is.

    Args:
        train (`str` or `None`):
            Its training rows; `None` for a data set that is for evaluation.
        validation (`str`):
            Its evaluation rows.
        counts (`dict[str, int]`):
            Numbers of questions and passages, as far as they are published.
    """

    train: str | None
    validation: str
    counts: dict[str, int]


DATASETS = {
    "hotpotqa": KnownDataset(
        train="hotpotqa/hotpot_qa",
        validation="hotpotqa/hotpot_qa",
        counts={"train": 90_447, "validation": 7_405, "passages": 509_308},
    ),
    "2wikimultihopqa": KnownDataset(
        train=None,
        # The repository has a loading script, which `datasets` does not run any more: its file is read.
        validation="hf://datasets/xanhho/2WikiMultihopQA/dev.parquet",
        counts={"validation": 12_576},
    ),
    "musique": KnownDataset(train=None, validation="dgslibisey/MuSiQue", counts={"validation": 2_417}),
}
"""The data sets that are known by name. 2WikiMultiHopQA and MuSiQue are for evaluation out of domain."""


def prepare(
    directory: str | Path,
    dataset: str = "hotpotqa",
    *,
    train: Sequence[str] = (),
    validation: Sequence[str] = (),
    revision: str | None = None,
    aliases_file: str | None = None,
    eval_share: float = 0.1,
    seed: int = 0,
    title_weight: int = 3,
    k1: float = 1.5,
    b: float = 0.75,
    dense_model: str | None = None,
    check_counts: bool | None = None,
    show_progress: bool = True,
    report: Callable[[str], None] = print,
) -> Manifest:
    """
    Write questions, corpus and index of a data set into a directory.

    A directory that was prepared with the same settings is checked and left as it is.

    Args:
        directory (`str` or `Path`):
            Where to write; it must not be there yet.
        dataset (`str`, *optional*, defaults to `"hotpotqa"`):
            `"hotpotqa"`, `"2wikimultihopqa"` or `"musique"`: where rows come from and how many there are.
        train (`Sequence[str]`, *optional*):
            Training rows from elsewhere: local files, or a name on the hub.
        validation (`Sequence[str]`, *optional*):
            Evaluation rows from elsewhere. Left out where `train` names files: a share of those.
        revision (`str`, *optional*):
            Revision of data sets on the hub.
        aliases_file (`str`, *optional*):
            2WikiMultiHopQA's `id_aliases.json`.
        eval_share (`float`, *optional*, defaults to `0.1`):
            Share of local training files that is kept for evaluation.
        seed (`int`, *optional*, defaults to `0`):
            Which of their rows are.
        title_weight, k1, b (*optional*):
            Settings of [`BM25Retriever`].
        dense_model (`str`, *optional*):
            Encoder of a [`DenseRetriever`], which is then written, too, and used.
        check_counts (`bool`, *optional*):
            Whether numbers that differ from the full data set's are an error. `None`: if all rows come from its own
            place on the hub.
        show_progress (`bool`, *optional*, defaults to `True`):
            Show bars.
        report (`Callable`, *optional*, defaults to `print`):
            Gets a line for each stage.

    Returns:
        [`Manifest`]: What was written.

    Raises:
        ConfigurationError: If the directory is there with other settings or something else in it, or is being
            prepared.
        DataError: If rows are not what they should be.
    """
    if dataset not in DATASETS:
        raise ConfigurationError(f"dataset is {dataset!r}; it has to be one of {', '.join(map(repr, DATASETS))}")
    check_bm25_settings(title_weight=title_weight, k1=k1, b=b)
    known = DATASETS[dataset]
    if check_counts is None:
        check_counts = not train and not validation
    if not train and not validation:
        train, validation = [known.train] if known.train else [], [known.validation]
    elif not validation and not is_file(train[0]):
        validation = train
    settings: dict[str, Any] = {
        "dataset": dataset,
        "train": _identities(train),
        "validation": _identities(validation),
        "revision": revision,
        "aliases": None if aliases_file is None else _identities([aliases_file]),
        "dealt": None if validation else {"eval_share": eval_share, "seed": seed},
        "bm25": {"title_weight": title_weight, "k1": k1, "b": b},
        "dense_model": dense_model,
    }
    directory = Path(directory)
    if directory.exists():
        manifest = _compare(directory, settings)
        report(f"{directory} is prepared already, with these settings, and intact")
        return manifest

    def load(names: Sequence[str], split: str) -> Dataset:
        return load_rows(names, split, revision=revision, aliases_file=aliases_file)

    def write_data(partial: Path) -> dict[str, int]:
        rows: dict[str, Dataset] = {}
        if train:
            rows["train"] = load(train, "train")
        if validation:
            rows["validation"] = load(validation, "validation")
        else:
            rows["train"], rows["validation"] = split_rows(rows["train"], eval_share, seed, " ".join(train))
        counts = {name: len(some) for name, some in rows.items()}
        contexts = (row for some in rows.values() for row in some.select_columns("context"))
        counts["passages"] = write_corpus(partial / CORPUS, make_corpus(contexts))
        if check_counts:
            _check_counts(counts, known.counts, dataset)
        for name, path in (("train", TRAIN), ("validation", VALIDATION)):
            if name in rows:
                rows[name].remove_columns("context").to_parquet(partial / path)
        return counts

    def write_bm25(partial: Path) -> dict[str, int]:
        passages = MappedCorpus(partial / CORPUS)
        BM25Retriever(passages, title_weight=title_weight, k1=k1, b=b, show_progress=show_progress).save(
            partial / BM25
        )
        return {}

    def write_dense(partial: Path) -> dict[str, int]:
        assert dense_model is not None
        DenseRetriever(MappedCorpus(partial / CORPUS), dense_model, show_progress=show_progress).save(partial / DENSE)
        return {}

    with _in_the_making(directory, settings) as (partial, manifest):
        _stage("data", partial, manifest, write_data, report)
        _stage(BM25, partial, manifest, write_bm25, report)
        if dense_model is not None:
            _stage(DENSE, partial, manifest, write_dense, report)
    numbers = ", ".join(f"{number:,} {name}" for name, number in manifest.counts.items())
    report(f"{directory}: {numbers}")
    return manifest


def _identities(names: Sequence[str]) -> list[str]:
    """Names on the hub; files by name and content, wherever they lie."""
    return [f"{Path(name).name} sha256:{_hash(name)}" if is_file(name) else name for name in names]


def _hash(name: str) -> str:
    if not Path(name).is_file():
        raise DataError(f"{name}: there is no such file; name a local file, or a data set on the hub")
    return mark_of(Path(name)).sha256


def _compare(directory: Path, settings: dict[str, Any]) -> Manifest:
    """The manifest of a directory that was prepared with these settings and is intact."""
    if not is_prepared(directory):
        raise ConfigurationError(f"{directory} is there, and nothing was prepared in it; name a directory that is new")
    manifest = read_manifest(directory)
    differing = [
        f"{name} = {manifest.settings.get(name)!r}, now {value!r}"
        for name, value in settings.items()
        if manifest.settings.get(name) != value
    ]
    if differing:
        raise ConfigurationError(
            f"{directory} was prepared with {'; '.join(differing)}; name another directory, or remove this one"
        )
    check_files(directory, manifest.files)
    return manifest


def _check_counts(counts: dict[str, int], expected: dict[str, int], dataset: str) -> None:
    differing = [
        f"{counts.get(name, 0):,} {name} instead of {number:,}"
        for name, number in expected.items()
        if counts.get(name, 0) != number
    ]
    if differing:
        raise DataError(
            f"{dataset}: there are {', '.join(differing)}; if this is not meant to be the full data set, switch the "
            "check off (--no_check_counts)"
        )


@contextmanager
def _in_the_making(directory: Path, settings: dict[str, Any]) -> Iterator[tuple[Path, Manifest]]:
    """The directory beside `directory` that becomes it when the block ends without an error."""
    partial = durable.partial_of(directory)
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however it ends
        except BlockingIOError as error:
            raise ConfigurationError(f"{directory} is being prepared by another process; wait for it") from error
        yield partial, _leftover(partial, settings)
        durable.publish(partial, directory)
    finally:
        os.close(descriptor)


def _leftover(partial: Path, settings: dict[str, Any]) -> Manifest:
    """How far an earlier run with the same settings came; what another left is removed."""
    if (partial / MANIFEST).is_file():
        manifest = read_manifest(partial)
        if manifest.settings == settings:
            return manifest
    for path in partial.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return Manifest(settings)


def _stage(
    name: str,
    partial: Path,
    manifest: Manifest,
    write: Callable[[Path], dict[str, int]],
    report: Callable[[str], None],
) -> None:
    """Let `write` fill the folder `name`, unless an earlier run did; then it counts."""
    done = {path: mark for path, mark in manifest.files.items() if path.startswith(f"{name}/")}
    if done:
        check_files(partial, done)
        report(f"{name}: there already")
        return
    report(f"{name}: being made")
    shutil.rmtree(partial / name, ignore_errors=True)
    (partial / name).mkdir()
    manifest.counts.update(write(partial))
    for path in sorted((partial / name).iterdir()):
        durable.sync(path)
        manifest.files[f"{name}/{path.name}"] = mark_of(path)
    durable.sync(partial / name)
    with durable.file(partial / MANIFEST) as path:
        path.write_text(manifest.to_json())
