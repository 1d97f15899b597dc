"""The `trl-steppo` command, as a shell calls it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from trl_steppo.cli import CONFIGS, main
from trl_steppo.dry_run import SCRIPT_SETTINGS


@pytest.fixture(autouse=True)
def _offline(monkeypatch) -> None:
    """What is not on the machine is not waited for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


RECIPES = sorted((Path(__file__).parents[1] / "examples" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_config_names_a_file_that_accelerate_reads(path, capsys):
    assert main(["config", path.stem]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    config = load_config_from_file(str(path))
    assert config.num_processes == (1 if "single" in path.stem else 2 if "cpu2" in path.stem else 8)
    if "fsdp2" in path.stem:
        assert config.fsdp_config["fsdp_version"] == 2
    if "zero" in path.stem:
        assert config.deepspeed_config["zero_stage"] == int(path.stem.removeprefix("zero")[0])


def test_config_lists_what_there_is(capsys):
    assert main(["config"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert listed == {path.stem for path in CONFIGS.glob("*.yaml")}
    assert main(["config", "zero9"]) == 1
    assert "zero3" in capsys.readouterr().err


def test_memory(capsys):
    assert main(["memory", "Qwen3-1.7B", "--engine", "zero3", "--gpus", "1", "8", "--details"]) == 0
    out = capsys.readouterr().out
    assert "1.72 billion" in out
    assert "generation cache" in out


def test_memory_of_a_model_that_is_not_there(capsys, tmp_path):
    assert main(["memory", str(tmp_path / "nothing")]) == 1
    assert "nothing" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_check_passes_on_every_recipe(recipe, capsys):
    assert main(["check", str(recipe), "--dataset-name", "mini_wiki"]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "without contradiction" in out
    assert "one update: env/reward" in out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("learning_rat: 1.0e-6", "`learning_rate` meant"),
        ("max_staleness: 1", "max_staleness"),
        ("kl_loss_estimator: k9", "kl_loss_estimator"),
        ("num_mini_batches: 1000", "num_mini_batches"),
    ],
)
def test_check_names_what_is_wrong(line, said, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: mini_wiki\noutput_dir: runs/x\n{line}\n")
    assert main(["check", str(recipe)]) == 1
    assert said in capsys.readouterr().err


def test_the_script_s_settings_are_known():
    help_text = subprocess.run(
        [sys.executable, str(RECIPES[0].parents[1] / "hotpotqa_steppo.py"), "--help"],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    ).stdout
    assert all(f"--{name}" in help_text for name in SCRIPT_SETTINGS)
