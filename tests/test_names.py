"""Names that are imported when they are used, and names that have moved."""

from __future__ import annotations

import sys
import warnings
from types import ModuleType

import pytest

from trl_steppo.names import lazy_names, moved_names


@pytest.fixture
def module(monkeypatch) -> ModuleType:
    module = ModuleType("old_place")
    monkeypatch.setitem(sys.modules, "old_place", module)
    return module


def test_a_name_is_looked_up_where_it_is(module):
    module.__getattr__ = lazy_names("trl_steppo", {"DataError": ".errors"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from old_place import DataError
    assert DataError.__module__ == "trl_steppo.errors"


def test_a_name_that_has_moved_is_still_there_for_now(module):
    module.__getattr__ = moved_names("old_place", {"DataError": "trl_steppo.errors"})
    with pytest.warns(DeprecationWarning, match=r"`old_place.DataError` is now `trl_steppo.errors.DataError`") as told:
        from old_place import DataError
    assert DataError.__module__ == "trl_steppo.errors"
    assert {warning.filename for warning in told} == {__file__}


@pytest.mark.parametrize("make", [lazy_names, moved_names])
def test_any_other_name_is_missing(module, make):
    module.__getattr__ = make("old_place", {"DataError": "trl_steppo.errors"})
    with pytest.raises(AttributeError, match="module 'old_place' has no attribute 'Error'"):
        _ = module.Error
    assert not hasattr(module, "Error")
