"""The command as a whole: its overview, what every subcommand's help says, and what is said of mistakes."""

from __future__ import annotations

import argparse
import io
import subprocess
import sys

import pytest

import trl_steppo
from trl_steppo.cli import COMMANDS, GROUPS, main, make_parser
from trl_steppo.compat.argparse import groups_of
from trl_steppo.extras import EXTRA_OF, install_command


def test_alone_it_prints_the_overview(capsys):
    assert main([]) == 0
    overview = capsys.readouterr().out
    with pytest.raises(SystemExit) as raised:
        main(["--help"])
    assert raised.value.code == 0
    assert capsys.readouterr().out == overview
    for name, command in COMMANDS.items():
        assert f"  {name} " in overview
        assert command.HELP in overview
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(COMMANDS)
    assert max(map(len, overview.splitlines())) <= 100


def test_it_has_a_version(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["--version"])
    assert raised.value.code == 0
    assert capsys.readouterr().out == f"trl-steppo {trl_steppo.__version__}\n"


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (choices,) = (a.choices for _, actions in groups_of(parser) for a in actions if isinstance(a.choices, dict))
    return choices


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_has_words_and_every_command_examples(name):
    parser = subparsers(make_parser())[name]
    shown = [parser, *subparsers(parser).values()] if name == "hotpotqa" else [parser]
    for each in shown:
        assert not [action.dest for _, actions in groups_of(each) for action in actions if not action.help]
    text = parser.format_help()
    examples = text.partition("\nexamples:\n")[2]
    assert f"  trl-steppo {name}" in examples
    assert all(line.startswith("  ") for line in examples.splitlines())


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"try", "show", "compare", "hotpotqa"}))
def test_its_examples_can_be_read(name):
    parser = make_parser()
    for line in COMMANDS[name].EXAMPLES.splitlines():
        words = line.split()
        if words[0] == "trl-steppo":
            assert parser.parse_args(words[1:]).command == name


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("chek", "there is no command 'chek'; did you mean `check`?"),
        ("--verson", "there is no --verson; did you mean `--version`?"),
        ("xyz", "there is no command 'xyz'\n"),
        (
            "check mini_wiki --config-fle a",
            "trl-steppo check: there is no --config_fle; did you mean `--config_file`?",
        ),
        ("memory Qwen3-4B more", "'more' is one argument too many"),
        ("memory", "the following arguments are required: MODEL"),
        ("memory Qwen3-4B --gpus two", "invalid int value: 'two'"),
    ],
)
def test_a_mistake_on_the_command_line_is_named_and_exits_with_2(line, said, capsys):
    with pytest.raises(SystemExit) as raised:
        main(line.split())
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 2
    assert error.rstrip().endswith("--help describes it)")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("check roms", "'roms' is neither a file nor the name of a recipe; did you mean `rooms`?"),
        ("config zero4", "there is no 'zero4'; did you mean `zero3`?"),
        ("hotpotqa", "say what to do: `trl-steppo hotpotqa prepare DIRECTORY`"),
        ("report", "name at least one run's output_dir"),
    ],
)
def test_what_cannot_be_done_is_said_and_exits_with_1(line, said, capsys):
    assert main(line.split()) == 1
    assert said in capsys.readouterr().err


def test_flags_may_be_written_with_hyphens(capsys):
    assert main(["memory", "Qwen3-4B", "--gpus", "2", "--engine", "zero3", "--no-critic", "--lora-rank=8"]) == 0
    with_hyphens = capsys.readouterr().out
    assert main(["memory", "Qwen3-4B", "--gpus", "2", "--engine", "zero3", "--no_critic", "--lora_rank=8"]) == 0
    assert capsys.readouterr().out == with_hyphens


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("matplotlib", "report RUN"),
        ("jinja2", "report RUN"),
        ("starlette", "gateway --model mini_wiki --port 0"),
        ("pydantic", "gateway --model mini_wiki --port 0"),
    ],
)
def test_a_library_that_is_missing_is_one_line_with_its_extra(module, line):
    code = "import sys; sys.modules[sys.argv[1]] = None; from trl_steppo.cli import main; sys.exit(main(sys.argv[2:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, module, *line.split()], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1
    assert module in done.stderr
    assert install_command(EXTRA_OF[module]) in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_reader_that_has_read_enough_ends_the_command_quietly(monkeypatch, capsys):
    def run(args: argparse.Namespace) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(COMMANDS["recipes"], "run", run)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", io.StringIO())  # has no file whose end would be the tests' own
        assert main(["recipes"]) == 1
    assert capsys.readouterr().err == ""
