"""Hook: the search finds guides before references, and the changelog last."""

from __future__ import annotations

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

BOOSTS = {"guides": 4.0, "get_started": 2.0, "concepts": 2.0, "project": 0.5}
"""How much more the pages of a folder count; those of others count once."""


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Give a page the weight of its folder, unless it has one of its own."""
    boost = BOOSTS.get(page.file.src_uri.partition("/")[0])
    if boost is not None:
        page.meta.setdefault("search", {}).setdefault("boost", boost)
    return markdown
