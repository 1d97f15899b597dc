"""
Writes down what the `PPOTrainer` of TRL (until 1.12) does, for `test_recorded_parity.py`:

    python tests/trainer/record_ppo_trainer.py

`recorded/ppo_trainer.json` has what it sampled and the permutations it drew, `recorded/ppo_trainer.npz` the weights of
policy and critic after three updates.
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.parity import Recording, make_config, make_rows, make_small_networks, train_theirs

DIRECTORY = Path(__file__).parent / "recorded"
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {  # lengths of the queries, settings
    "mini_batches": ((6,), {"num_mini_batches": 2, "kl_estimator": "k1", "whiten_rewards": True}),
    "accumulation": ((3, 9, 1, 5), {"gradient_accumulation_steps": 2, "kl_estimator": "k3"}),
}


def main() -> None:
    drawn: dict[str, Any] = {"versions": {name: version(name) for name in ("trl", "transformers", "torch", "numpy")}}
    arrays = {}
    for case, (lengths, settings) in CASES.items():
        with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as monkeypatch:
            recording = Recording(monkeypatch)
            networks = make_small_networks()
            trained = train_theirs(make_config(Path(directory), **settings), networks, make_rows(lengths=lengths))
        drawn[case] = vars(recording)
        for name, weights in zip(("model", "value_model"), trained, strict=True):
            arrays |= {f"{case}/{name}/{parameter}": value.numpy() for parameter, value in weights.items()}
    DIRECTORY.mkdir(exist_ok=True)
    (DIRECTORY / "ppo_trainer.json").write_text(json.dumps(drawn) + "\n")
    np.savez_compressed(DIRECTORY / "ppo_trainer.npz", **arrays)


if __name__ == "__main__":
    main()
