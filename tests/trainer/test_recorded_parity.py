"""One-step episodes under a plain `PPOConfig`: the weights that TRL's `PPOTrainer` arrived at, with any TRL."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.trainer.parity import Replay, assert_same, make_config, make_rows, make_small_networks, train_ours
from tests.trainer.record_ppo_trainer import CASES, DIRECTORY


@pytest.mark.parametrize("case", CASES)
def test_weights_equal_those_recorded_of_ppo_trainer(tmp_path, monkeypatch, case):
    lengths, settings = CASES[case]
    networks, replay = make_small_networks(), Replay(**json.loads((DIRECTORY / "ppo_trainer.json").read_text())[case])
    ours = train_ours(make_config(tmp_path, **settings), networks, make_rows(lengths=lengths), replay, monkeypatch)
    with np.load(DIRECTORY / "ppo_trainer.npz") as arrays:
        theirs = [
            {parameter: torch.from_numpy(arrays[f"{case}/{name}/{parameter}"]) for parameter in weights}
            for name, weights in zip(("model", "value_model"), ours, strict=True)
        ]
    assert_same(ours, theirs, networks)
