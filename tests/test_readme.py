"""The README is short, its code runs as it stands, and its tree and that of the docs name the files that there are."""

from __future__ import annotations

import re
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.docs.pages import DOCS, ROOT, mean_sentence_length, snippets
from trl_steppo import StepPOConfig
from trl_steppo.assets import MINI_WIKI_POLICY

README = (ROOT / "README.md").read_text()
SNIPPETS = snippets(ROOT / "README.md")
PACKAGE = ROOT / "trl_steppo"


# -- its form ---------------------------------------------------------------------------------------------------------


def test_it_is_short():
    lines = README.splitlines()
    assert len(lines) <= 200
    assert len(README.split()) <= 1500
    assert mean_sentence_length(README) <= 20
    assert all(len(line) <= 130 or line.startswith(("python3 ", "|")) for line in lines)


def test_code_of_the_readers_own_comes_early():
    assert next(number for number, line in enumerate(README.splitlines(), start=1) if line.startswith("class ")) < 60


def test_its_first_commands_are_these():
    """What everything else refers to, and CI runs: one line each, which does all of the set-up."""
    prefix = "python3 -m venv .venv && . .venv/bin/activate && pip install -q -c constraints.txt -e"
    first, second = re.findall(r"^```bash\n(.*)\n```", README, flags=re.MULTILINE)[:2]
    assert first == f"{prefix} . && accelerate launch examples/hotpotqa_steppo.py"
    assert second == f'{prefix} ".[dev]" && make test'


# -- its code ---------------------------------------------------------------------------------------------------------


def run_snippet(containing: str, names: dict[str, Any], changes: dict[str, str] | None = None) -> dict[str, Any]:
    """Run the one snippet with a text in it, in its own namespace, with some of its text changed."""
    (code,) = (snippet for snippet in SNIPPETS if containing in snippet)
    for old, new in (changes or {}).items():
        assert old in code
        code = code.replace(old, new)
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_every_snippet_is_run_here():
    assert len(SNIPPETS) == 2


def rewards(trainer: Any) -> list[float]:
    return [logs["env/reward"] for logs in trainer.state.log_history if "env/reward" in logs]


def test_the_environment_runs(tmp_path, monkeypatch):
    """One small update of it."""
    monkeypatch.chdir(tmp_path)
    trainer = run_snippet("class Atlas", {}, {"max_steps=15": "max_steps=1", "batch_size=64": "batch_size=8"})[
        "trainer"
    ]
    assert len(rewards(trainer)) == 1
    (logs,) = (logs for logs in trainer.state.log_history if "env/tool_calls" in logs)
    assert logs["env/tool_calls"] > 1.5
    assert logs["env/failed_episodes"] == 0


@pytest.mark.slow
def test_the_environment_learns_as_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, *_, last = rewards(run_snippet("class Atlas", {})["trainer"])
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


# -- trees ------------------------------------------------------------------------------------------------------------


def test_its_tree_names_every_folder():
    (tree,) = re.findall(r"^trl_steppo/ .*?(?=^```)", README, re.MULTILINE | re.DOTALL)
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    named = set(re.findall(r"\b(\w+)/", tree)) - {PACKAGE.name}
    assert named >= folders
    assert all((PACKAGE / name).is_dir() for name in named)
    assert all((PACKAGE / name).is_file() for name in re.findall(r"\w+\.py\b", tree))


def files_in_tree() -> set[str]:
    """The paths of the package's files that the tree of the page on the architecture names."""
    text = (DOCS / "project" / "architecture.md").read_text()
    (tree,) = re.findall(r"^trl_steppo/ .*?(?=^examples/)", text, flags=re.MULTILINE | re.DOTALL)
    files, folder = set(), ""
    for line in tree.splitlines()[1:]:
        if entry := re.match(r"[├└]── (\S+)", line):
            folder = entry[1] if entry[1].endswith("/") else ""
        files |= {folder + name for name in re.findall(r"\b\w+\.py\b", line)}
    return files


def test_the_tree_of_the_docs_names_every_file():
    """Those of folders that it describes as a whole need no line of their own."""
    files = {str(path.relative_to(PACKAGE)) for path in [*PACKAGE.glob("*.py"), *PACKAGE.glob("*/*.py")]}
    folders = {name.rpartition("/")[0] for name in files_in_tree()}
    expected = {name for name in files if name.rpartition("/")[0] in folders and not name.endswith("__init__.py")}
    assert files_in_tree() == expected
