"""The built-in policies, by their names and at their former place."""

from pathlib import Path

import pytest

import trl_steppo.assets
import trl_steppo.models
from trl_steppo.assets import POLICIES, locate_model


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_whole(name):
    assert locate_model(name) == POLICIES[name]
    files = {path.name for path in Path(POLICIES[name]).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= files


def test_other_names_are_left_alone():
    assert locate_model("runs/mini_wiki") == "runs/mini_wiki"


@pytest.mark.parametrize("name", ["MINI_WIKI_POLICY", "MINI_WIKI_THINKING_POLICY", "ROOMS_POLICY", "locate_model"])
def test_the_names_are_found_where_they_were(name):
    with pytest.warns(DeprecationWarning, match=rf"`trl_steppo\.assets\.{name}`"):
        value = getattr(trl_steppo.models, name)
    assert value is getattr(trl_steppo.assets, name)
