"""Pages are short, and so are their sentences."""

import ast
import re

import pytest

from tests.docs.pages import PAGES, ROOT, code_blocks, mean_sentence_length, name_of, num_words, sentences

MAX_LINES = 250
MAX_MEAN_WORDS = 20.0


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_is_short(page):
    text = page.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    longest = sorted(sentences(text), key=num_words)[-3:]
    assert mean_sentence_length(text) <= MAX_MEAN_WORDS, f"the longest sentences: {longest}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_code_block_of_a_page_is_closed(page):
    text = page.read_text()
    num_fences = sum(line.lstrip().startswith("```") for line in text.splitlines())
    assert num_fences == 2 * len(code_blocks(text))


def test_prose_is_told_from_the_rest():
    text = """---
title: x
---
# A heading. With a sentence.

One sentence, e.g. this one. Two `code. Code` words! ![A picture. Here.](a.png)

| a table. | of. |
|---|---|

- A [list. Of](links.md) things
- that end without a point

```python
print("Not. This.")
```

::: some.object
    options: {a: 1}
"""
    assert [num_words(sentence) for sentence in sentences(text)] == [5, 3, 2, 2, 5]
    assert mean_sentence_length(text) == 17 / 5
    assert mean_sentence_length("# Only a heading") == 0.0


_ODD = re.compile(
    r"\bis no (?!longer|limit\b)|\bcomes? by\b|\bwithout a word\b|\bwhoever\b|\banew\b|\bfor ever\b", re.IGNORECASE
)
_PLAIN = re.compile(r"\bthere\s+is\s+no |\bis no (?:different|better|more|worse|less)\b", re.IGNORECASE)
_PACKAGE = ROOT / "trl_steppo"


def odd_words(text: str) -> list[str]:
    """Turns of phrase that a reader stumbles over, with what follows them: write "is not a", "again", "endlessly"."""
    flat = _PLAIN.sub("", " ".join(text.split()))
    return [flat[found.start() : found.end() + 30] for found in _ODD.finditer(flat)]


def test_pages_are_plain():
    assert {name_of(page): odd for page in PAGES if (odd := odd_words(page.read_text()))} == {}


def test_messages_and_docstrings_are_plain():
    odd = {
        f"{path.relative_to(_PACKAGE)}:{node.lineno}": words
        for path in _PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and (words := odd_words(node.value))
    }
    assert odd == {}


def test_odd_words_are_told_from_plain_ones():
    assert odd_words("There is no file. It is no longer there, and is no better.") == []
    assert odd_words("This is no\nfile.") == ["is no file."]
