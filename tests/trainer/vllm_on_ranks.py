"""
Trains with vLLM servers on as many ranks as it is launched on: `vllm_on_ranks.py SETTINGS.json OUTPUT_DIR`, with the
settings of `make_trainer`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tiny import make_classifier, make_trainer, message_rows


def train(directory: Path, settings: dict[str, Any]) -> Any:
    trainer = make_trainer(
        directory,
        value_model=make_classifier(),
        train_dataset=message_rows(64),
        dump_episodes_dir=str(directory / "episodes"),
        **settings,
    )
    trainer.train()
    trainer.save_model()
    return trainer


def main() -> None:
    torch.set_num_threads(1)
    train(Path(sys.argv[2]), {**json.loads(Path(sys.argv[1]).read_text()), "ddp_backend": "gloo"})


if __name__ == "__main__":
    main()
