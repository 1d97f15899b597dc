"""Hook: what pages link to outside of `docs/`: pictures are copied, sources shown as pages, root files included."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

INCLUDED = {"CONTRIBUTING.md": "project/contributing.md", "CHANGELOG.md": "project/changelog.md"}
"""Files of the repository's root that are pages of the site."""

ELSEWHERE = {"README.md": "index.md", **INCLUDED}
"""Pages that stand for files of the root."""

PICTURES = (".png", ".svg", ".jpg", ".gif")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".toml": "toml", ".sh": "bash"}

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#]+)(#[^()\s]*)?\)")


def root_of(config: MkDocsConfig) -> Path:
    """The repository's root."""
    return Path(config.docs_dir).parent


def resolve(source: str, target: str) -> str:
    """
    Where a link leads.

    Args:
        source (`str`):
            The file that has the link, as a path in the repository: `docs/guides/report.md`.
        target (`str`):
            The link as it is written, without its anchor: `../../examples/ppo_dropin.py`.

    Returns:
        `str`: The path in the repository: `examples/ppo_dropin.py`.
    """
    return os.path.normpath(PurePosixPath(source).parent / target)


def links_out(source: str, markdown: str, root: Path) -> Iterator[str]:
    """The files of the repository outside of `docs/` that a page links to, as paths in the repository."""
    for _, _, target, _ in _LINK.findall(markdown):
        if "://" not in target and not target.startswith("mailto:"):
            path = resolve(source, target)
            if not path.startswith(("docs/", "..")) and path not in ELSEWHERE and (root / path).is_file():
                yield path


def page_of(path: str) -> str:
    """The file of the site that shows a file of the repository."""
    if path in ELSEWHERE:
        return ELSEWHERE[path]
    return f"files/{path}" if path.endswith(PICTURES) else f"files/{path}.md"


def shown(path: str, text: str) -> str:
    """A source, or a notebook with its texts, code and printed output, as a page."""
    head = f"---\nsearch:\n  exclude: true\n---\n# `{path}`\n\n"
    if path.endswith(".ipynb"):
        return head + "\n\n".join(_cells(text))
    return head + _fenced(text, LANGUAGES.get(PurePosixPath(path).suffix, "text"))


def _cells(text: str) -> Iterator[str]:
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        yield source if cell["cell_type"] == "markdown" else _fenced(source, "python")
        for output in cell.get("outputs", ()):
            if printed := "".join(output.get("text") or output.get("data", {}).get("text/plain") or ()):
                yield _fenced(printed, "text")


def _fenced(text: str, language: str) -> str:
    return f"~~~~~~ {language}\n{text.rstrip()}\n~~~~~~\n"


def rewritten(source: str, place: str, markdown: str, root: Path) -> str:
    """
    The page with links that lead out of `docs/` pointing to what the site has instead; without those to folders.

    Args:
        source (`str`):
            The page's file, as a path in the repository.
        place (`str`):
            The page's file, as a path in `docs/`. Another one for files that are included.
        markdown (`str`):
            The page.
        root (`Path`):
            The repository's root.
    """

    def rewrite(link: re.Match[str]) -> str:
        picture, text, target, anchor = link[1], link[2], link[3], link[4] or ""
        path = resolve(source, target)
        if "://" in target or target.startswith("mailto:"):
            return link[0]
        if path.startswith("docs/"):
            to = path.removeprefix("docs/")
        elif (root / path).is_dir():
            return text
        elif (root / path).is_file() and not path.startswith(".."):
            to = page_of(path)
        else:
            return link[0]  # which the strict build reports
        return f"{picture}[{text}]({os.path.relpath(to, PurePosixPath(place).parent)}{anchor})"

    return _LINK.sub(rewrite, markdown)


def source_of(file: File) -> str:
    """The page's file, as a path in the repository."""
    return next((root for root, place in INCLUDED.items() if place == file.src_uri), f"docs/{file.src_uri}")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add included pages, and what pages link to."""
    root = root_of(config)
    for name, place in INCLUDED.items():
        files.append(File.generated(config, place, content=(root / name).read_text()))
    out = {
        path for file in files.documentation_pages() for path in links_out(source_of(file), file.content_string, root)
    }
    for path in sorted(out):
        if path.endswith(PICTURES):
            files.append(File.generated(config, page_of(path), abs_src_path=str(root / path)))
        else:
            files.append(File.generated(config, page_of(path), content=shown(path, (root / path).read_text())))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page."""
    if page.file.src_uri.startswith("files/"):
        return markdown
    return rewritten(source_of(page.file), page.file.src_uri, markdown, root_of(config))
