"""The picture of the idea shows what its record holds, and that follows from the record's values and rewards."""

import json
from pathlib import Path

import pytest
import torch
from study.credit_plot import Theme, plot_credit

from trl_steppo.advantages import step_gae, token_gae

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "credit_picture.json"


def padded(rows):
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def test_the_recorded_credit_follows_from_the_recorded_values():
    record = json.loads(RECORD.read_text())
    episode, settings = record["episode"], {"gamma": record["gamma"], "lam": record["lam"]}
    values, mask = padded(episode["values"]), padded([[True] * len(row) for row in episode["values"]])
    rewards = torch.tensor(episode["rewards"])
    by_steps, _ = step_gae(rewards[None], values[:, 0][None], torch.ones(1, 3, dtype=torch.bool), **settings)
    assert by_steps[0].tolist() == pytest.approx(episode["by_steps"])
    at_last = torch.zeros_like(values)
    at_last[torch.arange(3), mask.sum(-1) - 1] = rewards
    by_tokens, _ = token_gae(at_last.flatten()[None], values.flatten()[None], mask.flatten()[None], **settings)
    expected = padded(episode["by_tokens"])
    assert by_tokens.view_as(values)[mask].tolist() == pytest.approx(expected[mask].tolist(), abs=1e-6)


def test_a_picture_is_drawn_for_light_and_for_dark_pages(tmp_path):
    paths = [
        plot_credit(tmp_path, ["search", "answer"], [[0.0, 0.1], [0.2, 0.5]], [0.8, 0.7], theme) for theme in Theme
    ]
    assert [path.name for path in paths] == ["credit_light.png", "credit_dark.png"]
    assert all(path.stat().st_size > 1000 for path in paths)
