"""The table of contents names pages that are still to be written; they appear when their files are there."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from site_links import INCLUDED

Entry = str | dict[str, "str | list[Entry]"]


def _written(entries: list[Entry], docs: Path) -> list[Entry]:
    kept: list[Entry] = []
    for entry in entries:
        (title, target) = next(iter(entry.items())) if isinstance(entry, dict) else ("", entry)
        if isinstance(target, list):
            if inner := _written(target, docs):
                kept.append({title: inner})
        elif (docs / target).exists() or target in INCLUDED.values():
            kept.append(entry)
    return kept


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.nav = _written(config.nav or [], Path(config.docs_dir))
    return config
