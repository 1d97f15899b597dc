"""
Trains with vLLM servers on as many ranks as it is launched on: `vllm_on_ranks.py SETTINGS.json OUTPUT_DIR`, with the
settings of `make_trainer`. What each rank's probe found is in `probe-RANK.json`.
"""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from tests.inference.gloo_group import GlooGroup
from tests.trainer.tiny import make_classifier, make_trainer, message_rows
from tests.warm import free_port
from trl_steppo.commands.config import CONFIGS
from trl_steppo.inference.base import Sample, SamplingParams
from trl_steppo.trainer import engines

PROMPT = list(range(3, 73))


class Probe(TrainerCallback):
    """Before each update, and after the last: what a server says of a prompt, beside what the policy does."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.versions: list[int] = []
        self.token_ids: list[list[int]] = []
        self.logprobs: list[list[float]] = []
        self.distances: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        params = SamplingParams(max_new_tokens=8, temperature=args.temperature, seed=state.global_step)
        self.note(asyncio.run(self.trainer.sampler.sample(PROMPT, params, episode_id="probe")), args.temperature)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.on_step_begin(*args, **kwargs)

    def note(self, sample: Sample, temperature: float) -> None:
        logprobs = logprobs_of(self.trainer.model, sample, temperature)
        self.versions.append(sample.policy_version)
        self.token_ids.append(sample.token_ids.tolist())
        self.logprobs.append(logprobs.tolist())
        self.distances.append(distance_of(logprobs, sample))


def logprobs_of(model: PreTrainedModel, sample: Sample, temperature: float) -> torch.Tensor:
    """Of the sampled tokens after the prompt, under this model."""
    ids = sample.token_ids.tolist()
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + ids])).logits[0, len(PROMPT) - 1 : -1]
    return (logits / temperature).log_softmax(-1)[range(len(ids)), ids]


def distance_of(logprobs: torch.Tensor, sample: Sample) -> float:
    """The largest, in nats."""
    return float((logprobs - torch.tensor(sample.logprobs)).abs().max())


def train(directory: Path, settings: dict[str, Any]) -> Any:
    trainer = make_trainer(
        directory,
        value_model=make_classifier(),
        train_dataset=message_rows(64),
        dump_episodes_dir=str(directory / "episodes"),
        **settings,
    )
    for callback in settings.get("callbacks", ()):
        callback.trainer = trainer
    trainer.train()
    trainer.save_model()
    return trainer


def launch(directory: Path, engine: str, settings: dict[str, Any], *, timeout_s: float) -> Path:
    """Run this on two ranks; what they leave is in the directory that this returns."""
    given, output = directory / "settings.json", directory / "two"
    given.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", free_port()]
    command += ["--config_file", str(CONFIGS / f"{engine}.yaml"), __file__, str(given), str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, timeout=timeout_s, env=environment, check=True)
    return output


def main() -> None:
    torch.set_num_threads(1)
    engines.nccl_join = lambda device: GlooGroup  # there is no NCCL here
    settings, directory = {**json.loads(Path(sys.argv[1]).read_text()), "ddp_backend": "gloo"}, Path(sys.argv[2])
    probe = Probe()
    if "model" in settings:
        settings |= {"model": AutoModelForCausalLM.from_pretrained(settings["model"]), "callbacks": [probe]}
    trainer = train(directory, settings)
    found = {name: value for name, value in vars(probe).items() if name != "trainer"}
    (directory / f"probe-{trainer.accelerator.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
