"""SIGTERM and SIGINT stop a run where it can go on later."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.trainer.tiny import Hash, make_model, make_trainer, prompt_rows, same, weights
from trl_steppo import stopping
from trl_steppo.learning.ranks import _sendable

SAVING: dict[str, Any] = {
    "total_episodes": 24,
    "save_strategy": "steps",
    "save_steps": 100,
    "max_concurrent_episodes": 1,
    "num_mini_batches": 2,
}


class Draws(Hash):
    """Its rewards come from the generator of Python, which a checkpoint holds."""

    def step(self, response: str) -> tuple[str, float, bool]:
        observation, reward, done = super().step(response)
        return observation, reward + random.random(), done


def drawing_until(number: int, how: signal.Signals) -> type:
    """Sends this process a signal in the step of that number, of the whole run."""
    steps = iter(range(1, 1000))

    class Sends(Draws):
        def step(self, response: str) -> tuple[str, float, bool]:
            if next(steps) == number:
                os.kill(os.getpid(), how)
            return super().step(response)

    return Sends


class SendsAt(TrainerCallback):
    def __init__(self, event: str, update: int, how: signal.Signals = signal.SIGTERM) -> None:
        self.update, self.how = update, how
        setattr(self, event, self.send)

    def send(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.update:
            self.update = -1
            os.kill(os.getpid(), self.how)


def names(directory: Any) -> list[str]:
    return sorted(path.name for path in directory.glob("checkpoint-*"))


@pytest.fixture(autouse=True)
def _handlers_are_as_before():
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell began it with `&`
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    signal.signal(signal.SIGINT, inherited)
    assert not stopping.is_requested()


@pytest.mark.parametrize("where", ["rollout", "update", "evaluation"])
def test_what_was_done_is_saved_and_the_rest_is_as_without_the_stop(tmp_path, where):
    settings = SAVING
    if where == "evaluation":
        settings = {**SAVING, "eval_strategy": "steps", "eval_steps": 2, "eval_dataset": prompt_rows(2)}
    random.seed(1)
    whole = make_trainer(tmp_path / "whole", environment_factory=Draws, **settings)
    whole.train()
    random.seed(1)
    if where == "rollout":
        given: dict[str, Any] = {"environment_factory": drawing_until(25, signal.SIGTERM)}
    elif where == "update":
        given = {"environment_factory": Draws, "callbacks": [SendsAt("on_optimizer_step", 1)]}
    else:
        given = {"environment_factory": Draws, "callbacks": [SendsAt("on_prediction_step", 2)]}
    stopped = make_trainer(tmp_path / "run", **settings, **given)
    with pytest.raises(SystemExit) as ended:
        stopped.train()
    assert ended.value.code == 143
    assert not stopped.is_in_train
    assert stopped.state.global_step in (1, 2)
    assert names(tmp_path / "run") == [f"checkpoint-{stopped.state.global_step}"]
    random.seed(7)
    rest = make_trainer(tmp_path / "run", environment_factory=Draws, model=make_model(9), **settings)
    rest.train(resume_from_checkpoint=True)
    assert rest.state.global_step == 3
    if where != "evaluation":  # one that is broken off is not made up for, and its episodes would draw numbers, too
        assert same(weights(rest.model), weights(whole.model))


def test_nothing_is_saved_where_no_checkpoints_are_asked_for(tmp_path):
    trainer = make_trainer(tmp_path, **{**SAVING, "save_strategy": "no"}, callbacks=[SendsAt("on_step_end", 2)])
    with pytest.raises(SystemExit):
        trainer.train()
    assert trainer.state.global_step == 2
    assert names(tmp_path) == []


def test_what_is_saved_already_is_not_saved_again(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **{**SAVING, "save_steps": 1}, callbacks=[SendsAt("on_save", 1)])
    saved = []
    save = trainer._save_checkpoint
    monkeypatch.setattr(trainer, "_save_checkpoint", lambda *args, **kwargs: [saved.append(1), save(*args, **kwargs)])
    with pytest.raises(SystemExit):
        trainer.train()
    assert (len(saved), names(tmp_path)) == (1, ["checkpoint-1"])


@pytest.mark.parametrize("settings", [{}, {"max_staleness": 1, "max_concurrent_episodes": None}], ids=["on", "ahead"])
def test_ctrl_c_is_an_interrupt_in_the_end(tmp_path, settings):
    given = {"environment_factory": drawing_until(30, signal.SIGINT)}
    trainer = make_trainer(tmp_path, **{**SAVING, "save_steps": 1, **settings}, **given)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step < 3
    assert names(tmp_path) == [f"checkpoint-{n}" for n in range(1, trainer.state.global_step + 1)]


def test_a_signal_in_the_last_moment_is_not_lost(tmp_path):
    trainer = make_trainer(tmp_path, **SAVING, callbacks=[SendsAt("on_train_end", 3)])
    with pytest.raises(SystemExit):
        trainer.train()
    assert trainer.state.global_step == 3


class EndsAfterTwo(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == 2


@pytest.mark.parametrize("event", ["on_optimizer_step", "on_step_end", "on_prediction_step"])
def test_what_the_last_update_has_done_is_saved(tmp_path, event):
    """Also where a callback ends the run, so that nothing else saves that update; the evaluation comes behind it."""
    settings = {**SAVING, "eval_strategy": "steps", "eval_steps": 100, "eval_dataset": prompt_rows(2)}
    done = 1 if event == "on_optimizer_step" else 2
    trainer = make_trainer(tmp_path, **settings, callbacks=[EndsAfterTwo(), SendsAt(event, done)])
    with pytest.raises(SystemExit):
        trainer.train()
    assert trainer.state.global_step == 2
    assert names(tmp_path) == ["checkpoint-2"]


def test_the_same_signal_again_ends_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "_REPEAT_GRACE_S", -1.0)
    seen = []

    class Again(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            seen.append("first")
            os.kill(os.getpid(), signal.SIGINT)
            seen.append("second")

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, **SAVING, callbacks=[Again()]).train()
    assert seen == ["first"]
    assert names(tmp_path) == []


def test_what_a_launcher_passes_on_is_no_second_signal(tmp_path):
    class Twice(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, **SAVING, callbacks=[Twice()]).train()
    assert names(tmp_path) == ["checkpoint-1"]


def test_a_handler_of_ones_own_is_left_alone(tmp_path):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        trainer = make_trainer(tmp_path, **SAVING, callbacks=[SendsAt("on_step_end", 1)])
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (heard, trainer.state.global_step) == ([signal.SIGTERM], 3)


def test_training_in_another_thread(tmp_path):
    """Where Python handles no signals."""
    trainer = make_trainer(tmp_path, **SAVING)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 3


def test_ranks_that_got_no_signal_hear_of_it():
    error = _sendable(stopping.StopRequestedError("a rollout was broken off"))
    assert isinstance(error, stopping.StopRequestedError)
    with pytest.raises(SystemExit) as ended, stopping.listening():
        raise error
    assert ended.value.code == 143


LISTENS = """
import sys, time
from trl_steppo.stopping import is_requested, listening
with listening():
    print("listens", flush=True)
    while not is_requested():
        time.sleep(0.05)
    open(sys.argv[1], "w").close()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_stops_with_its_launcher(tmp_path, number):
    """`accelerate launch` does not pass signals on to the one process that it has started."""
    script, stopped = tmp_path / "listens.py", tmp_path / "stopped"
    script.write_text(LISTENS)
    words = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    with subprocess.Popen([*words, script, stopped], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        assert any("listens" in line for line in iter(launcher.stdout.readline, ""))
        launcher.send_signal(number)
        launcher.wait(60)
        deadline = time.monotonic() + 60
        while not stopped.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert stopped.exists()
