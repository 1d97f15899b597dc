"""
Measures the code of a checkout: sizes, annotations, documentation.

    python tests/measures.py
    python tests/measures.py --package ../another_checkout

Code lines are those that hold code: without blank lines, comments and docstrings. `Any` is counted wherever it is
used, and not where it is imported.
"""

from __future__ import annotations

import argparse
import ast
import io
import token
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]
NO_CODE = (tokenize.COMMENT, tokenize.NL, token.NEWLINE, token.INDENT, token.DEDENT, token.ENDMARKER)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
WITH_DOCSTRING = (ast.Module, ast.ClassDef, *FUNCTIONS)


@dataclass(frozen=True)
class Class:
    """The size of a class."""

    name: str
    num_lines: int
    num_methods: int
    num_attributes: int  # set on `self`


@dataclass(frozen=True)
class Source:
    """A Python file."""

    package: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def tokens(self) -> list[tokenize.TokenInfo]:
        return list(tokenize.generate_tokens(io.StringIO(self.text).readline))

    @property
    def num_lines(self) -> int:
        return len(self.text.splitlines())

    @cached_property
    def docstring_lines(self) -> set[int]:
        lines = set[int]()
        for node in ast.walk(self.tree):
            if isinstance(node, WITH_DOCSTRING) and ast.get_docstring(node, clean=False) is not None:
                lines |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
        return lines

    @cached_property
    def num_code_lines(self) -> int:
        """Lines of statements; a text over several lines counts with all of them."""
        lines = set[int]()
        for part in self.tokens:
            if part.type not in NO_CODE:
                lines |= set(range(part.start[0], part.end[0] + 1))
        return len(lines - self.docstring_lines)

    @property
    def num_comments(self) -> int:
        """Lines with a comment, at their end too."""
        return sum(part.type == tokenize.COMMENT for part in self.tokens)

    @property
    def num_ignores(self) -> int:
        return sum(part.type == tokenize.COMMENT and "type: ignore" in part.string for part in self.tokens)

    @property
    def num_any(self) -> int:
        """Uses of `Any`, those in annotations that are written as text among them."""
        count = 0
        for node in ast.walk(self.tree):
            count += isinstance(node, ast.Name) and node.id == "Any"
            count += isinstance(node, ast.Attribute) and ast.unparse(node) == "typing.Any"
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and "Any" in text and any(node is part for part in self._annotations):
                count += sum(isinstance(n, ast.Name) and n.id == "Any" for n in ast.walk(ast.parse(text)))
        return count

    @cached_property
    def _annotations(self) -> list[ast.AST]:
        """All parts of all annotations."""
        roots: list[ast.expr | None] = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.AnnAssign | ast.arg):
                roots.append(node.annotation)
            elif isinstance(node, FUNCTIONS):
                roots.append(node.returns)
        return [part for root in roots if root is not None for part in ast.walk(root)]

    @cached_property
    def functions(self) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
        return [node for node in ast.walk(self.tree) if isinstance(node, FUNCTIONS)]

    @property
    def function_lines(self) -> list[int]:
        return [(node.end_lineno or 0) - node.lineno + 1 for node in self.functions]

    @property
    def num_annotated(self) -> int:
        """Functions whose result and parameters all have a type."""
        return sum(
            node.returns is not None and all(arg.annotation is not None for arg in parameters(node))
            for node in self.functions
        )

    @property
    def parameter_lists(self) -> list[tuple[int, str]]:
        """How long each is, and of what."""
        return [
            (len(parameters(child)), child.name if child.name != "__init__" else owner)
            for owner, child in owned(self.tree)
        ]

    @property
    def classes(self) -> list[Class]:
        return [measured(node) for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef)]


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    """All of them but `self` and `cls`."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    starred = [arg for arg in (given.vararg, given.kwarg) if arg is not None]
    return [arg for arg in (*named, *starred) if arg.arg not in ("self", "cls")]


def owned(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """All functions, each with the name of the class that it is in."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, FUNCTIONS):
            yield owner, child
        yield from owned(child, child.name if isinstance(child, ast.ClassDef) else owner)


def measured(node: ast.ClassDef) -> Class:
    stored = (n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
    attributes = {n.attr for n in stored if isinstance(n.value, ast.Name) and n.value.id == "self"}
    num_methods = sum(isinstance(child, FUNCTIONS) for child in node.body)
    return Class(node.name, (node.end_lineno or 0) - node.lineno + 1, num_methods, len(attributes))


def read(directory: Path) -> list[Source]:
    """All Python files of a package. Files that are in no folder are one package of their own."""
    sources = []
    for path in sorted(directory.rglob("*.py")):
        parts = path.relative_to(directory).parts
        sources.append(Source(parts[0] if len(parts) > 1 else ".", path.read_text()))
    return sources


def per_package(sources: Sequence[Source], measure: Callable[[Source], int]) -> dict[str, int]:
    """The sum over the files of each package."""
    return {
        package: sum(measure(source) for source in sources if source.package == package)
        for package in sorted({source.package for source in sources})
    }


def any_per_1000_lines(sources: Sequence[Source]) -> float:
    """Uses of `Any` for each 1,000 lines of code."""
    num_code_lines = sum(source.num_code_lines for source in sources)
    return 1000 * sum(source.num_any for source in sources) / max(1, num_code_lines)


# -- the tables -------------------------------------------------------------------------------------------------------

COLUMNS = ("files", "lines", "code", "file med/p90/max", "function med/p90/max", "annotated", "doc/code", "comm./code")
COLUMNS += ("Any", "per 1000", "ignores")


def spread(values: Sequence[int]) -> str:
    ordered = sorted(values) or [0]
    return "/".join(str(ordered[min(len(ordered) - 1, int(share * len(ordered)))]) for share in (0.5, 0.9, 1.0))


def row(sources: Sequence[Source]) -> list[str]:
    """The cells of one package, or of several together."""
    code = max(1, sum(source.num_code_lines for source in sources))
    functions = [lines for source in sources for lines in source.function_lines]
    return [
        str(len(sources)),
        f"{sum(source.num_lines for source in sources):,}",
        f"{code:,}",
        spread([source.num_lines for source in sources]),
        spread(functions),
        f"{sum(source.num_annotated for source in sources) / max(1, len(functions)):.0%}",
        f"{sum(len(source.docstring_lines) for source in sources) / code:.0%}",
        f"{sum(source.num_comments for source in sources) / code:.1%}",
        str(sum(source.num_any for source in sources)),
        f"{any_per_1000_lines(sources):.1f}",
        str(sum(source.num_ignores for source in sources)),
    ]


def show(rows: dict[str, list[str]]) -> None:
    """Print a table."""
    table = [["", *COLUMNS], *([name, *cells] for name, cells in rows.items())]
    widths = [max(len(cells[index]) for cells in table) for index in range(len(table[0]))]
    for cells in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, default=ROOT, help="the checkout to measure")
    checkout = parser.parse_args().package
    library = read(checkout / "trl_steppo")
    packages = sorted({source.package for source in library}, key=lambda name: (name == ".", name))
    rows = {"trl_steppo": row(library)}
    rows |= {f"  {name}": row([source for source in library if source.package == name]) for name in packages}
    rows |= {name: row(read(checkout / name)) for name in ("benchmarks", "examples", "tests")}
    show(rows)
    print("\nLargest classes (lines, methods, attributes):")
    classes = (found for source in library for found in source.classes)
    for found in sorted(classes, key=lambda one: -one.num_lines)[:12]:
        print(f"  {found.name} {found.num_lines}/{found.num_methods}/{found.num_attributes}")
    print("\nLongest parameter lists:")
    for length, name in sorted((found for source in library for found in source.parameter_lists), reverse=True)[:10]:
        print(f"  {name} {length}")


if __name__ == "__main__":
    main()
