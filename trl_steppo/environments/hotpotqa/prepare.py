"""
Prepares a data set of multi-hop questions once, so that every run opens it in seconds; `prepared.py` lists the files.

The stages are written one after another into a temporary directory, which is renamed when all of them are complete. A
stage is complete when its files are on the disk and in the manifest: after an interruption, preparing continues with
the next stage.
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
    A data set on the hub, and its size.

    Args:
        train (`str` or `None`):
            Where its training rows are; `None` for a data set for evaluation only.
        validation (`str`):
            Where its evaluation rows are.
        counts (`dict[str, int]`):
            The published numbers of questions and passages.
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
        # The repository has a loading script, which `datasets` no longer runs, so its file is read.
        validation="hf://datasets/xanhho/2WikiMultihopQA/dev.parquet",
        counts={"validation": 12_576},
    ),
    "musique": KnownDataset(train=None, validation="dgslibisey/MuSiQue", counts={"validation": 2_417}),
}
"""The known data sets. 2WikiMultiHopQA and MuSiQue are for out-of-domain evaluation."""


@dataclass(frozen=True)
class Preparation:
    """
    Questions, corpus and index of a data set, to be written into a directory.

    Args:
        dataset (`str`, *optional*, defaults to `"hotpotqa"`):
            `"hotpotqa"`, `"2wikimultihopqa"` or `"musique"`. Decides the default sources and the expected counts.
        train (`Sequence[str]`, *optional*):
            Other sources of the training rows: local files, or a name on the hub.
        validation (`Sequence[str]`, *optional*):
            Other sources of the evaluation rows. By default, if `train` names files, a share of their rows.
        revision (`str`, *optional*):
            Revision of the data sets on the hub.
        aliases_file (`str`, *optional*):
            2WikiMultiHopQA's `id_aliases.json`.
        eval_share (`float`, *optional*, defaults to `0.1`):
            Share of local training files that is used for evaluation.
        seed (`int`, *optional*, defaults to `0`):
            Decides which of their rows are used for evaluation.
        title_weight, k1, b (*optional*):
            Settings of [`BM25Retriever`].
        dense_model (`str`, *optional*):
            Encoder of a [`DenseRetriever`], which is then prepared as well and used for searches.
        check_counts (`bool`, *optional*):
            Whether counts that differ from the published ones are an error. `None`: if all rows come from the default
            source.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.

    Raises:
        ConfigurationError: If a setting is not among its choices, or out of range.
    """

    dataset: str = "hotpotqa"
    train: Sequence[str] = ()
    validation: Sequence[str] = ()
    revision: str | None = None
    aliases_file: str | None = None
    eval_share: float = 0.1
    seed: int = 0
    title_weight: int = 3
    k1: float = 1.5
    b: float = 0.75
    dense_model: str | None = None
    check_counts: bool | None = None
    show_progress: bool = True

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            known = ", ".join(map(repr, DATASETS))
            raise ConfigurationError(f"dataset is {self.dataset!r}; it has to be one of {known}")
        check_bm25_settings(title_weight=self.title_weight, k1=self.k1, b=self.b)

    def write(self, directory: Path, *, report: Callable[[str], None] = print) -> Manifest:
        """
        Write all files. A directory that was prepared with the same settings is checked and left unchanged.

        Args:
            directory (`Path`):
                Where to write. It must be new, or prepared with the same settings.
            report (`Callable`, *optional*, defaults to `print`):
                Called with a line for each stage.

        Returns:
            [`Manifest`]: The description of the directory.

        Raises:
            ConfigurationError: If the directory has other content or other settings, or is being prepared by another
                process.
            DataError: If rows are invalid.
        """
        settings = self._settings()
        if directory.exists():
            manifest = _compare(directory, settings)
            report(f"{directory} is prepared already, with these settings, and intact")
            return manifest
        with _in_the_making(directory, settings) as (partial, manifest):
            _stage("data", partial, manifest, self.data, report)
            _stage(BM25, partial, manifest, self.bm25, report)
            if self.dense_model is not None:
                _stage(DENSE, partial, manifest, self.dense, report)
        numbers = ", ".join(f"{number:,} {name}" for name, number in manifest.counts.items())
        report(f"{directory}: {numbers}")
        return manifest

    def data(self, directory: Path) -> dict[str, int]:
        """Stage 1: write the rows, without their contexts, and the corpus of all paragraphs. Returns their counts."""
        train, validation = self._sources()
        rows: dict[str, Dataset] = {}
        if train:
            rows["train"] = self._load(train, "train")
        if validation:
            rows["validation"] = self._load(validation, "validation")
        else:
            source = " ".join(train)
            rows["train"], rows["validation"] = split_rows(rows["train"], self.eval_share, self.seed, source)
        counts = {name: len(some) for name, some in rows.items()}
        contexts = (row for some in rows.values() for row in some.select_columns("context"))
        counts["passages"] = write_corpus(directory / CORPUS, make_corpus(contexts))
        if self.check_counts or (self.check_counts is None and not self.train and not self.validation):
            _check_counts(counts, DATASETS[self.dataset].counts, self.dataset)
        for name, path in (("train", TRAIN), ("validation", VALIDATION)):
            if name in rows:
                rows[name].remove_columns("context").to_parquet(directory / path)
        return counts

    def bm25(self, directory: Path) -> dict[str, int]:
        """Stage 2: write the index of words. Counts nothing."""
        retriever = BM25Retriever(
            MappedCorpus(directory / CORPUS),
            title_weight=self.title_weight,
            k1=self.k1,
            b=self.b,
            show_progress=self.show_progress,
        )
        retriever.save(directory / BM25)
        return {}

    def dense(self, directory: Path) -> dict[str, int]:
        """Stage 3, if there is an encoder: write the index of embeddings. Counts nothing."""
        assert self.dense_model is not None
        passages = MappedCorpus(directory / CORPUS)
        DenseRetriever(passages, self.dense_model, show_progress=self.show_progress).save(directory / DENSE)
        return {}

    def _settings(self) -> dict[str, object]:
        """Everything that decides the content of the files, as the manifest stores it."""
        train, validation = self._sources()
        return {
            "dataset": self.dataset,
            "train": _identities(train),
            "validation": _identities(validation),
            "revision": self.revision,
            "aliases": None if self.aliases_file is None else _identities([self.aliases_file]),
            "dealt": None if validation else {"eval_share": self.eval_share, "seed": self.seed},
            "bm25": {"title_weight": self.title_weight, "k1": self.k1, "b": self.b},
            "dense_model": self.dense_model,
        }

    def _sources(self) -> tuple[Sequence[str], Sequence[str]]:
        """The sources of training and evaluation rows; by default the data set's own place on the hub."""
        if not self.train and not self.validation:
            known = DATASETS[self.dataset]
            return [known.train] if known.train else [], [known.validation]
        if not self.validation and not is_file(self.train[0]):
            return self.train, self.train  # a data set on the hub has a split for each
        return self.train, self.validation

    def _load(self, names: Sequence[str], split: str) -> Dataset:
        return load_rows(names, split, revision=self.revision, aliases_file=self.aliases_file)


def prepare(
    directory: str | Path, dataset: str = "hotpotqa", *, report: Callable[[str], None] = print, **settings: Any
) -> Manifest:
    """
    Prepare a data set in a directory: short for `Preparation(dataset, **settings).write(directory)`.

    Args:
        directory (`str` or `Path`), report (`Callable`, *optional*, defaults to `print`):
            See [`~Preparation.write`].
        dataset (`str`, *optional*, defaults to `"hotpotqa"`), settings (`Any`):
            See [`Preparation`].
    """
    return Preparation(dataset, **settings).write(Path(directory), report=report)


def _identities(names: Sequence[str]) -> list[str]:
    """Identifies sources: data sets on the hub by name, files by name and content."""
    return [f"{Path(name).name} sha256:{_hash(name)}" if is_file(name) else name for name in names]


def _hash(name: str) -> str:
    if not Path(name).is_file():
        raise DataError(f"{name}: there is no such file; name a local file, or a data set on the hub")
    return mark_of(Path(name)).sha256


def _compare(directory: Path, settings: dict[str, object]) -> Manifest:
    """The manifest of a directory. Raises unless it is intact and was prepared with these settings."""
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
def _in_the_making(directory: Path, settings: dict[str, object]) -> Iterator[tuple[Path, Manifest]]:
    """Yields a temporary directory and its manifest; it becomes `directory` if the block ends without an error."""
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


def _leftover(partial: Path, settings: dict[str, object]) -> Manifest:
    """The manifest that an interrupted process with the same settings left. Files of other settings are removed."""
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
    """Have `write` fill the folder `name`, unless an interrupted process has completed it; update the manifest."""
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
