"""A script for `GRPOTrainer` becomes ours by four lines, and both of its runs stand in one report."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import pytest
import trl

import trl_steppo
from tests.examples.trl_scripts import scripted_runs
from tests.examples.trl_scripts.scripted_runs import Recording, call, grpo_trainer, say, steppo_trainer
from trl_steppo.report import write_report
from trl_steppo.report.episodes import sample_episodes
from trl_steppo.report.methods import group_runs
from trl_steppo.report.runs import load_runs

SCRIPT = Path(__file__).with_name("warehouse.py")
CHANGES = {
    "from trl import GRPOConfig, GRPOTrainer\n": (
        "from trl import GRPOConfig\n\nfrom trl_steppo import StepPOConfig, StepPOTrainer\n"
    ),
    "trainer = GRPOTrainer(\n": "trainer = StepPOTrainer(\n",
    "    args=args,\n": (
        '    args=StepPOConfig.from_grpo_config(args, advantage_estimator="step_gae", output_dir="runs/steppo"),\n'
    ),
}
HERE: dict[str, Any] = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}


def says(prompt: str, generation: int, step: int) -> str:
    """The right item, another one, a call that fails, and talk."""
    item = prompt.rpartition("Pack the ")[2].partition(".")[0]
    shelf = {"tea": 1, "cup": 1, "pen": 2, "lamp": 3}.get(item, 1)
    take = call(("take", {"shelf": shelf, "item": item}))
    turns = [
        [call(("look", {"shelf": shelf})), take, call(("pack", {}), text="It is there. ")],
        [call(("take", {"shelf": 1, "item": "cup"})), call(("pack", {}))],
        [call(("take", {"shelf": 9, "item": item})), say("I give up")],
        [say("What do you need?")],
    ][generation]
    return turns[step] if step < len(turns) else say("done")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The script as it is, and with our lines, on a tiny policy that says what it is told."""
    root = tmp_path_factory.mktemp("side_by_side")
    policy = scripted_runs.save_policy(root / "policy")
    original = SCRIPT.read_text()

    class Config(trl.GRPOConfig):
        def __init__(self, *given: Any, **settings: Any) -> None:
            super().__init__(*given, **{**settings, **HERE})

    Config.__module__, Config.__name__, Config.__qualname__ = "trl.trainer.grpo_config", "GRPOConfig", "GRPOConfig"
    ours = steppo_trainer(says, Recording(), policy)
    ours.__name__ = "StepPOTrainer"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(trl.trainer.grpo_config, "GRPOConfig", Config)  # for the pickle of its settings
        patch.setattr(trl, "GRPOConfig", Config)
        patch.setattr(trl, "GRPOTrainer", grpo_trainer(says, Recording(), policy))
        patch.setattr(trl_steppo, "StepPOTrainer", ours)
        for name, text in (("grpo", original), ("steppo", changed(original))):
            file = root / f"{name}.py"
            file.write_text(text)
            exec(compile(text, str(file), "exec"), {"__name__": "__main__", "__file__": str(file)})
    return [root / "runs" / "grpo", root / "runs" / "steppo"]


def changed(text: str) -> str:
    for old, new in CHANGES.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


def test_four_lines_are_changed(capsys):
    original = SCRIPT.read_text()
    diff = list(difflib.unified_diff(original.splitlines(), changed(original).splitlines(), lineterm="", n=0))
    added = [line for line in diff if line.startswith("+") and line[1:].strip() and not line.startswith("+++")]
    assert len(added) == 4
    with capsys.disabled():
        print("\n" + "\n".join(diff))


def test_both_runs_stand_side_by_side(runs, tmp_path):
    grpo, steppo = loaded = load_runs(runs)
    methods = group_runs(loaded)
    assert [method.name for method in methods] == ["GRPO (TRL)", "StepPO"]
    assert (grpo.is_finished, steppo.is_finished) == (True, True)
    assert (grpo.num_updates, steppo.num_updates) == (3, 3)
    assert (grpo.episodes_per_update, steppo.episodes_per_update) == (8.0, 8.0)
    common = {"reward", "reward_std", "rewards/delivered/mean", "rewards/thrift/mean", "warehouse/looks", "num_tokens"}
    common |= {"entropy", "learning_rate", "loss", "grad_norm", "frac_reward_zero_std"}
    for run in loaded:
        assert common <= run.metrics
        assert any((run.directory / "runs").rglob("events.out.tfevents*")) or list(run.directory.rglob("events*"))
    for name in ("reward", "rewards/delivered/mean", "env/reward", "warehouse/looks"):
        assert sum(grpo.series(name).values()) == pytest.approx(sum(steppo.series(name).values()), abs=1e-5), name
    page = write_report(runs, tmp_path / "report.html")[0].read_text()
    assert "GRPO (TRL)" in page
    assert page.index("GRPO (TRL)") < page.index("StepPO")


def test_the_episodes_of_both_are_in_the_viewer(runs):
    sample = sample_episodes(group_runs(load_runs(runs)), max_bytes=10**6)
    assert not sample.unreadable
    theirs = [episode for episode in sample.episodes if episode["method"] == 0]
    assert len(theirs) == 3 * 8
    first = next(episode for episode in theirs if len(episode["steps"]) > 3)
    rewards = {"rewards/delivered": 1.0, "rewards/thrift": 0.0}
    assert (first["score"], first["outcome"], first["metrics"]) == (1.0, "right", rewards)
    assert '"name": "take"' in first["steps"][1]["response"]
    assert "took " in first["steps"][1]["observation"] == first["steps"][2]["prompt"]
    assert [step["reward"] for step in first["steps"]] == [0.0, 0.0, 0.0, 1.0]
    assert "What do you need?" in json.dumps(theirs)
