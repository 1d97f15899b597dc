"""The command line of a training script: settings as flags, recipes by name, and a help that fits on two screens."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, cast

from transformers import TrainingArguments
from trl import TrlParser

from ..compat.argparse import groups_of
from ..recipes import find_recipe
from .config_checks import SupersededSettingError, mark_of_recipe, say_superseded
from .grpo_settings import explain_unknown
from .setting_groups import MEANINGS, SETTING_GROUPS
from .steppo_config import StepPOConfig

if TYPE_CHECKING:
    from ..compat.transformers import DataClass, DataClassType

__all__ = ["StepPOParser"]

_WIDTH = 120  # of the help where nothing says how wide the terminal is
_FLAG_WIDTH = 31  # of the column of flags
_TITLES_OF_ARGPARSE = ("options", "optional arguments", "positional arguments")
_LENGTHS = ("max_steps", "total_episodes")  # either says how long to train, in the place of `num_train_epochs`
_NOT_GIVEN = object()
_OF_TRANSFORMERS = {field.name for field in fields(TrainingArguments)}


class StepPOParser(TrlParser):
    """
    The parser of a training script. Each field of its dataclasses is a flag, and `--config` reads flags from a recipe.

    It is TRL's parser with these differences:

    - `--config` takes the name of a recipe that comes with the package, or the path of a YAML file.
    - A setting of the recipe steps aside where a flag makes it void: those of a critic with
      `--advantage_estimator grpo`, `total_episodes` with `--max_steps`. A line on the terminal names it.
    - `--help` shows the settings of the script and of this package in groups, one line each. `--help_all` shows all
      settings, with all that is said of them.
    - An unknown flag or setting is an error that names similar ones, and the counterparts of settings of `GRPOConfig`.
    - A setting that the dataclasses refuse is one line, without a traceback.

    Args:
        dataclass_types (`type` or `Iterable[type]`):
            The dataclasses, e.g. `(ScriptArguments, StepPOConfig)`.
        default_config (`str` or `Path`, *optional*):
            The recipe that is read where `--config` is not given.
        prog (`str`, *optional*), description (`str`, *optional*), epilog (`str`, *optional*):
            Name of the program, and text before and after the flags, as in `argparse.ArgumentParser`.

    Example:
    ```python
    >>> from trl_steppo import StepPOConfig, StepPOParser

    >>> parser = StepPOParser(StepPOConfig, default_config="rooms")
    >>> (args,) = parser.parse_args_and_config(["--learning_rate", "1e-4"])
    >>> args.output_dir, args.learning_rate
    ('runs/rooms', 0.0001)
    ```
    """

    def __init__(
        self,
        dataclass_types: type | Iterable[type],
        *,
        default_config: str | Path | None = None,
        prog: str | None = None,
        description: str | None = None,
        epilog: str | None = None,
    ) -> None:
        types = [dataclass_types] if isinstance(dataclass_types, type) else list(dataclass_types)
        of_transformers = cast("list[DataClassType]", types)  # its name for classes that are dataclasses
        super().__init__(of_transformers, prog=prog, description=description, epilog=epilog)
        self.default_config = default_config
        self._flags: list[str] = []
        self._recipe: dict[str, object] = {}
        self._given: set[str] = set()  # names of the settings that the command line gives
        self._superseded: dict[str, object] = {}  # settings of the recipe that step aside, and their defaults
        self.add_argument("--help_all", action=_HelpAll, help="Show every flag.")

    # -- parsing ------------------------------------------------------------------------------------------------------

    def parse_args_and_config(
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[DataClass, ...]:
        """
        Parse the command line and the recipe that it names. Flags take precedence over the recipe's settings.

        Args:
            args (`Iterable[str]`, *optional*):
                The command line. `None`: that of the process.
            return_remaining_strings (`bool`, *optional*, defaults to `False`):
                Whether to return unknown flags and settings, instead of refusing them.
            fail_with_unknown_args (`bool`, *optional*, defaults to `True`):
                Whether an unknown setting of the recipe is an error.
            separate_remaining_strings (`bool`, *optional*, defaults to `False`):
                Whether to return those of the recipe and those of the command line as two lists.

        Returns:
            `tuple`: An instance of each dataclass; then, if asked for, what remains.

        Raises:
            SystemExit: If the command line or the recipe is wrong. The reason is on stderr.
        """
        self._recipe, self._given, self._superseded = {}, set(), {}
        try:
            config, self._flags = self._split(sys.argv[1:] if args is None else args)
        except ValueError as error:  # there is no such recipe
            self.error(str(error))
        while True:
            try:
                # Both lists, so that unknown names are explained together.
                *parsed, of_recipe, of_line = super().parse_args_and_config(
                    [*config, *self._flags], return_remaining_strings=True, separate_remaining_strings=True
                )
                break
            except SupersededSettingError as error:
                if not self._step_aside(error.names, error.reason):
                    self.error(str(error))
            except ValueError as error:  # what dataclasses and transformers raise about a value
                self.error(str(error))
        for one in parsed:
            if isinstance(one, StepPOConfig):
                mark_of_recipe(one, self._recipe.keys() - self._given - self._superseded.keys())
        if return_remaining_strings:
            return (*parsed, of_recipe, of_line) if separate_remaining_strings else (*parsed, of_recipe + of_line)
        unknown = [*(of_recipe if fail_with_unknown_args else []), *of_line]
        if unknown:
            self.error(self._explain(unknown))
        return tuple(parsed)

    def set_defaults_with_config(self, **recipe: object) -> list[str]:
        """Take the settings of a recipe as defaults, without those that step aside; return unknown ones as flags."""
        remaining: list[str] = super().set_defaults_with_config(**recipe)
        self._recipe = recipe
        self._given = self._names_of_flags()
        if "num_train_epochs" in self._given and not self._given & {*_LENGTHS}:  # which would take precedence
            self._step_aside(_LENGTHS, "`num_train_epochs`")
        super().set_defaults_with_config(**self._superseded)
        return remaining

    def _names_of_flags(self) -> set[str]:
        """Names of the settings that the command line gives."""
        names = [
            action.dest for _, actions in groups_of(self) for action in actions if action.dest != argparse.SUPPRESS
        ]
        found, _ = self.parse_known_args(self._flags, argparse.Namespace(**dict.fromkeys(names, _NOT_GIVEN)))
        return {name for name, value in vars(found).items() if value is not _NOT_GIVEN}

    def _step_aside(self, names: Iterable[str], reason: str) -> bool:
        """Leave out settings that only the recipe has, for a reason that names a flag; whether there are any."""
        fields_of = {field.name: field for kind in self.dataclass_types for field in fields(kind)}
        void = [
            name
            for name in names
            if name in self._recipe.keys() - self._given - self._superseded.keys()
            and self._recipe[name] != fields_of[name].default
        ]
        if not void or not any(f"`{name}`" in reason for name in self._given):
            return False
        self._superseded |= {name: fields_of[name].default for name in void}
        say_superseded(void, reason)
        return True

    def _split(self, given: Iterable[str]) -> tuple[list[str], list[str]]:
        """`--config` with the path of the recipe, or of the default one; and all other arguments."""
        rest: list[str] = []
        recipe: str | Path | None = self.default_config
        arguments = iter(given)
        for argument in arguments:
            name, is_joined, value = argument.partition("=")
            if name != "--config":
                rest.append(argument)
            elif (value if is_joined else (value := next(arguments, ""))) == "":
                self.error("`--config` needs the name of a recipe, or the path of a YAML file")
            else:
                recipe = value
        return [] if recipe is None else ["--config", str(find_recipe(recipe))], rest

    def _explain(self, unknown: Sequence[str]) -> str:
        """What to write instead of unknown flags, one a line."""
        names = [part.partition("=")[0].lstrip("-").replace("-", "_") for part in unknown if part.startswith("--")]
        known = [field.name for kind in self.dataclass_types for field in fields(kind) if field.init]
        stray = [part for part in unknown if not part.startswith("-")]
        if not names:
            return f"these arguments belong to no flag: {' '.join(stray)}"
        return "these flags are not known:\n" + explain_unknown(dict.fromkeys(names), known)

    def error(self, message: str) -> NoReturn:
        """Print the reason on stderr, and end the process with exit code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n({self.prog} --help shows the flags)\n")

    # -- the help -----------------------------------------------------------------------------------------------------

    def format_usage(self) -> str:
        """The usage, without the flags."""
        return f"usage: {self.prog} [--config RECIPE] [--FLAG VALUE ...]\n"

    def format_help(self) -> str:
        """The flags of the script and of this package, in groups."""
        return self._format(everything=False)

    def format_full_help(self) -> str:
        """Every flag, in groups."""
        return self._format(everything=True)

    def _format(self, *, everything: bool) -> str:
        width = min(shutil.get_terminal_size((_WIDTH, 24)).columns, _WIDTH)
        parts = [self.format_usage()]
        if self.description:
            parts.append(textwrap.fill(self.description, width) + "\n")
        config = "A recipe: its name (`trl-steppo recipes` lists them), or the path of a YAML file."
        default = "" if self.default_config is None else f" [{Path(self.default_config).name.removesuffix('.yaml')}]"
        shown = [_line("--config", config + default, width)]
        if self._has_settings:
            shown.append(_line("--help_all", "Every flag, with all that is said of it, and transformers' own.", width))
        parts.append("\n".join(shown) + "\n")
        for title, actions in self._sections(everything=everything):
            lines = (_line_of(action, width, is_whole=everything) for action in actions)
            parts.append("\n".join([title, *lines]) + "\n")
        parts.append("Flags that are on or off take true or false, and alone mean true. [default]\n")
        return "\n".join([*parts, *([self.epilog, ""] if self.epilog else [])])

    def _sections(self, *, everything: bool) -> list[tuple[str, list[argparse.Action]]]:
        """The groups of the help, and their flags: the script's own first."""
        titles: dict[str, str] = {}
        flags: dict[str, argparse.Action] = {}
        for title, actions in groups_of(self):
            for action in actions:  # `--no_FIELD` follows `--FIELD` and is left out
                if action.dest not in (argparse.SUPPRESS, "help"):
                    titles.setdefault(action.dest, title or "Script")
                    flags.setdefault(action.dest, action)
        in_groups = {name for group in SETTING_GROUPS for name in group.fields}
        of_settings = in_groups | _OF_TRANSFORMERS if self._has_settings else set()
        sections: dict[str, list[argparse.Action]] = {}
        for name, action in flags.items():
            if name not in of_settings:
                title = "Script" if titles[name] in _TITLES_OF_ARGPARSE else titles[name]
                sections.setdefault(title, []).append(action)
        if self._has_settings:
            for group in SETTING_GROUPS:
                if group.is_shown or everything:
                    sections[group.title] = [flags[name] for name in group.fields if name in flags]
            if everything:
                others = (name for name in flags if name in _OF_TRANSFORMERS - in_groups)
                sections["Of transformers' TrainingArguments"] = [flags[name] for name in others]
        return [(title, actions) for title, actions in sections.items() if actions]

    @property
    def _has_settings(self) -> bool:
        """Whether the settings of a run are among the flags."""
        return any(issubclass(kind, TrainingArguments) for kind in self.dataclass_types)


class _HelpAll(argparse.Action):
    """Prints every flag, and ends the process."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        assert isinstance(parser, StepPOParser)
        print(parser.format_full_help(), end="")
        parser.exit()


def _line_of(action: argparse.Action, width: int, *, is_whole: bool) -> str:
    """A flag, what it means or the first sentence of that, its choices, and its default."""
    flag = action.option_strings[0] if action.option_strings else action.dest
    text = " ".join(((action.help or "") % {"prog": "", "default": action.default}).split())
    text = MEANINGS.get(action.dest, text if is_whole else _first_sentence(text))
    if action.choices is not None and action.dest not in MEANINGS and not _names_all(text, action.choices):
        text += f" {{{', '.join(map(str, action.choices))}}}"
    is_narrow = width < _WIDTH and not is_whole  # a line a flag, so that the help stays short
    end = ""
    if action.required:
        end = " [required]"
    elif action.default is not None and action.default != argparse.SUPPRESS and action.default != []:
        default = getattr(action.default, "value", action.default)  # of an enumeration
        end = f" [{textwrap.shorten(str(default), 20 if is_narrow else 40, placeholder=' ...')}]"
    if is_narrow:
        text = textwrap.shorten(text, max(width - _FLAG_WIDTH - 2 - len(end), 20), placeholder=" ...")
    return _line(flag, text + end, width)


def _line(flag: str, text: str, width: int) -> str:
    """A flag and what it means; on further lines where this is too long."""
    indent = " " * (_FLAG_WIDTH + 2)
    head = f"  {flag}".ljust(_FLAG_WIDTH + 1) + " "
    return textwrap.fill(text, width, initial_indent=head, subsequent_indent=indent) or head.rstrip()


def _first_sentence(text: str) -> str:
    """The text up to the end of its first sentence."""
    sentence, end, _ = text.partition(". ")
    return sentence + ("." if end else "")


def _names_all(text: str, choices: Iterable[object]) -> bool:
    return all(str(choice) in text for choice in choices)
