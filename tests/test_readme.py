"""What the README and the pages of docs/ tell readers to run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

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


def test_every_snippet_is_run_here():
    assert len(SNIPPETS) == 4


def files_in_tree() -> set[str]:
    """The paths of the package's files that README's tree names."""
    text = (ROOT / "README.md").read_text()
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


def test_an_environment_with_a_tool_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = run_snippet("class PhoneBook", {})["trainer"]
    updates = [logs for logs in trainer.state.log_history if "env/reward" in logs]
    assert trainer.state.global_step == 2
    # The built-in policy knows another tool: its calls of this one may or may not be readable.
    assert sum(logs["env/tool_calls"] + logs["env/malformed_tool_calls"] for logs in updates) > 0
    assert all(logs["env/failed_episodes"] == 0 for logs in updates)


def test_an_environment_that_takes_the_response_runs(tmp_path, monkeypatch):
    """With a model that is at hand, for one update."""
    monkeypatch.chdir(tmp_path)
    changes = {
        '"Qwen/Qwen2.5-0.5B-Instruct"': repr(str(MINI_WIKI_POLICY)),
        'output_dir="runs/guess"': 'output_dir="runs/guess", use_cpu=True, max_steps=1, per_device_train_batch_size=2',
    }
    trainer = run_snippet("class GuessNumber", {}, **changes)["trainer"]
    assert trainer.state.global_step == 1


def test_a_plain_config_with_adapters_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(MINI_WIKI_POLICY)
    rows = Dataset.from_list([{"input_ids": tokenizer(f"Question {i}")["input_ids"]} for i in range(4)])
    names = {
        "tokenizer": tokenizer,
        "policy": AutoModelForCausalLM.from_pretrained(MINI_WIKI_POLICY),
        "reward_model": AutoModelForSequenceClassification.from_pretrained(MINI_WIKI_POLICY, num_labels=1),
        "value_model": AutoModelForSequenceClassification.from_pretrained(MINI_WIKI_POLICY, num_labels=1),
        "rows": rows,
        "eval_rows": rows,
    }
    short = 'output_dir="runs/ppo", max_steps=1, response_length=4, per_device_train_batch_size=4'
    trainer = run_snippet("PPOConfig(", names, **{'output_dir="runs/ppo"': short})["trainer"]
    assert trainer.state.global_step == 1


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
