"""What the README and the pages of docs/ tell readers to run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainer.tiny import Hash, make_config, message_rows
from trl_steppo import StepPOConfig, StepPOTrainer
from trl_steppo.assets import MINI_WIKI_POLICY
from trl_steppo.cli import main
from trl_steppo.testing import byte_tokenizer, tiny_policy

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def snippets(page: Path) -> list[str]:
    """The Python code of a page, block by block."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


SNIPPETS = snippets(ROOT / "README.md")

COMMANDS = ("hotpotqa", "prepare", "check", "memory", "config", "report", "gateway")


def run_snippet(containing: str, names: dict[str, Any], **changes: str) -> dict[str, Any]:
    """Run the one snippet with a text in it, in its own namespace, with some of its text changed."""
    (code,) = (snippet for snippet in SNIPPETS if containing in snippet)
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    exec(compile(code, "README.md", "exec"), names)
    return names


def prose(text: str) -> str:
    """A page's sentences: no code, tables, headings, pictures; links as their text."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^(\||#).*$|<[^>]*>|!\[.*?\]\(.*?\)", "", text, flags=re.MULTILINE)
    return re.sub(r"\[(.*?)\]\(.*?\)", r"\1", text)


def sentence_lengths(text: str) -> list[int]:
    """Words of each sentence; a paragraph or an item of a list ends one, too."""
    sentences = re.split(r"(?<=[.!?:])\s+(?=[A-Z`*\"(])|\n\s*\n|\n- ", prose(text))
    return [count for sentence in sentences if (count := len(re.findall(r"[\w`]\S*", sentence))) > 1]


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    lines, lengths = text.splitlines(), sentence_lengths(text)
    assert len(lines) <= 200
    assert len(text.split()) <= 1500
    assert sum(lengths) / len(lengths) <= 20
    assert all(len(line) <= 130 or line.startswith(("python3 ", "|")) for line in lines)


def test_the_length_of_sentences_is_measured():
    assert sentence_lengths("# Not this\n\nOne two three. Four\nfive: six `seven`.\n\n| no | no |\n") == [3, 4]


def test_code_of_the_readers_own_comes_early():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert next(number for number, line in enumerate(lines, start=1) if line.startswith("class ")) < 60


def test_every_snippet_is_run_here():
    assert len(SNIPPETS) == 2


def test_the_readmes_tree_names_every_folder():
    (tree,) = re.findall(r"^trl_steppo/ .*?(?=^```)", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    package = ROOT / "trl_steppo"
    folders = {path.name for path in package.iterdir() if (path / "__init__.py").is_file()}
    named = set(re.findall(r"\b(\w+)/", tree)) - {package.name}
    assert named >= folders
    assert all((package / name).is_dir() for name in named)
    assert all((package / name).is_file() for name in re.findall(r"\w+\.py\b", tree))


def files_in_tree() -> set[str]:
    """The paths of the package's files that the tree of the page on the architecture names."""
    text = (ROOT / "docs" / "project" / "architecture.md").read_text()
    (tree,) = re.findall(r"^trl_steppo/ .*?(?=^examples/)", text, flags=re.MULTILINE | re.DOTALL)
    files, folder = set(), ""
    for line in tree.splitlines()[1:]:
        if entry := re.match(r"[├└]── (\S+)", line):
            folder = entry[1] if entry[1].endswith("/") else ""
        files |= {folder + name for name in re.findall(r"\b\w+\.py\b", line)}
    return files


def test_the_tree_names_every_file():
    """Those of folders that it describes as a whole need no line of their own."""
    package = ROOT / "trl_steppo"
    files = {str(path.relative_to(package)) for path in package.glob("*.py")}
    files |= {str(path.relative_to(package)) for path in package.glob("*/*.py")}
    folders = {Path(name).parent for name in files_in_tree()}
    in_folders = {name for name in files if Path(name).parent in folders and Path(name).name != "__init__.py"}
    assert files_in_tree() == in_folders


def first_and_last_reward(trainer: StepPOTrainer) -> tuple[float, float]:
    rewards = [logs["env/reward"] for logs in trainer.state.log_history if "env/reward" in logs]
    return rewards[0], rewards[-1]


def test_the_environment_runs(tmp_path, monkeypatch):
    """One small update of it."""
    monkeypatch.chdir(tmp_path)
    short = {
        "max_steps=15": "max_steps=1",
        "batch_size=64": "batch_size=8",
        "num_mini_batches=4": "num_mini_batches=2",
    }
    trainer = run_snippet("class Atlas", {}, **short)["trainer"]
    (logs,) = (logs for logs in trainer.state.log_history if "env/reward" in logs)
    assert logs["env/tool_calls"] > 1.5
    assert logs["env/failed_episodes"] == 0


@pytest.mark.slow
def test_the_environment_learns_as_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, last = first_and_last_reward(run_snippet("class Atlas", {})["trainer"])
    assert first < 0.2
    assert last > 0.8


def test_an_agent_of_ones_own_runs(tmp_path):
    pytest.importorskip("openai")

    async def my_agent(client: Any, question: str) -> str:
        messages = [{"role": "user", "content": question}]
        completion = await client.chat.completions.create(model="policy", messages=messages)
        return completion.choices[0].message.content

    names = {
        "my_agent": my_agent,
        "tokenizer": AutoTokenizer.from_pretrained(MINI_WIKI_POLICY),
        "model": AutoModelForCausalLM.from_pretrained(MINI_WIKI_POLICY),
        "rows": Dataset.from_list([{"prompt": "?", "question": f"Who is {name}?", "answer": name} for name in "abcd"]),
        "config": StepPOConfig(
            output_dir=str(tmp_path), use_cpu=True, max_steps=1, per_device_train_batch_size=4, response_length=8
        ),
    }
    trainer = run_snippet("agent=agent", names)["trainer"]
    trainer.train()
    (failed,) = (logs["env/failed_episodes"] for logs in trainer.state.log_history if "env/failed_episodes" in logs)
    assert failed == 0


def test_the_tests_of_the_page_about_testing_pass():
    """Its snippets are one file."""
    names: dict[str, Any] = {}
    exec(compile("\n".join(snippets(ROOT / "docs" / "guides" / "testing.md")), "testing.md", "exec"), names)
    tests = [function for name, function in names.items() if name.startswith("test_")]
    assert len(tests) == 4
    for test in tests:
        test()


def test_the_engine_of_the_page_about_engines_trains(tmp_path):
    """It samples from the policy's own weights, so that its log-probabilities are the trainer's."""
    names: dict[str, Any] = {}
    (code,) = snippets(ROOT / "docs" / "guides" / "engines.md")
    exec(compile(code, "engines.md", "exec"), names)
    policy = tiny_policy()
    trainer = StepPOTrainer(
        make_config(tmp_path, max_steps=2, top_p=0.9, top_k=100, rollout_correction="truncate", learning_rate=1e-2),
        processing_class=byte_tokenizer(),
        model=policy,
        train_dataset=message_rows(),
        eval_dataset=message_rows(2),
        environment_factory=Hash,
        engine=names["PlainEngine"](policy),
    )
    trainer.train()
    updates = [logs for logs in trainer.state.log_history if "rollout/mismatch_kl" in logs]
    assert len(updates) == 2
    for logs in updates:
        assert logs["rollout/mismatch_kl"] == pytest.approx(0.0, abs=1e-6)
        assert logs["rollout/staleness"] == 0
        assert logs["env/failed_episodes"] == 0
    assert trainer.evaluate()["eval_failed_episodes"] == 0


def commands(page: Path, program: str) -> list[list[str]]:
    """The words of each command of a page's shell blocks that begins with a program's name."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(program)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_flags_of_the_command_exist(page, capsys):
    for words in commands(page, "trl-steppo "):
        subcommand = [word for word in words[1:3] if word in COMMANDS]
        with pytest.raises(SystemExit):
            main([*subcommand, "--help"])
        known = set(re.findall(r"--[a-z0-9_]+", capsys.readouterr().out))
        assert {word for word in words if word.startswith("--")} <= known, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_commands_name_exist(page):
    text = re.sub(r"--json \S+", "", page.read_text())  # what they will write
    for path in re.findall(r"(?<![\w/])(?:examples|benchmarks)/(?!test_)[\w./-]+\.(?:py|yaml|json)\b", text):
        assert (ROOT / path).is_file(), path


def test_links_lead_to_files():
    """Or to pages that the site is to have: `make docs` refuses those that are not there."""
    planned = re.findall(r"\S+\.md$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    pages = {ROOT.resolve() / "docs" / page for page in planned}
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            path = (page.parent / target).resolve()
            assert path.exists() or path in pages, target
