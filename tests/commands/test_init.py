"""`trl-steppo init`: what it makes passes its tests, trains, and is clean, as made."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.warm import run_script
from trl_steppo.cli import main
from trl_steppo.commands.init import TEMPLATES, class_name, make_project, slug
from trl_steppo.errors import ConfigurationError

SHORT = ["--total_episodes", "16", "--per_device_train_batch_size", "8", "--eval_strategy", "no"]


@pytest.fixture
def project(request, tmp_path) -> Path:
    if request.param == "agent":
        pytest.importorskip("starlette", reason="needs the extra `gateway`")
        pytest.importorskip("openai", reason="needs the extra `openai`")
    folder = tmp_path / "my-first project"
    make_project(folder, template=request.param)
    return folder


def every_template(*more: str):
    return pytest.mark.parametrize("project", [*TEMPLATES, *more], indirect=True)


@every_template()
def test_the_tests_pass_as_made(project):
    code = "import sys, pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '--rootdir', '.']))"
    done = run_script(code, cwd=project, timeout=100, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "passed" in done.stdout


@every_template()
def test_the_script_trains_as_made(project):
    done = run_script(project / "train.py", *SHORT, "--eval_on_start", "false", cwd=project, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = (project / "runs").iterdir()
    assert run.name == "my_first_project"
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert len([logs for logs in history if "loss/policy_avg" in logs]) == 2
    assert (run / "model.safetensors").is_file()


@pytest.mark.slow
@every_template()
def test_it_learns_as_made(project):
    done = run_script(project / "train.py", cwd=project, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    (state,) = project.glob("runs/*/trainer_state.json")
    history = json.loads(state.read_text())["log_history"]
    rewards = [logs["env/reward"] for logs in history if "env/reward" in logs]
    assert rewards[-1] > rewards[0] + 0.3
    assert rewards[-1] > 0.8


@every_template()
def test_what_is_made_is_clean(project):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "B,C4,E4,E7,E9,F,I,N,RUF,SIM,UP,W", "."],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout
    for path in project.glob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text()))
    readme = (project / "README.md").read_text()
    files = [path for path in project.iterdir() if path.is_file()]
    assert all(f"`{path.name}`" in readme for path in files if path.name != "README.md")
    assert len(readme.splitlines()) <= 12
    assert not [path for path in files if "PROJECT_" in path.read_text()]


@pytest.mark.slow
@every_template()
def test_the_types_of_what_is_made_are_right(project):
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(project / ".mypy"), "."]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("phone_book", "PhoneBookEnvironment"),
        ("my-task 2", "MyTask2Environment"),
        ("2048", None),
        ("42nd street", "NdStreetEnvironment"),
        ("games/none", "NoneEnvironment"),
        ("übung", "ÜbungEnvironment"),
        ("web.Environment", "WebEnvironment"),
        ("!!!", None),
        ("_", None),
    ],
)
def test_any_name_with_letters_becomes_the_name_of_a_class(name, expected):
    if expected is None:
        with pytest.raises(ConfigurationError, match="use a name with letters"):
            class_name(Path(name))
    else:
        assert class_name(Path(name)) == expected
        assert expected.isidentifier()
        assert slug(Path(name)).replace("_", "").isalnum()


def test_a_folder_with_files_is_left_as_it_is(tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.py").write_text("print('mine')\n")
    assert main(["init", str(folder)]) == 1
    assert f"{folder} is there and is not empty" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("train.py", "print('mine')\n")]
    assert main(["init", str(folder / "train.py")]) == 1


def test_an_empty_folder_is_filled_and_what_to_do_next_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b").mkdir()
    assert main(["init", "a b"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("made a b: README.md, environment.py, recipe.yaml, test_environment.py, train.py\n")
    assert "\n  cd 'a b'\n" in said
    assert main(["init", "c", "--template", "agent"]) == 0
    assert '[gateway,openai]"' in capsys.readouterr().out
