"""`trl-steppo init`: a folder to begin a project with, which trains as it is made."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
from pathlib import Path

from ..errors import ConfigurationError
from ..extras import install_command

HELP = "make a folder with an environment, its test, a training script and a recipe"
EXAMPLES = """\
  trl-steppo init phone_book
  trl-steppo init games/maze --template step
  trl-steppo init my_agent --template agent
"""

TEMPLATES = {
    "tools": "an environment with tools",
    "step": "an environment with `step(response)`",
    "agent": "an agent that speaks to the OpenAI API",
}
"""What a project begins with."""

_PROJECT = Path(__file__).parent / "project"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("name", metavar="NAME", help="the folder to make; it must not exist, or be empty")
    parser.add_argument(
        "--template",
        choices=list(TEMPLATES),
        default="tools",
        help="; ".join(f"{name}: {what}" for name, what in TEMPLATES.items()) + " (tools)",
    )


def run(args: argparse.Namespace) -> None:
    """Make the folder, and print what is in it and what to do next."""
    folder = Path(args.name)
    files = make_project(folder, template=args.template)
    print(f"made {folder}: {', '.join(files)}\n")
    print("It trains as it is, on a CPU, in about a minute:\n")
    steps = {
        f"cd {shlex.quote(str(folder))}": "",
        "python -m pytest": "needs `pip install pytest`",
        "python train.py": "",
    }
    if args.template == "agent":
        steps = {install_command("gateway,openai"): "the gateway, and the agent's client", **steps}
    for command, note in steps.items():
        print(f"  {command.ljust(20)}{f'  # {note}' if note else ''}".rstrip())
    print("\nThen change one file at a time; README.md says what each one is.")


def make_project(folder: Path, *, template: str = "tools") -> list[str]:
    """
    Make the folder of a project.

    Args:
        folder (`Path`):
            Where it is made. Its name becomes the name of the project and of the environment's class.
        template (`str`, *optional*, defaults to `"tools"`):
            One of `TEMPLATES`.

    Returns:
        `list[str]`: The names of its files.

    Raises:
        ConfigurationError: If there are files in the folder, or its name has no letter.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"{folder} is there and is not empty; choose another name")
    words = {"PROJECT_CLASS": class_name(folder), "PROJECT_NAME": folder.resolve().name, "PROJECT_SLUG": slug(folder)}
    source = _PROJECT / template
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        names = []
        for path in sorted(source.iterdir()):
            text = re.sub("|".join(words), lambda found: words[found[0]], path.read_text(encoding="utf-8"))
            names.append(path.name.removesuffix(".txt"))  # which keeps linters and importers away
            (folder / names[-1]).write_text(text, encoding="utf-8")
    except OSError:
        if not existed:  # a full disk leaves no half of a project
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return names


def class_name(folder: Path) -> str:
    """A name for a class: "my-task 2" becomes `MyTask2Environment`."""
    letters = "".join(f"{part} " for part in re.findall(r"[^\W_]+", folder.resolve().name)).lstrip("0123456789 ")
    name = "".join(part[0].upper() + part[1:] for part in letters.split())
    if not name.isidentifier():
        raise ConfigurationError(f"{str(folder)!r} cannot become the name of a class; use a name with letters")
    return name if name.endswith("Environment") else f"{name}Environment"


def slug(folder: Path) -> str:
    """A name for directories, without white space and special characters."""
    return "_".join(re.findall(r"[^\W_]+", folder.resolve().name)).lower()
