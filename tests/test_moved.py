"""Names that moved are found at their old place for one release."""

import pytest

import trl_steppo.assets
import trl_steppo.models
from trl_steppo.moved import moved_names


@pytest.mark.parametrize("name", ["MINI_WIKI_POLICY", "MINI_WIKI_THINKING_POLICY", "ROOMS_POLICY", "locate_model"])
def test_the_policies_are_found_where_they_were(name):
    with pytest.warns(DeprecationWarning, match=f"from trl_steppo.assets import {name}"):
        value = getattr(trl_steppo.models, name)
    assert value is getattr(trl_steppo.assets, name)


def test_other_names_are_not():
    with pytest.raises(AttributeError, match=r"module 'a\.b' has no attribute 'c'"):
        moved_names("a.b", {"d": "trl_steppo.types"})("c")
