"""Extension of griffe: docstrings in Hugging Face's format as markdown, with parameters in tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import griffe

LISTS = {"Args": "Parameters", "Parameters": "Parameters", "Attributes": "Attributes"}
"""Sections that list names with types, and their titles."""

TEXTS = {"Returns": "Returns", "Yields": "Yields", "Raises": "Raises", "Example": "Example"}
"""Sections of plain text, and their titles."""

_SECTION = re.compile(rf"({'|'.join([*LISTS, *TEXTS])}):\s*")
_ENTRY = re.compile(r"(?P<names>[\w*][\w*, ]*)(?: \((?P<type>.*)\))?(?::(?: (?P<text>.*))?)?")
_REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?:\[[\w.]+\])?(?!\()")


def as_markdown(docstring: str, find: Callable[[str], str | None] = lambda name: None) -> str:
    """
    Convert a docstring to markdown.

    Args:
        docstring (`str`):
            The docstring, without the indentation of the code.
        find (`Callable[[str], str | None]`, *optional*):
            The full path of the object that a cross reference names; `None` where it is on no page.

    Returns:
        `str`: The same with a table for each list of parameters, and with cross references as links.
    """
    parts = []
    for title, lines in _sections(docstring.splitlines()):
        if title in LISTS:
            parts.append(f"**{LISTS[title]}**\n\n{_table(list(_entries(_dedented(lines))))}")
        elif title == "Raises":
            parts.append(f"**Raises**\n\n{_bullets(_dedented(lines))}")
        elif title:
            text = "\n".join(lines if title == "Example" else _dedented(lines)).strip("\n")
            parts.append(f"**{TEXTS[title]}**\n\n{text}")
        else:
            parts.append("\n".join(lines))
    return _linked("\n\n".join(part.strip("\n") for part in parts), find)


def entries_of(docstring: str, title: str) -> list[tuple[str, str, str]]:
    """The names, type and text of each entry of a section."""
    return [
        entry
        for section, lines in _sections(docstring.splitlines())
        if section == title
        for entry in _entries(_dedented(lines))
    ]


def _sections(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """The titles of sections with their lines; the text before the first one, and between two, has none."""
    title, held = "", list[str]()
    for line in lines:
        begins = _SECTION.fullmatch(line)
        ends = title not in ("", "Example") and line and not line.startswith(" ")
        if begins or ends:
            yield title, held
            title, held = (begins[1] if begins else ""), ([] if begins else [line])
        else:
            held.append(line)
    yield title, held


def _dedented(lines: list[str]) -> list[str]:
    return [line.removeprefix("    ") for line in lines]


def _entries(lines: list[str]) -> Iterator[tuple[str, str, str]]:
    """The names, type and text of each entry of a list."""
    entry: list[str] = []
    for line in [*lines, "end"]:
        if entry and entry[-1].endswith(",") and len(entry) == 1:  # many names take two lines
            entry = [f"{entry[0]} {line}"]
            continue
        if line and not line.startswith((" ", ">")) and entry:
            yield _entry(entry)
            entry = []
        if line and not line.startswith(">"):
            entry.append(line)


def _entry(lines: list[str]) -> tuple[str, str, str]:
    """One entry, whose first line has its names and type, or for two names with types of their own, both."""
    head = lines[0].removesuffix(":")
    both = re.findall(r"(\*{0,2}\w+)(?: \((.*?)\))?(?:, (?=\*{0,2}\w+ \()|$)", head)
    if len(both) > 1 and all(kind for _, kind in both):
        names, kind, first = ", ".join(name for name, _ in both), "; ".join(dict(both).values()), ""
    elif match := _ENTRY.fullmatch(lines[0]):
        names, kind, first = match["names"], match["type"] or "", match["text"] or ""
    else:
        raise ValueError(f"{lines[0]!r} is not `name (type):`; write the parameter in Hugging Face's format")
    text = " ".join([first, *(line.strip() for line in lines[1:])]).strip()
    return ", ".join(f"`{name.strip()}`" for name in names.split(",")), kind, text


def _table(entries: list[tuple[str, str, str]]) -> str:
    rows = [f"| {' | '.join(cell(text) for text in entry)} |" for entry in entries]
    return "\n".join(["| name | type | meaning |", "|---|---|---|", *rows])


def cell(text: str) -> str:
    """Text of a table's cell: on one line, with bars that end no cell. Bars in code are no ends anyway."""
    parts = re.split(r"(`[^`]*`)", re.sub(r"\s*\n\s*", " ", text))
    return "".join(part if part.startswith("`") else part.replace("|", r"\|") for part in parts)


def _bullets(lines: list[str]) -> str:
    return "\n".join(line if not line or line.startswith(" ") else f"- {line}" for line in lines)


def _linked(markdown: str, find: Callable[[str], str | None]) -> str:
    def link(match: re.Match[str]) -> str:
        name = match[2].rpartition(".")[2] if match[1] else match[2]
        path = find(match[2])
        return f"[`{name}`][{path}]" if path else f"`{name}`"

    return _REFERENCE.sub(link, markdown)


class HuggingFaceDocstrings(griffe.Extension):
    """
    Rewrites the docstrings of a package when all of it is loaded.

    Args:
        pages (`list[str]`):
            Paths of the modules and objects that are on pages of the site; other cross references stay text.
    """

    def __init__(self, pages: list[str]) -> None:
        self.pages = pages

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: object) -> None:
        """Rewrite them, after everything that names can refer to is known."""
        by_name: dict[str, str] = {}
        for path in self.pages:
            place = pkg.modules_collection[path]
            for shown in (place, *(place.members.values() if place.is_module else ())):
                if not shown.is_alias and shown.has_docstring and not shown.is_module:
                    by_name.setdefault(shown.name, shown.path)
        on_pages = set(by_name.values())

        for holder in _all(pkg):
            if holder.docstring is not None:
                scopes = [scope for scope in (holder, holder.parent) if scope is not None and scope.path in on_pages]

                def find(name: str, scopes: list[griffe.Object] = scopes) -> str | None:
                    last = name.rpartition(".")[2]
                    members = (scope.members[last] for scope in scopes if last in scope.members)
                    own = next((member.path for member in members if member.has_docstring), None)
                    return own or by_name.get(last)

                holder.docstring.value = as_markdown(holder.docstring.value, find)


def _all(holder: griffe.Object) -> Iterator[griffe.Object]:
    yield holder
    for member in holder.members.values():
        if isinstance(member, griffe.Object):
            yield from _all(member)
