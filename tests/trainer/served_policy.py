"""A small vLLM server's policy, and the server as a process of its own."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.inference.fake_vllm import FakeVLLM
from tests.trainer.tiny import make_model
from trl_steppo.inference.base import SamplingParams
from trl_steppo.inference.local import LocalSampler
from trl_steppo.numerics import Numerics


class Policy:
    """
    What a small server samples from: at first other weights than anybody trains.

    Args:
        autocast (`torch.dtype`, *optional*):
            What it computes in.
    """

    def __init__(self, autocast: torch.dtype | None = None) -> None:
        self.numerics = Numerics(autocast=autocast)
        self.samplers: dict[str | None, LocalSampler] = {}

    def load(self, directory: Path | None) -> None:
        model = make_model(9)
        if directory is not None:
            # Not `from_pretrained`, which patches its class for all threads while it loads, and here several load.
            model.load_state_dict(load_file(directory / "model.safetensors"))
        self.samplers = {None: LocalSampler(model, numerics=self.numerics)}

    async def respond(
        self, prompt: list[int], params: dict[str, Any], adapter: str | None
    ) -> tuple[list[int], list[float]]:
        if adapter not in self.samplers:
            self.samplers[adapter] = LocalSampler(_with_adapter(adapter), numerics=self.numerics)
        sampling = SamplingParams(
            params["max_tokens"],
            params["temperature"],
            stop_token_ids=tuple(params["stop_token_ids"]),
            seed=params["seed"],
        )
        sample = await self.samplers[adapter].sample(prompt, sampling, episode_id=str(params["seed"]))
        return sample.token_ids.tolist(), list(sample.logprobs)


def _with_adapter(directory: str | None) -> Any:
    from peft import PeftModel

    assert directory is not None
    return PeftModel.from_pretrained(make_model(), directory).merge_and_unload().eval()


def serve(port: int) -> None:
    """Serve until the process is killed."""
    torch.set_num_threads(1)
    policy = Policy()
    FakeVLLM(policy.respond, policy.load, port=port, max_model_len=4096)
    threading.Event().wait()
