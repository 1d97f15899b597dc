"""Pages are short, and so are their sentences."""

import pytest

from tests.docs.pages import PAGES, code_blocks, mean_sentence_length, name_of, num_words, sentences

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
