"""Converts rows of the original files of HotpotQA, 2WikiMultiHopQA and MuSiQue to one common schema."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ...errors import DataError
from ...types import JsonObject, Row

Aliases: TypeAlias = Mapping[str, Sequence[str]]
"""Other names of an answer, by its id."""


def in_common_layout(row: object, where: str, aliases: Aliases | None = None) -> object:
    """
    Convert a row of a known layout to the schema of `hotpotqa/hotpot_qa` on the hub.

    - Files of HotpotQA and 2WikiMultiHopQA have a `context` of pairs of a title and its sentences, or JSON of these.
      Their `_id` becomes `id`.
    - Files of MuSiQue have `paragraphs`. Each becomes a paragraph of one sentence, and `type` becomes the first part
      of the id: `2hop`, `3hop1` and so on.

    Other names of the answer, which are right as well, are kept in `answer_aliases`: those of a MuSiQue row, and those
    in `aliases` for the `answer_id` of a 2WikiMultiHopQA row.

    Args:
        row (`object`):
            A row. If it has the common schema, or no known layout, it is returned unchanged.
        where (`str`):
            The row's name in errors.
        aliases (`Mapping[str, Sequence[str]]`, *optional*):
            Other names of each `answer_id`, from [`read_aliases`].

    Returns:
        `object`: The row.

    Raises:
        DataError: If the row has a known layout and violates it.
    """
    if not isinstance(row, Mapping):
        return row
    if "paragraphs" in row:
        return _from_musique(row, where)
    if isinstance(row.get("context"), str | list):
        return _from_original(row, where, aliases)
    return row


def read_aliases(path: Path) -> dict[str, list[str]]:
    """
    Read the other names of 2WikiMultiHopQA's answers from its `id_aliases.json`: aliases and demonyms, as in its
    official evaluation (version 1.1).

    Args:
        path (`Path`):
            A file with one JSON object per line, with `Q_id`, `aliases` and `demonyms`.

    Returns:
        `dict[str, list[str]]`: Names by the id of the answer.
    """
    names: dict[str, list[str]] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                names[entry["Q_id"]] = [*entry["aliases"], *entry["demonyms"]]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}, line {number}: a line has to be an object with Q_id, aliases and demonyms: {error!r}"
                ) from error
    return names


def _from_original(row: Row, where: str, aliases: Aliases | None) -> JsonObject:
    titles, paragraphs = _pairs(row["context"], "context", where)
    common = {
        "id": row.get("_id", row.get("id")),
        **{column: row[column] for column in ("question", "answer", "type", "level") if column in row},
        "context": {"title": titles, "sentences": paragraphs},
    }
    if "supporting_facts" in row:
        titles, sent_ids = _pairs(row["supporting_facts"], "supporting_facts", where)
        common["supporting_facts"] = {"title": titles, "sent_id": sent_ids}
    if aliases is not None:
        names = aliases.get(row.get("answer_id") or "", [])
        common["answer_aliases"] = _without(row.get("answer"), names)
    return common


def _from_musique(row: Row, where: str) -> JsonObject:
    if row.get("answerable") is False:
        raise DataError(f"{where}: the question is not answerable; take the files of MuSiQue-Ans, not MuSiQue-Full")
    paragraphs = row["paragraphs"]
    if not isinstance(paragraphs, list) or not all(
        isinstance(paragraph, Mapping) and {"title", "paragraph_text"} <= paragraph.keys() for paragraph in paragraphs
    ):
        raise DataError(
            f"{where}: `paragraphs` has to be a list of objects with 'title' and 'paragraph_text', "
            f"not {paragraphs!r:.80}"
        )
    supporting = [paragraph["title"] for paragraph in paragraphs if paragraph.get("is_supporting")]
    return {
        **{column: row[column] for column in ("id", "question", "answer") if column in row},
        "type": str(row.get("id", "")).split("__")[0],
        "supporting_facts": {"title": supporting, "sent_id": [0] * len(supporting)},
        "answer_aliases": _without(row.get("answer"), row.get("answer_aliases") or []),
        "context": {
            "title": [paragraph["title"] for paragraph in paragraphs],
            "sentences": [[paragraph["paragraph_text"]] for paragraph in paragraphs],
        },
    }


def _pairs(value: object, column: str, where: str) -> tuple[list[object], list[object]]:
    """The first and the second elements of a list of pairs, which may be JSON."""
    try:
        pairs: Any = json.loads(value) if isinstance(value, str) else value
        firsts, seconds = [], []
        for pair in pairs:
            first, second = pair.values() if isinstance(pair, Mapping) else pair
            firsts.append(first)
            seconds.append(second)
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: `{column}` has to be a list of pairs, not {value!r:.80}") from error
    return firsts, seconds


def _without(answer: object, names: Sequence[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if name != answer]
