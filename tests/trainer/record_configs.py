"""
Writes down configurations as checkpoints keep them (`training_args.bin`), under the TRL that is installed, for
`test_ppo_contract.py`:

    python tests/trainer/record_configs.py
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch

from trl_steppo import PPOConfig, StepPOConfig

DIRECTORY = Path(__file__).parent / "recorded"


def main() -> None:
    ppo = PPOConfig(output_dir="runs/ppo", use_cpu=True, seed=7, kl_coef=0.2, stop_token="eos", report_to="none")
    steppo = StepPOConfig(
        output_dir="runs/steppo", use_cpu=True, seed=8, advantage_estimator="grpo", num_generations=4, report_to="none"
    )
    torch.save({"ppo": ppo, "steppo": steppo}, DIRECTORY / f"configs_trl_{version('trl')}.bin")


if __name__ == "__main__":
    main()
