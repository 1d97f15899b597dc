"""Pages as their readers see them: code blocks, commands, and prose."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def name_of(page: Path) -> str:
    """A page as tests call it: `README.md`, `guides/report.md`."""
    return page.name if page.parent == ROOT else page.relative_to(DOCS).as_posix()


def code_blocks(text: str) -> list[tuple[str, str]]:
    """The code blocks of a page with their languages, in order; those within lists without their indentation."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```", text, flags=re.MULTILINE | re.DOTALL)
    return [(language, re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)) for indent, language, code in found]


def snippets(page: Path) -> list[str]:
    """The Python code of a page, block by block."""
    return [code for language, code in code_blocks(page.read_text()) if language == "python"]


@dataclass(frozen=True)
class Command:
    """One command of a shell block: the variables before it, and its words without redirections."""

    page: str
    line: str
    words: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()

    @property
    def arguments(self) -> tuple[str, ...]:
        """The script or subcommand with its arguments, without the program that starts it."""
        if self.words[:2] == ("accelerate", "launch"):
            return self.words[next(i for i, word in enumerate(self.words) if word.endswith(".py")) :]
        return self.words[1:]

    def __str__(self) -> str:
        return f"{self.page}: {self.line}"


def commands(page: Path) -> list[Command]:
    """The commands of a page's shell blocks, in order."""
    blocks = code_blocks(page.read_text())
    return [found for language, code in blocks if language == "bash" for found in commands_of(name_of(page), code)]


def commands_of(page: str, block: str) -> list[Command]:
    """The commands of one shell block; `a && b` are two."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        words = _words(line)
        while words:
            end = next((i for i, word in enumerate(words) if word in ("&&", ";", "&", "|")), len(words))
            if part := words[:end]:
                found.append(_command(page, " ".join(line.split()), part))
            words = words[end + 1 :]
    return found


def _words(line: str) -> list[str]:
    """The words of a line, without its comment; `"$(a b)"` is one."""
    lexer = shlex.shlex(re.sub(r'(?<!")\$\([^)]*\)', r'"\g<0>"', line), posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    return list(lexer)


def _command(page: str, line: str, words: list[str]) -> Command:
    variables = []
    while words and (match := re.fullmatch(r"(\w+)=(.*)", words[0], flags=re.DOTALL)):
        variables.append((match[1], match[2]))
        words = words[1:]
    if ">" in words:
        words = words[: words.index(">")]
    return Command(page, line, tuple(words), tuple(variables))


def sentences(text: str) -> list[str]:
    """The sentences of a page's prose: paragraphs and lists, without code blocks, tables, headings and markup."""
    text = re.sub(r"\A---\n.*?^---\n", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^( *)(`{3,}|~{3,}).*?^\1\2", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->|<[^<>]+>", "", text, flags=re.DOTALL)
    text = re.sub(r"^::: .*\n(?: {4}.*\n)*", "", text, flags=re.MULTILINE)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    found = []
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text):
        prose = [line for line in paragraph.splitlines() if not re.match(r"\s*(\||#|!!!|\?\?\?)", line)]
        flat = re.sub(r"^(?:[-*]|\d+\.) ", "", " ".join(" ".join(prose).split()))
        flat = re.sub(r"\b(e\.g|i\.e|vs|cf|etc)\.", r"\1", flat)
        found += [sentence for sentence in re.split(r"(?<=[.!?])[*_)\"]*\s+", flat) if re.search(r"\w", sentence)]
    return found


def num_words(sentence: str) -> int:
    """The words of a sentence; signs alone are none."""
    return sum(1 for word in sentence.split() if re.search(r"\w", word))


def mean_sentence_length(text: str) -> float:
    """The mean number of words of a sentence; 0 for a page without prose."""
    lengths = [num_words(sentence) for sentence in sentences(text)]
    return sum(lengths) / len(lengths) if lengths else 0.0
