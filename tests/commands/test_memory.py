"""`trl-steppo memory`, as a shell calls it."""

from __future__ import annotations

import pytest

from trl_steppo.cli import main


@pytest.fixture(autouse=True)
def _offline(monkeypatch) -> None:
    """What is not on the machine is not waited for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_memory(capsys):
    assert main(["memory", "Qwen3-1.7B", "--engine", "zero3", "--gpus", "1", "8", "--details"]) == 0
    out = capsys.readouterr().out
    assert "1.72 billion" in out
    assert "generation cache" in out


def test_memory_of_a_missing_model_is_an_error(capsys, tmp_path):
    assert main(["memory", str(tmp_path / "nothing")]) == 1
    assert "nothing" in capsys.readouterr().err
