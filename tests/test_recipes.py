"""Recipes, found by their names."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from trl_steppo.cli import main
from trl_steppo.errors import ConfigurationError
from trl_steppo.recipes import RECIPES, find_recipe, read_header, recipe_names


def test_a_recipe_is_found_by_its_name_and_a_file_by_its_path(tmp_path, monkeypatch):
    assert find_recipe("hotpotqa_qwen2.5_0.5b") == RECIPES / "hotpotqa_qwen2.5_0.5b.yaml"
    mine = tmp_path / "mini_wiki"
    mine.write_text("seed: 1\n")
    assert find_recipe(mine) == mine
    monkeypatch.chdir(tmp_path)
    assert find_recipe("mini_wiki").resolve() == mine  # a file of one's own comes first


@pytest.mark.parametrize(
    ("name", "meant"),
    [("mini_wik", "mini_wiki"), ("token-ppo", "token_ppo"), ("configs/room.yaml", "rooms"), ("zzz", None)],
)
def test_an_unknown_name_is_told_with_those_that_there_are(name, meant):
    with pytest.raises(ConfigurationError) as raised:
        find_recipe(name)
    said = str(raised.value)
    assert repr(name) in said
    assert ("did you mean" in said) == (meant is not None)
    assert meant is None or f"did you mean `{meant}`?" in said
    assert all(recipe in said for recipe in recipe_names())


def test_the_path_of_earlier_versions_is_found_and_warned_of_once(caplog):
    with caplog.at_level(logging.WARNING):
        found = [find_recipe("here/examples/configs/rooms.yaml") for _ in range(2)]
    assert found == [RECIPES / "rooms.yaml"] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "here/examples/configs/rooms.yaml has moved into the package: write `rooms`. "
        "The next release will not find the path."
    ]


def test_every_recipe_says_what_it_is_and_the_command_lists_them(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == recipe_names()
    for name, line in zip(recipe_names(), lines[1:], strict=True):
        header = read_header(name)
        assert header.gpus == "none" or int(header.gpus) > 0
        assert not header.summary.endswith(".")
        assert all(part in line for part in (header.model, header.gpus, header.summary))
    assert main(["recipes", "rooms"]) == 0
    assert capsys.readouterr().out == (RECIPES / "rooms.yaml").read_text()


def test_the_page_lists_them_as_they_are():
    page = (Path(__file__).parents[1] / "docs" / "guides" / "recipes.md").read_text()
    for name in recipe_names():
        header = read_header(name)
        assert f"| `{name}` | {header.model} | {header.gpus} | {header.summary} |\n" in page
    assert page.count("\n| `") == len(recipe_names())
