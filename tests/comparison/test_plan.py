"""Which runs a comparison has, and what they are refused for."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from trl_steppo.comparison import progress
from trl_steppo.comparison.flags import flags_of, refuse_unknown
from trl_steppo.comparison.plan import Arm, differences_of, note_former_script, parse_arm, plan_runs, refuse_others
from trl_steppo.comparison.processes import State, play
from trl_steppo.comparison.progress import Progress, progress_of
from trl_steppo.comparison.runs import PlannedRun
from trl_steppo.comparison.slots import slots_of
from trl_steppo.errors import ConfigurationError

SCRIPT = Path(__file__).parent / "script.py"


def test_an_arm_is_a_name_and_settings():
    arm = parse_arm(
        ["fast, λ=1".replace("=", " "), "learning_rate=1e-3", "--lam=1", "note=a=b", "reward-weights=[1, 0.5]"]
    )
    assert arm == Arm(
        "fast, λ 1",
        {"learning_rate": ("1e-3",), "lam": ("1",), "note": ("a=b",), "reward_weights": ("1", "0.5")},
    )
    assert shlex.join(arm.words) == "--learning_rate 1e-3 --lam 1 --note a=b --reward_weights 1 0.5"
    assert parse_arm(["a", "kwargs={}", "names=[", 'tags=["x"]']).settings == {
        "kwargs": ("{}",),
        "names": ("[",),
        "tags": ("x",),
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lr=1"], "an arm begins with its name"),
        (["../a"], "an arm begins with its name"),
        (["a", "gamma"], "arm a: 'gamma' is not a setting; write key=value"),
        (["a", "gamma=1", "gamma=2"], "arm a: `gamma` is set twice"),
    ],
)
def test_an_arm_that_is_none_is_refused(words, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_arm(words)


def test_every_arm_is_played_with_every_seed_seed_by_seed(tmp_path):
    arms = [Arm("a", {}), Arm("b c", {"gamma": ("1",)})]
    runs = plan_runs(
        "train.py", arms, [1, 2], tmp_path, flags=["--gamma", "0.9"], config="x", launcher=["accelerate", "launch"]
    )
    assert [run.label for run in runs] == ["a, seed 1", "b c, seed 1", "a, seed 2", "b c, seed 2"]
    assert runs[3].words == [
        *("accelerate", "launch", "train.py", "--config", "x", "--gamma", "0.9", "--gamma", "1"),
        *("--seed", "2", "--run_name", "b c", "--output_dir", str(tmp_path / "b c" / "seed_2")),
    ]


@pytest.mark.parametrize(
    ("arms", "seeds", "flags", "message"),
    [
        ([Arm("a", {}), Arm("a", {})], [1], [], "two arms are a"),
        ([Arm("a", {})], [1, 2, 1], [], "two seeds are 1"),
        ([Arm("a", {"seed": ("1",)})], [1], [], "arm a: `seed` is set for each run, from --seeds"),
        ([Arm("a", {})], [1], ["--output-dir=x"], "after --: `output_dir` is set for each run, from --output_dir"),
    ],
)
def test_what_the_plan_sets_cannot_be_set(tmp_path, arms, seeds, flags, message):
    with pytest.raises(ConfigurationError, match=message):
        plan_runs("train.py", arms, seeds, tmp_path, flags=flags)


def test_a_script_is_asked_for_its_settings():
    flags = flags_of(SCRIPT)
    assert {"learning_rate", "total_updates", "seed", "help"} <= flags
    refuse_unknown(["learning_rate"], flags, "arm a")
    with pytest.raises(ConfigurationError, match="no setting `learning_rat`; did you mean `learning_rate`"):
        refuse_unknown(["seed", "learning_rat"], flags, "arm a")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit('no such thing')", "--help` fails, so its flags are unknown:\nno such thing"),
        ("print('--output_dir --seed')", "does not take --run_name, --resume_from_checkpoint; parse its flags with"),
        ("import sys; print('--help_all', '--output_dir' * ('--help_all' in sys.argv))", "does not take --seed"),
    ],
)
def test_a_script_without_a_trainers_settings_is_refused(tmp_path, code, message):
    (tmp_path / "script.py").write_text(code)
    with pytest.raises(ConfigurationError) as found:
        flags_of(tmp_path / "script.py")
    assert message in str(found.value)


def planned(directory, *, config=None, **settings):
    arm = Arm("a", {name: (value,) for name, value in settings.items()})
    return plan_runs("train.py", [arm], [1], directory, config=config)[0]


def test_a_run_of_other_settings_in_its_place_is_named(tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text("gamma: 0.9")
    run = planned(tmp_path, config=str(config), lam="1", rho="2")
    refuse_others([run])
    run.prepare()
    other = planned(tmp_path, config=str(config), lam="0.5", eta="3")
    refuse_others([run, other])  # nothing is lost: it was cut off before a checkpoint
    (run.output_dir / "checkpoint-3").mkdir()
    (run.output_dir / "checkpoint-3" / "trainer_state.json").touch()
    refuse_others([run])
    with pytest.raises(
        ConfigurationError, match=r"a.seed_1 holds a run of other settings; remove it, or name another"
    ):
        refuse_others([other])
    assert differences_of(other) == [
        "lam is 1 there, and 0.5 here",
        "rho is 2 there, and not set here",
        "eta is not set there, and 3 here",
    ]
    config.write_text("gamma: 1.0")
    assert len(differences_of(run)) == 1
    assert differences_of(run)[0].endswith("recipe.yaml has changed since")
    (tmp_path / "c" / "a" / "seed_1").mkdir(parents=True)
    refuse_others([planned(tmp_path / "c")])
    (tmp_path / "c" / "a" / "seed_1" / "thesis.txt").touch()
    with pytest.raises(ConfigurationError, match="holds files that no comparison has written"):
        refuse_others([planned(tmp_path / "c")])


def test_runs_of_a_changed_script_are_named_and_stay(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("1")
    first, second = plan_runs(str(script), [Arm("a", {})], [1, 2], tmp_path)
    first.prepare()
    first.mark_finished(1.0)
    assert note_former_script([first, second]) is None
    script.write_text("2")
    refuse_others([first, second])
    note = note_former_script([first, second])
    assert note is not None
    assert "train.py has changed since" in note
    assert f"\n  {first.output_dir}\n" in note
    assert str(second.output_dir) not in note


def test_a_run_that_goes_on_with_a_changed_script_is_named_ever_after(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("1")
    (run,) = plan_runs(str(script), [Arm("a", {})], [1], tmp_path)
    run.prepare()
    script.write_text("2")
    assert not run.has_former_script, "it has no checkpoint, and starts again"
    (run.output_dir / "checkpoint-3").mkdir()
    (run.output_dir / "checkpoint-3" / "trainer_state.json").touch()
    run.prepare()
    assert run.has_former_script


def test_a_recipe_is_an_input(tmp_path):
    assert [path.name for path in planned(tmp_path, config="mini_wiki").inputs] == ["train.py", "mini_wiki.yaml"]
    assert [path.name for path in planned(tmp_path, config="unknown").inputs] == ["train.py"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_runs": 9, "cores": 4}, [("1", None)] * 4),
        ({"num_runs": 2, "cores": 8}, [("4", None)] * 2),
        ({"num_runs": 9, "cores": 4, "parallel": 3}, [("1", None)] * 3),
        ({"num_runs": 9, "cores": 8, "gpus": ["0", "1"]}, [("4", "0"), ("4", "1")]),
        ({"num_runs": 1, "cores": 8, "gpus": ["0", "1"]}, [("8", "0,1")]),
        ({"num_runs": 9, "cores": 4, "gpus": ["4", "6"], "parallel": 4}, [("1", gpu) for gpu in "4646"]),
    ],
)
def test_runs_share_the_machine(monkeypatch, settings, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    slots = slots_of(**settings)
    assert [(slot["OMP_NUM_THREADS"], slot.get("CUDA_VISIBLE_DEVICES")) for slot in slots] == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert {slot["OMP_NUM_THREADS"] for slot in slots_of(**settings)} == {"7"}
    with pytest.raises(ConfigurationError, match="--parallel 0"):
        slots_of(1, parallel=0)


def test_progress_is_that_of_the_last_whole_line(tmp_path):
    assert progress_of(tmp_path) is None
    lines = [{"step": 1, "env/reward": 0.1}, {"step": 2, "reward": 0.25}, {"step": 2, "eval_reward": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "rew')
    assert progress_of(tmp_path) == Progress(2, 0.25)


def test_progress_of_other_trainers_is_that_of_their_last_checkpoint(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text('{"log_history": [{"step": 5, "reward": 0.5}]}')
    assert progress_of(tmp_path) == Progress(5, 0.5)


def test_progress_survives_a_checkpoint_that_is_deleted_meanwhile(tmp_path, monkeypatch):
    """As by `save_total_limit`: it is listed, and gone when it is read."""
    monkeypatch.setattr(progress, "last_checkpoint", lambda directory: directory / "checkpoint-5")
    assert progress_of(tmp_path) is None


def test_an_error_of_what_shows_runs_does_not_end_them(tmp_path, caplog):
    arguments = (str(SCRIPT), "--seed", "1", "--output_dir")
    run = PlannedRun((*arguments, str(tmp_path / "a")), tmp_path / "a")
    seen = []

    def fail(run, state):
        seen.append(state)
        raise FileNotFoundError("gone")

    assert play([run], [{}], fail) == []
    assert seen == [State.RUNNING, State.FINISHED]
    assert run.is_finished
    assert "showing that failed" in caplog.text
