"""Types say what things are: `Any` and `type: ignore` are counted, and their numbers only fall."""

from __future__ import annotations

import pytest

from tests.measures import ROOT, Source, any_per_1000_lines, read

MAX_ANY = 841
MAX_IGNORES = 29

LIBRARY = read(ROOT / "trl_steppo")

CODE = '''
"""A module with `Any` in its text."""
from typing import Any  # Any

Json = dict[str, Any]


def f(a: Any, b: "list[Any]") -> Json:
    """Returns Any."""
    return {"Any": a}  # type: ignore[misc]
'''


def test_any_is_not_used_more_often():
    num_any = sum(source.num_any for source in LIBRARY)
    assert num_any <= MAX_ANY, "name the type, or `object`; see `trl_steppo/types.py`"


def test_no_more_types_are_ignored():
    assert sum(source.num_ignores for source in LIBRARY) <= MAX_IGNORES


def test_measures_of_a_file_by_hand():
    source = Source("package", CODE)
    assert source.num_any == 3
    assert source.num_ignores == 1
    assert source.num_code_lines == 4
    assert source.docstring_lines == {2, 9}
    assert source.num_annotated == len(source.functions) == 1
    assert source.parameter_lists == [(2, "f")]
    assert any_per_1000_lines([source]) == pytest.approx(750)
