"""What the README shows, and that it is short; tests/docs/ has what it shares with the pages of docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_steppo import StepPOConfig, StepPOTrainer
from trl_steppo.assets import MINI_WIKI_POLICY

ROOT = Path(__file__).parents[1]


def snippets(page: Path) -> list[str]:
    """The Python code of a page, block by block."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


SNIPPETS = snippets(ROOT / "README.md")


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
