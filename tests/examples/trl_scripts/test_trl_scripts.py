"""
TRL's own example scripts under `StepPOTrainer`: as TRL wrote them, but for a few lines, with the rewards that they
have under `GRPOTrainer`.

They are TRL's, and not part of this repository: `TRL_EXAMPLES` names the `examples` folder of a checkout of TRL.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from pathlib import Path

import pytest
import trl

from tests.examples.trl_scripts import clients, scripted_runs
from tests.examples.trl_scripts.scripted_runs import Recording, call, say

EXAMPLES = Path(os.environ.get("TRL_EXAMPLES", ""))

pytestmark = pytest.mark.skipif(
    "TRL_EXAMPLES" not in os.environ,
    reason="the scripts are TRL's: set TRL_EXAMPLES to the folder `examples` of a checkout of huggingface/trl",
)

MOST_CHANGED_LINES = 4

_IMPORT = "from trl import GRPOConfig, GRPOTrainer"
_INLINE = r"args=GRPOConfig\((.*?)\n        \),"  # else the settings have a name, which is passed on

CHANGES = [
    (_IMPORT, f"from trl_steppo import StepPOConfig, StepPOTrainer\n{_IMPORT}"),
    (r"trainer = GRPOTrainer\(", "trainer = StepPOTrainer("),
    (
        rf"(?s){_INLINE}|args=(grpo_config|training_args),",
        lambda found: (
            f"args=StepPOConfig.from_grpo_config({found[2]}),"
            if found[2]
            else f"args=StepPOConfig.from_grpo_config(GRPOConfig({found[1]}\n        )),"
        ),
    ),
]
"""What is written in place of what: patterns that are found once in each script."""

# Of each script: its command line, and what the policy says in the episodes of a row; when all is said, "done".
SCRIPTS: dict[str, tuple[str, list[list[str]]]] = {
    "openenv/echo.py": (
        "",
        [
            [call(("echo", {"message": "hello"}))],
            [call(("echo", {"message": "hi"}), ("echo", {"message": "longer"}))],
            [say("no call")],
            [call(("echo", {"text": "wrong name"})), call(("echo", {"message": "at last"}))],
        ],
    ),
    "openenv/wordle.py": (
        "--dataset-size 8",
        [
            [call(("guess", {"guess": f"[{word}]"})) for word in ("slate", "crate", "brine", "crane", "crane")],
            [
                call(("guess", {"guess": f"[{word}]"}))
                for word in ("aaaaa", "bbbbb", "ccccc", "ddddd", "eeeee", "crank")
            ],
            [call(("guess", {"guess": "[slate]"})), call(("guess", {"guess": "too long"}))],
            [call(("stay", {}))],
        ],
    ),
    "openenv/catch.py": (
        "--env-mode space --env-host http://catch --dataset-size 8",
        [
            [call(("move", {"direction": "right"})), call(("move", {"direction": "right"})), call(("stay", {}))],
            [call(("stay", {})), call(("move", {"direction": "left"})), call(("stay", {})), call(("stay", {}))],
            [call(("stay", {}), ("move", {"direction": "up"}))],
            [say("I wait")],
        ],
    ),
    "openenv/sudoku.py": (
        "--env-host http://sudoku --dataset-size 8 --system-prompt-path sudoku_prompt.txt --no-gradient-checkpointing",
        [
            [call(("place", {"row": 1, "col": 1, "number": 5})), call(("place", {"row": 5, "col": 5, "number": 5}))],
            [call(("place", {"row": 1, "col": 1, "number": 5})), call(("place", {"row": 1, "col": 1, "number": 5}))],
            [call(("place", {"row": 9, "col": 9, "number": 1})) for _ in range(7)],
            [call(("place", {"row": 1, "col": 1}))],
        ],
    ),
    "openenv/multi_env.py": (
        "--wordle-url http://wordle --catch-url http://catch",
        [
            [
                call(("guess", {"guess": "[slate]"}), ("move", {"direction": "right"})),
                call(("move", {"direction": "right"})),
                call(("stay", {})),
            ],
            [call(("guess", {"guess": "[crane]"})), call(("guess", {"guess": "[crane]"}))],
            [call(("stay", {})), call(("stay", {})), call(("stay", {}))],
            [say("nothing")],
        ],
    ),
    "grpo_2048.py": (
        "",
        [
            [call(("move", {"direction": d})) for d in ("left", "up", "left", "down", "right", "left", "up", "left")],
            [call(("move", {"direction": "sideways"})), call(("move", {"direction": " UP "}))],
            [call(("move", {"direction": "down"}), ("move", {"direction": "down"}))],
            [say("I will not")],
        ],
    ),
    "grpo_agent.py": (
        "--model_name_or_path Qwen/Qwen3-1.7B --output_dir out --max_completion_length 1024",
        [
            [
                call(
                    ("query_biogrid", {"sql_command": "SELECT * FROM interactions WHERE Alt_IDs_Interactor_A='TP53'"})
                ),
                say("It is *yes*"),
            ],
            [call(("query_biogrid", {"sql_command": "SELECT * FROM gone LIMIT 1"})), say("*No*")],
            [call(("query_biogrid", {"sql_command": "SELECT * FROM interactions LIMIT 1"}), text="let me look")] * 6
            + [say("*no*")],
            [say("perhaps")],
        ],
    ),
}


def changed(text: str) -> str:
    """The script under our trainer."""
    for old, new in CHANGES:
        text, times = re.subn(old, new, text)
        assert times == 1, f"{old!r} is {times} times in the script"
    return text


def num_changed_lines(before: str, after: str) -> int:
    operations = difflib.SequenceMatcher(None, before.splitlines(), after.splitlines(), autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for kind, i1, i2, j1, j2 in operations if kind != "equal")


def play(script: str, text: str, policy: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Recording:
    """What the reward functions of a script see and return, when it is run as it stands in `text`."""
    flags, said = SCRIPTS[script]
    recording = Recording()

    def says(prompt: str, generation: int, step: int) -> str:
        turns = said[generation]
        return turns[step] if step < len(turns) else say("done")

    folder.mkdir()
    (folder / "sudoku_prompt.txt").write_text("Play with the tool `place`.")
    monkeypatch.chdir(folder)
    clients.install(monkeypatch)
    monkeypatch.setattr(sys, "argv", [script, *flags.split()])
    scripted_runs.install(monkeypatch, says, recording, policy)
    is_a_program = "def main(" not in text
    path = folder / "script.py"
    path.write_text(text)  # executed text that is in no file may not ask for the main thread
    module = {"__name__": "__main__" if is_a_program else "script", "__file__": str(path)}
    exec(compile(text, str(path), "exec"), module)
    if not is_a_program:
        module["random"] = clients.NoRandom
        module["main"]()
    return recording


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> str:
    return scripted_runs.save_policy(tmp_path_factory.mktemp("policy"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_rewards_as_under_grpo_trainer(script, policy, monkeypatch, tmp_path, capsys):
    original = (EXAMPLES / "scripts" / script).read_text()
    ours = changed(original)
    lines = num_changed_lines(original, ours)
    assert lines <= MOST_CHANGED_LINES
    with monkeypatch.context() as patched:
        theirs = play(script, original, policy, patched, tmp_path / "grpo")
    with monkeypatch.context() as patched:
        here = play(script, ours, policy, patched, tmp_path / "steppo")
    assert theirs.rewards() == here.rewards()
    assert len({str(rewards) for rewards in theirs.rewards()}) > 1  # else the comparison would say nothing
    with capsys.disabled():
        print(f"\n{script}: {lines} lines changed; TRL {trl.__version__}; rewards under both {here.rewards()}")
