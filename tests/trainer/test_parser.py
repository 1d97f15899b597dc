"""The parser of training scripts: recipes by name, a help in groups, errors that name what is meant."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import pytest
from transformers import HfArgumentParser, TrainingArguments
from trl import TrlParser

from trl_steppo import PPOConfig, StepPOConfig, StepPOParser
from trl_steppo.environments.hotpotqa import HotpotQARecipe
from trl_steppo.errors import ConfigurationError
from trl_steppo.trainer import terminal
from trl_steppo.trainer.setting_groups import MEANINGS, SETTING_GROUPS, group_of

OF_TRANSFORMERS = {f.name for f in fields(TrainingArguments)}


@dataclass
class ScriptArguments:
    game: str = field(default="chess", metadata={"help": "What is played. At 100%% of the time."})
    num_players: int = field(default=2, metadata={"help": "How many play."})


@dataclass
class MyConfig(StepPOConfig):
    bonus: float = field(default=0.5, metadata={"help": "A setting of a subclass."})


def refusal(capsys, *arguments: str, kinds=(ScriptArguments, StepPOConfig)) -> str:
    with pytest.raises(SystemExit) as raised:
        StepPOParser(kinds, prog="play.py").parse_args_and_config(list(arguments))
    assert raised.value.code == 2
    return capsys.readouterr().err


def test_every_setting_of_this_package_is_in_one_group():
    in_groups = [name for group in SETTING_GROUPS for name in group.fields]
    assert len(in_groups) == len(set(in_groups))
    settings = {f.name: f for f in fields(StepPOConfig) if f.init}
    own = {name for name in settings if name not in OF_TRANSFORMERS}
    assert own <= set(in_groups) <= settings.keys()
    redefined = {name for name in in_groups if name in OF_TRANSFORMERS} - MEANINGS.keys()
    described = {name: settings[name].metadata.get("help") for name in redefined}
    of_transformers = {f.name: f.metadata.get("help") for f in fields(TrainingArguments)}
    assert not {name for name, text in described.items() if text == of_transformers[name]}
    gamma = group_of("gamma")
    assert gamma is not None
    assert gamma.title == "Algorithm"
    assert group_of("adam_beta1") is None


@pytest.mark.parametrize("given", [["--config", "rooms"], ["--config=rooms"], []])
def test_recipes_are_found_by_name_and_flags_take_precedence(given):
    parser = StepPOParser((ScriptArguments, StepPOConfig), default_config=None if given else "rooms")
    script, args = parser.parse_args_and_config([*given, "--num_players", "3", "--seed=7"])
    assert (script, args.output_dir, args.seed) == (ScriptArguments("chess", 3), "runs/rooms", 7)


def test_one_dataclass_is_enough_and_what_remains_can_be_had(tmp_path):
    (args,) = StepPOParser(PPOConfig).parse_args_and_config(["--output_dir", str(tmp_path)])
    assert type(args) is PPOConfig
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("game: go\nspeed: 3\n")
    given = ["--config", str(recipe), "--sound", "on"]
    script, rest = StepPOParser(ScriptArguments).parse_args_and_config(given, return_remaining_strings=True)
    assert (script.game, rest) == ("go", ["--speed", "3", "--sound", "on"])
    separate = {"return_remaining_strings": True, "separate_remaining_strings": True}
    assert StepPOParser(ScriptArguments).parse_args_and_config(given, **separate)[1:] == (
        ["--speed", "3"],
        ["--sound", "on"],
    )


RECIPE = """
output_dir: runs/x
total_episodes: 64
critic_learning_rate: 0.1
vf_coef: 1.0
lam: 0.9
gamma: 0.9
num_generations: 2
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    monkeypatch.setattr(terminal, "is_quiet", lambda: False)
    return path


@pytest.mark.parametrize(
    ("flags", "left_out", "found"),
    [
        ("--max_steps 2", "total_episodes", {"max_steps": 2, "total_episodes": None}),
        ("--num_train_epochs 2", "total_episodes", {"num_train_epochs": 2, "total_episodes": None}),
        ("--max_steps -1", "", {"max_steps": -1, "total_episodes": 64}),
        (
            "--advantage_estimator rloo",
            "critic_learning_rate, vf_coef, lam",
            {"critic_learning_rate": None, "vf_coef": 0.1, "lam": 1.0},
        ),
    ],
)
def test_what_a_flag_makes_void_in_a_recipe_steps_aside(flags, left_out, found, recipe, capsys):
    (args,) = StepPOParser(StepPOConfig, default_config=recipe).parse_args_and_config(flags.split())
    assert {name: getattr(args, name) for name in found} == found
    output = capsys.readouterr().out
    assert output.startswith(f"Left out of the recipe: {left_out} (no effect with `") if left_out else not output


def test_what_a_user_sets_does_not_step_aside(recipe, capsys):
    given = ["--config", str(recipe), "--advantage_estimator", "rloo", "--vf_coef", "2"]
    assert "error: `vf_coef`=2.0 has no effect together with" in refusal(capsys, *given, kinds=StepPOConfig)
    recipe.write_text(RECIPE + "advantage_estimator: rloo\n")  # a recipe that contradicts itself
    assert "`critic_learning_rate`=0.1, " in refusal(
        capsys, "--config", str(recipe), "--seed", "3", kinds=StepPOConfig
    )


def test_a_function_without_a_critic_leaves_out_the_critic_of_a_recipe(recipe, capsys):
    def to_the_end(rewards, step_mask, *, gamma):
        return rewards.flip(1).cumsum(1).flip(1) * step_mask

    (args,) = StepPOParser(StepPOConfig, default_config=recipe).parse_args_and_config([])
    found = args.with_estimator(to_the_end)
    assert (found.vf_coef, found.lam, args.vf_coef) == (0.1, 1.0, 1.0)
    assert "Left out of the recipe: critic_learning_rate, vf_coef, lam (no eff" in capsys.readouterr().out
    (args,) = StepPOParser(StepPOConfig, default_config=recipe).parse_args_and_config(["--vf_coef", "1"])
    with pytest.raises(ConfigurationError, match=r"^`vf_coef`=1\.0 has no effect"):
        args.with_estimator(to_the_end)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lerning_rate", "1", "--beta=0.1"], "`lerning_rate`: did you mean `learning_rate`?\n- `beta` (of GRPOCo"),
        (["--learning_rate", "fast"], "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        (["--lam", "3"], "`lam` is 3.0; set it to a number in [0, 1]"),
        (["--eval_strategy", "sometimes"], "invalid choice: 'sometimes'"),
        (["--config", "roms"], "did you mean `rooms`?"),
        (["--config"], "`--config` needs the name of a recipe"),
        (["--config="], "`--config` needs the name of a recipe"),
        (["chess"], "these arguments belong to no flag: chess"),
    ],
)
def test_what_is_wrong_is_said_without_the_usage(arguments, said, capsys):
    error = refusal(capsys, *arguments)
    assert said in error
    assert error.startswith("play.py: error: ")
    assert len(error.splitlines()) <= 4
    assert error.endswith("(play.py --help shows the flags)\n")


def test_an_unknown_setting_of_a_recipe_is_told_with_one_that_is_like_it(tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("num_player: 3\n")
    assert "- `num_player`: did you mean `num_players`?" in refusal(capsys, "--config", str(recipe))


def test_the_help_stays_short_on_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = StepPOParser(StepPOConfig).format_help().splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 80
    assert "  --lam                          Lambda of GAE. [1.0]" in lines


def test_the_help_shows_what_is_ours_in_groups_and_each_flag_once(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    parser = StepPOParser((HotpotQARecipe, MyConfig), default_config="mini_wiki")
    lines = parser.format_help().splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120
    shown = [line.split()[0] for line in lines if line.startswith("  --")]
    assert len(shown) == len(set(shown))
    hidden = {name for group in SETTING_GROUPS if not group.is_shown for name in group.fields}
    own = {f.name for f in fields(HotpotQARecipe)} | {f.name for f in fields(MyConfig)} - OF_TRANSFORMERS - hidden
    assert {f"--{name}" for name in own} <= set(shown)
    titles = [line for line in lines if line and not line.startswith((" ", "usage", "Flags"))]
    assert titles == ["Script", *(group.title for group in SETTING_GROUPS if group.is_shown)]
    assert lines.index("  --bonus                        A setting of a subclass. [0.5]") < lines.index("Algorithm")
    assert not {"--adam_beta1", "--world_size", "--no_prefix_sharing", "--loss-aggregation"} & set(shown)


def test_the_whole_help_has_every_field(capsys):
    parser = StepPOParser((ScriptArguments, StepPOConfig))
    parser.add_argument("--extra", help="Not of a dataclass.")
    parser.add_argument_group("Of a group").add_argument("--more")
    with pytest.raises(SystemExit) as raised:
        parser.parse_args_and_config(["--help_all"])
    assert raised.value.code == 0
    shown = capsys.readouterr().out
    flags = {line.split()[0] for line in shown.splitlines() if line.startswith("  --")}
    assert {f"--{f.name}" for f in fields(StepPOConfig) if f.init} <= flags
    assert {"--extra", "--more", "--game"} <= flags
    assert "\nOf a group\n  --more" in shown
    assert "What is played. At 100% of the time. [chess]" in shown
    assert "What is played. [chess]" in parser.format_help()


def test_other_parsers_take_the_same_classes(tmp_path):
    given = ["--output_dir", str(tmp_path), "--lam", "0.5", "--no_prefix_sharing", "--use-cpu"]
    for parser in (TrlParser, HfArgumentParser, StepPOParser):
        _, args = parser((ScriptArguments, StepPOConfig)).parse_args_into_dataclasses(given)
        assert (args.lam, args.prefix_sharing, args.use_cpu) == (0.5, False, True)
