"""The life of a run as transformers' `Trainer` has it: every event, stopping, trackers, the model card, the hub."""

from __future__ import annotations

import inspect
import sqlite3
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

import trl_steppo
from tests.trainer.tiny import make_trainer, prompt_rows
from tests.warm import run_script
from trl_steppo.trainer import model_card

EVENTS = [name for name, _ in inspect.getmembers(TrainerCallback, inspect.isfunction) if name.startswith("on_")]
NEVER = {"on_predict"}  # there is nothing to predict: `evaluate` plays any dataset


class Recorder(TrainerCallback):
    """Writes down every event; at one of them, asks the run to stop."""

    def __init__(self, stop_at: str = "", update: int = 0) -> None:
        self.events: list[str] = []
        self.stop = (stop_at, update)


def _recording(name: str) -> Callable[..., None]:
    def record(self: Recorder, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert kwargs["model"] is not None
        self.events.append(name)
        if (name, state.global_step) == self.stop:
            control.should_training_stop = True

    return record


for _name in EVENTS:
    setattr(Recorder, _name, _recording(_name))

SETTINGS: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
}


def test_the_order_of_events(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, callbacks=[recorder], eval_dataset=prompt_rows(2), **{**SETTINGS, "max_steps": 2})
    assert trainer.train().global_step == 2
    network = ("on_substep_end", "on_pre_optimizer_step", "on_optimizer_step")
    update = ("on_step_begin", *network, *network, "on_step_end")  # two micro-batches of the policy, two of the critic
    assert recorder.events == [
        *("on_init_end", "on_train_begin", "on_epoch_begin"),
        *(*update, "on_log"),
        *(*update, "on_epoch_end", "on_epoch_begin", "on_log"),
        *("on_prediction_step", "on_prediction_step", "on_log", "on_evaluate", "on_save"),
        *("on_log", "on_train_end"),
    ]
    assert (tmp_path / "checkpoint-2").is_dir()


@pytest.mark.parametrize("event", sorted({*EVENTS} - NEVER - {"on_init_end", "on_train_end", "on_push_begin"}))
def test_a_run_can_be_stopped_at_every_event(tmp_path, event):
    """At the end of the update in which a callback asks for it; what belongs to that update is still done."""
    after = (
        2 if event in ("on_step_end", "on_epoch_end", "on_log", "on_evaluate", "on_save", "on_prediction_step") else 1
    )
    if event == "on_epoch_begin":
        after = 2
    recorder = Recorder(event, update=0 if event == "on_train_begin" else after)
    trainer = make_trainer(tmp_path, callbacks=[recorder], eval_dataset=prompt_rows(2), **SETTINGS)
    trainer.train()
    assert trainer.state.global_step == (0 if event == "on_train_begin" else 2)
    assert recorder.events[-1] == "on_train_end"


def test_a_run_of_several_epochs(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        callbacks=[recorder],
        total_episodes=None,
        num_train_epochs=3,
        eval_dataset=prompt_rows(1),
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=1,
    )
    trainer.train()
    assert trainer.state.global_step == 6
    assert trainer.state.epoch == 3.0
    assert recorder.events.count("on_epoch_end") == 3
    assert [logs["epoch"] for logs in trainer.state.log_history if "episode" in logs] == [1.0, 2.0, 3.0]
    assert [logs["epoch"] for logs in trainer.state.log_history if "eval_reward" in logs] == [1.0, 2.0, 3.0]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


# -- trackers ---------------------------------------------------------------------------------------------------------


def test_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = make_trainer(tmp_path / "run", report_to="tensorboard", eval_dataset=prompt_rows(2), eval_on_start=True)
    trainer.train()
    found = EventAccumulator(str(tmp_path / "logs"))
    found.Reload()
    scalars = set(found.Tags()["scalars"])
    assert {"train/loss/policy_avg", "train/env/reward", "train/critic/explained_variance", "eval/reward"} <= scalars
    logged = [logs["env/reward"] for logs in trainer.state.log_history if "env/reward" in logs]
    assert [event.value for event in found.Scalars("train/env/reward")] == pytest.approx(logged)


TRACKIO_RUN = """
import sys
from tests.trainer.tiny import make_trainer
make_trainer(sys.argv[1], report_to="trackio", run_name="tiny", project="steppo", trackio_space_id=None).train()
"""


def test_trackio(tmp_path):
    """In a process of its own: trackio keeps its place from when it is imported, and a thread."""
    done = run_script(TRACKIO_RUN, tmp_path / "run", timeout=200, TRACKIO_DIR=str(tmp_path / "trackio"))
    assert done.returncode == 0, done.stderr[-3000:]
    (database,) = (tmp_path / "trackio").glob("steppo*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select metrics from metrics").fetchall()
    assert sum("loss/policy_avg" in str(row[0]) for row in rows) == 2


# -- the model card and the hub ---------------------------------------------------------------------------------------


def test_the_model_card(tmp_path, monkeypatch):
    """In a checkout, too, that is not installed."""

    def version_of_others(package: str) -> str:
        assert package != "trl-steppo"
        return version(package)

    monkeypatch.setattr(model_card, "version", version_of_others)
    trainer = make_trainer(tmp_path)
    trainer.create_model_card(model_name="tiny-agent")
    card = (tmp_path / "README.md").read_text()
    assert "tiny-agent" in card
    assert "2604.18401" in card
    assert f"- trl-steppo {trl_steppo.__version__}\n- trl " in card
    for tag in ("trl", "ppo", "steppo"):
        assert f"- {tag}\n" in card


class Hub:
    """Stands for the hub, which cannot be reached here: keeps what would be uploaded."""

    def __init__(self) -> None:
        self.uploads: list[tuple[str, set[str]]] = []

    def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
        return type("RepoUrl", (), {"repo_id": repo_id})()

    def upload_folder(self, *, repo_id: str, folder_path: Any, **kwargs: Any) -> Any:
        files = {str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file()}
        self.uploads.append((repo_id, files))
        return type(
            "Job", (), {"is_done": lambda self: True, "done": lambda self: True, "result": lambda self: None}
        )()


@pytest.fixture
def hub(monkeypatch) -> Hub:
    from transformers import trainer as module

    hub = Hub()
    monkeypatch.setattr(module, "hf_api", lambda *args, **kwargs: hub, raising=False)
    for name in ("create_repo", "upload_folder"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, getattr(hub, name))
    return hub


def test_push_to_hub(tmp_path, hub):
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        callbacks=[recorder],
        push_to_hub=True,
        hub_model_id="someone/tiny-agent",
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    trainer.push_to_hub(commit_message="done")
    assert "on_push_begin" in recorder.events
    assert {repo for repo, _ in hub.uploads} == {"someone/tiny-agent"}
    assert len(hub.uploads) == 3  # two checkpoints and the end
    for _, files in hub.uploads:
        assert {"README.md", "model.safetensors", "tokenizer.json", "critic/model.safetensors"} <= files
