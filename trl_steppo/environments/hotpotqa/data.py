"""Questions and the corpus to search: from the mini wiki, local files, the hub, or a prepared directory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from ...errors import ConfigurationError, DataError
from ...types import Row
from .layouts import in_common_layout, read_aliases
from .mini_wiki import make_mini_wiki
from .prepared import is_prepared, open_prepared
from .retrieval import BM25Retriever, Passage, Retriever

if TYPE_CHECKING:
    from datasets import Dataset

MINI_WIKI = "mini_wiki"
"""Name of the built-in mini wiki as a data set."""

SYSTEM_PROMPT = "Search the wiki step by step, then answer."
"""Short, because a small model reads it in every step."""

_HOTPOTQA = "hotpotqa/hotpot_qa"
_HUB_FILE = "hf://"
_FILE_SUFFIXES = (".json", ".jsonl", ".parquet")


class HotpotQAData(NamedTuple):
    """
    Rows and retriever of a training run.

    Args:
        train_dataset (`datasets.Dataset`):
            Rows with `prompt`, `question`, `answer`, `id` and all further columns except `context`, which is in the
            corpus.
        eval_dataset (`datasets.Dataset`):
            Rows of the same columns.
        retriever ([`Retriever`]):
            Searches the passages of both datasets.
    """

    train_dataset: Dataset
    eval_dataset: Dataset
    retriever: Retriever


def hotpotqa_dataset(
    dataset_name: str = MINI_WIKI,
    *,
    eval_dataset_name: str | None = None,
    eval_share: float = 0.1,
    seed: int = 0,
    mini_wiki_seed: int = 0,
    system_prompt: str = SYSTEM_PROMPT,
) -> HotpotQAData:
    """
    Make the training rows, the evaluation rows and the retriever of a data set.

    The evaluation rows are the validation split of the mini wiki or of a hub data set. A local file has one split:
    `eval_share` of its rows, chosen by `seed`, are used for evaluation, unless `eval_dataset_name` names other rows. A
    directory of `trl-steppo hotpotqa prepare` has both, and an index that is opened instead of built. For the full
    data sets that takes seconds instead of minutes, and all ranks of a machine share one copy in memory.

    Args:
        dataset_name (`str`, *optional*, defaults to `"mini_wiki"`):
            `"mini_wiki"`, a local `.json`, `.jsonl` or `.parquet` file, a name on the hub, or a prepared directory.
        eval_dataset_name (`str`, *optional*):
            Another source of the evaluation rows, named like `dataset_name`.
        eval_share (`float`, *optional*, defaults to `0.1`):
            Share of a local file that is used for evaluation, between 0 and 1; at least one row.
        seed (`int`, *optional*, defaults to `0`):
            Decides which rows of a local file are used for evaluation.
        mini_wiki_seed (`int`, *optional*, defaults to `0`):
            Seed of the mini wiki.
        system_prompt (`str`, *optional*):
            First message of every prompt. If it is empty, there is none.

    Returns:
        [`HotpotQAData`]: `(train_dataset, eval_dataset, retriever)`.

    Example:
    ```python
    >>> train_dataset, eval_dataset, retriever = hotpotqa_dataset("mini_wiki")
    >>> train_dataset[0]["prompt"][0]
    {'role': 'system', 'content': 'Search the wiki step by step, then answer.'}
    ```
    """
    if is_prepared(Path(dataset_name)):
        if eval_dataset_name is not None:
            raise ConfigurationError(
                f"{dataset_name} is prepared with evaluation rows and a corpus of its own; leave out the "
                f"`eval_dataset_name` {eval_dataset_name!r}, or prepare both together"
            )
        train, evaluation, retriever = open_prepared(Path(dataset_name))
        return HotpotQAData(_with_prompts(train, system_prompt), _with_prompts(evaluation, system_prompt), retriever)
    train = load_rows(dataset_name, "train", mini_wiki_seed=mini_wiki_seed)
    passages = dict.fromkeys(make_corpus(train.select_columns("context")))
    train = _with_prompts(train, system_prompt)
    if eval_dataset_name is None and is_file(dataset_name):
        train, evaluation = split_rows(train, eval_share, seed, dataset_name)
    else:
        evaluation = load_rows(eval_dataset_name or dataset_name, "validation", mini_wiki_seed=mini_wiki_seed)
        passages |= dict.fromkeys(make_corpus(evaluation.select_columns("context")))
        evaluation = _with_prompts(evaluation, system_prompt)
    if MINI_WIKI in (dataset_name, eval_dataset_name):  # its questions name only some of its passages
        passages |= dict.fromkeys(make_mini_wiki(mini_wiki_seed).passages)
    return HotpotQAData(train, evaluation, BM25Retriever(passages))


def load_rows(
    dataset_name: str | Sequence[str],
    split: str,
    *,
    mini_wiki_seed: int = 0,
    revision: str | None = None,
    aliases_file: str | None = None,
) -> Dataset:
    """
    Load and check rows, in the schema of `hotpotqa/hotpot_qa` (distractor) or in a layout that [`in_common_layout`]
    knows.

    Args:
        dataset_name (`str` or `Sequence[str]`):
            `"mini_wiki"`, a local `.json`, `.jsonl` or `.parquet` file (or several, which are joined), a name on the
            hub, or a file there, `hf://datasets/OWNER/NAME/FILE`.
        split (`str`):
            `"train"` or `"validation"`. A file has one split: all its rows are returned for both.
        mini_wiki_seed (`int`, *optional*, defaults to `0`):
            Seed of the mini wiki.
        revision (`str`, *optional*):
            Revision of a data set on the hub.
        aliases_file (`str`, *optional*):
            2WikiMultiHopQA's `id_aliases.json`, with the other names of its answers.

    Returns:
        `datasets.Dataset`: At least the columns `id`, `question`, `answer` and `context`.
    """
    from datasets import Dataset

    if split not in ("train", "validation"):
        raise ConfigurationError(f"split is {split!r}; HotpotQA has the splits 'train' and 'validation'")
    names = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name)
    if len(names) != 1 and not (names and all(map(is_file, names))):
        raise ConfigurationError(f"rows come from one data set or from one or more local files, not from {names}")
    source = " ".join(names)
    if source == MINI_WIKI:
        wiki = make_mini_wiki(mini_wiki_seed)
        return Dataset.from_list(wiki.train if split == "train" else wiki.validation)
    raw_rows: Iterable[object]
    if is_file(names[0]):
        raw_rows = (row for name in names for row in _read_file(Path(name)))
    else:
        raw_rows = rows = _load_from_hub(source, split, revision)
        source = f"{source} ({split})"
        if "context" in rows.features and isinstance(rows[:1]["context"][0], Mapping):
            check_rows(rows, source)
            return rows  # not copied: it stays on the disk
    aliases = read_aliases(Path(aliases_file)) if aliases_file is not None else None
    records = [in_common_layout(row, f"{source}, row {i}", aliases) for i, row in enumerate(raw_rows)]
    check_rows(records, source)
    try:
        return Dataset.from_list(records)
    except Exception as error:  # pyarrow's errors have no common base class; each means a column of mixed types
        raise DataError(f"{source}: a column holds values of different types: {error}") from error


def make_corpus(rows: Iterable[Row]) -> list[Passage]:
    """
    Collect the distinct paragraphs of the rows' contexts.

    Args:
        rows (`Iterable[Mapping]`):
            Rows with a `context`: titles in `title`, and in `sentences` a list of sentences for each title.

    Returns:
        `list[Passage]`: One for each paragraph, its sentences joined, in the order of their first occurrence.
    """
    passages: dict[Passage, None] = {}
    for row in rows:
        for title, sentences in zip(row["context"]["title"], row["context"]["sentences"], strict=True):
            passages.setdefault(Passage(title, "".join(sentences).strip()))
    return list(passages)


def check_rows(rows: Iterable[object], source: str) -> None:
    """
    Raise a `DataError` for the first row that is invalid.

    Args:
        rows (`Iterable[Mapping]`):
            Rows in the schema of `hotpotqa/hotpot_qa`.
        source (`str`):
            Their name in the message: a file, or a data set.
    """
    first_row_of_id: dict[str, int] = {}
    for i, unchecked in enumerate(rows):
        where = f"{source}, row {i}"
        row = _checked_row(unchecked, where)
        first = first_row_of_id.setdefault(row["id"], i)
        if first != i:
            raise DataError(f"{where}: the id {row['id']!r} is that of row {first} already; ids have to be unique")
    if not first_row_of_id:
        raise DataError(f"{source}: there are no rows")


def _checked_row(row: object, where: str) -> Row:
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: a row has to be an object with named columns, not {row!r:.80}")
    for column in ("id", "question", "answer", "context"):
        if column not in row:
            raise DataError(
                f"{where}: the column {column!r} is missing (there are {', '.join(map(str, row)) or 'none'}); rows "
                f"have to be in the schema of {_HOTPOTQA} on the hub, or in that of the original files of HotpotQA, "
                "2WikiMultiHopQA or MuSiQue"
            )
    for column in ("id", "question", "answer"):
        if not isinstance(row[column], str) or not row[column].strip():
            raise DataError(f"{where}: the column {column!r} has to hold text, not {row[column]!r:.80}")
    if not _is_list_of(row.get("answer_aliases") or [], str):
        raise DataError(f"{where}: `answer_aliases` has to be a list of texts, not {row['answer_aliases']!r:.80}")
    _check_context(row["context"], where)
    return row


def _check_context(context: object, where: str) -> None:
    if not isinstance(context, Mapping) or not {"title", "sentences"} <= context.keys():
        raise DataError(f"{where}: `context` has to hold the lists 'title' and 'sentences', not {context!r:.80}")
    titles, paragraphs = context["title"], context["sentences"]
    if not _is_list_of(titles, str) or not _is_list_of(paragraphs, list) or len(titles) != len(paragraphs):
        raise DataError(
            f"{where}: `context` has to hold a list of titles and, for each, a list of sentences; "
            f"title is {titles!r:.80}, sentences is {paragraphs!r:.80}"
        )
    if not titles:
        raise DataError(f"{where}: `context` is empty; there would be nothing to search")
    for title, sentences in zip(titles, paragraphs, strict=True):
        if not _is_list_of(sentences, str):
            raise DataError(f"{where}: the sentences of {title!r} have to be a list of texts, not {sentences!r:.80}")


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def is_file(dataset_name: str) -> bool:
    """Whether a data set's name is that of a local file, which may be missing."""
    if dataset_name.startswith(_HUB_FILE):
        return False
    return Path(dataset_name).suffix.lower() in _FILE_SUFFIXES or Path(dataset_name).is_file()


def _read_file(path: Path) -> Iterator[object]:
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; for the built-in questions use {MINI_WIKI!r}")
    suffix = path.suffix.lower()
    if suffix not in _FILE_SUFFIXES:
        raise DataError(f"{path}: rows are read from {', '.join(_FILE_SUFFIXES)} files, not from {suffix!r}")
    if suffix == ".parquet":
        return _read_parquet(path)
    return _read_json(path) if suffix == ".json" else _read_json_lines(path)


def _read_json(path: Path) -> Iterator[object]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also a UnicodeDecodeError
        raise DataError(f"{path}: this is not JSON: {error}; a file of one object a line is called .jsonl") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: a .json file has to hold a list of rows, not {rows!r:.80}")
    return iter(rows)


def _read_json_lines(path: Path) -> Iterator[object]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: this is not JSON: {error}") from error


def _read_parquet(path: Path) -> Iterator[object]:
    import pyarrow
    import pyarrow.parquet

    try:
        return iter(pyarrow.parquet.read_table(path).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: this is not a Parquet file: {error}") from error


def _load_from_hub(dataset_name: str, split: str, revision: str | None) -> Dataset:
    from datasets import load_dataset

    config = "distractor" if dataset_name == _HOTPOTQA else None
    try:
        if dataset_name.startswith(_HUB_FILE):
            builder = "parquet" if dataset_name.endswith(".parquet") else "json"
            return load_dataset(builder, data_files=dataset_name, split="train")
        return load_dataset(dataset_name, config, split=split, revision=revision)
    except (OSError, ValueError) as error:  # not found, no connection, no such split
        raise DataError(
            f"{dataset_name}: the split {split!r} could not be loaded from the hub: {error}. Without a connection use "
            f"{MINI_WIKI!r} or a local {', '.join(_FILE_SUFFIXES)} file"
        ) from error


def split_rows(rows: Dataset, eval_share: float, seed: int, source: str) -> tuple[Dataset, Dataset]:
    """Training and evaluation rows of a file. Chosen at random, because files are often sorted; both stay in order."""
    if not 0 < eval_share < 1:
        raise ConfigurationError(f"eval_share is {eval_share}; it has to be between 0 and 1, both excluded")
    if len(rows) < 2:
        raise DataError(f"{source}: one row cannot be split; add rows, or name an `eval_dataset_name`")
    order = list(range(len(rows)))
    Random(seed).shuffle(order)
    num_eval = min(max(1, round(len(rows) * eval_share)), len(rows) - 1)
    return rows.select(sorted(order[:-num_eval])), rows.select(sorted(order[-num_eval:]))


def _with_prompts(rows: Dataset, system_prompt: str) -> Dataset:
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    prompts = [[*system, {"role": "user", "content": question}] for question in rows["question"][:]]
    # Without the context: an environment gets every column of its row, and the corpus has the paragraphs.
    kept = rows.remove_columns("context") if "context" in rows.column_names else rows
    return kept.add_column("prompt", prompts)
