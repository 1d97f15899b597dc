"""Hook: the search finds guides before references, and the changelog last."""

from __future__ import annotations

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

BOOSTS = {"guides": 4.0, "get_started": 2.0, "concepts": 2.0, "project": 0.5}
"""How much more the pages of a folder count; those of others count once."""

PAGE_BOOSTS = {"guides/troubleshooting.md": 8.0, "guides/reading_metrics.md": 6.0, "guides/checkpoints.md": 12.0}
"""Pages that are looked for by what somebody sees in a run."""


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Give a page its weight, or that of its folder, unless its own text sets one."""
    path = page.file.src_uri
    boost = PAGE_BOOSTS.get(path, BOOSTS.get(path.partition("/")[0]))
    if boost is not None:
        page.meta.setdefault("search", {}).setdefault("boost", boost)
    return markdown
