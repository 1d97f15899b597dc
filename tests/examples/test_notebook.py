"""The notebook in examples/, and the table that a run shows in one."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pytest
import transformers
from nbclient import NotebookClient
from transformers import PrinterCallback
from transformers.utils import notebook as of_transformers

from tests.conftest import ROOT
from tests.trainer.tiny import make_trainer, prompt_rows
from trl_steppo.trainer.notebook import StepPONotebookCallback

NOTEBOOK = ROOT / "examples" / "notebook.ipynb"


class Cells(HTMLParser):
    """The rows of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._is_in_cell = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._is_in_cell = tag in ("th", "td")
        if tag == "tr":
            self.rows.append([])
        elif self._is_in_cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._is_in_cell = self._is_in_cell and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self._is_in_cell:
            self.rows[-1][-1] += data


def rows(html: str) -> list[list[str]]:
    cells = Cells()
    cells.feed(html)
    return cells.rows


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a notebook displays. transformers takes its callback for notebooks."""
    displayed: list[str] = []

    class Display:
        HTML = staticmethod(str)

        @staticmethod
        def display(html: str, display_id: bool = False) -> Any:
            displayed.append(html)
            return type("Handle", (), {"update": staticmethod(displayed.append)})

    monkeypatch.setattr(of_transformers, "disp", Display)
    monkeypatch.setattr(transformers.trainer, "DEFAULT_PROGRESS_CALLBACK", of_transformers.NotebookProgressCallback)
    return displayed


def test_the_table_of_a_run(tmp_path, shown):
    evaluated = {"eval_dataset": prompt_rows(2), "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    trainer = make_trainer(tmp_path, max_steps=3, disable_tqdm=False, **evaluated)
    trainer.train()
    head, *body = rows(shown[-1])
    assert head == ["Update", "Episodes", "Reward", "Eval reward", "Steps", "Failed", "Entropy", "Seconds"]
    assert [row[0] for row in body] == ["0", "1", "2", "3"]
    history = trainer.state.log_history
    rewards = [logs["env/reward"] for logs in history if "env/reward" in logs]
    of_evaluations = {logs["step"]: logs["eval_reward"] for logs in history if "eval_reward" in logs}
    assert [row[2] for row in body] == ["", *(f"{reward:.3g}" for reward in rewards)]
    assert [row[3] for row in body] == [f"{of_evaluations[n]:.3g}" if n in of_evaluations else "" for n in range(4)]
    assert [row[1] for row in body] == ["", "8", "16", "24"]
    assert "value='3' max='3'" in shown[-1]


def test_without_evaluations_the_table_has_no_column_for_them(tmp_path, shown):
    make_trainer(tmp_path, max_steps=1, disable_tqdm=False).train()
    assert "Eval reward" not in rows(shown[-1])[0]


def test_the_callback_is_chosen_as_transformers_chooses_its_own(tmp_path, shown):
    for disable_tqdm, kind in ((False, StepPONotebookCallback), (True, PrinterCallback)):
        callbacks = make_trainer(tmp_path, disable_tqdm=disable_tqdm).callback_handler.callbacks
        assert [type(callback) for callback in callbacks if isinstance(callback, kind)]
        assert not any(type(callback) is of_transformers.NotebookProgressCallback for callback in callbacks)


def sources() -> list[str]:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


def test_the_notebook_in_short(tmp_path, monkeypatch, capsys):
    """Its code in this process, with two small updates."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    code = "\n".join(sources()).replace("max_steps=15", "max_steps=2, use_cpu=True")
    code = code.replace("per_device_train_batch_size=64", "per_device_train_batch_size=8")
    code = code.replace("rows(wiki.validation))", "rows(wiki.validation)[:2])")
    assert "max_steps=2" in code
    assert "batch_size=8" in code
    exec(compile(code, "notebook", "exec"), {"__name__": "notebook"})
    assert "observed" in capsys.readouterr().out


def test_what_the_notebook_shows_was_learned():
    outputs = json.loads(NOTEBOOK.read_text())
    text = json.dumps(outputs["cells"])
    assert "Eval reward" in text
    assert "image/png" in text
    assert str(ROOT) not in text
    assert "/work/" not in text


@pytest.mark.slow
def test_the_notebook_in_jupyter(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    tables = [
        output["data"]["text/html"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "<progress" in output.get("data", {}).get("text/html", "")
    ]
    head, *body = rows(tables[-1])
    rewards = [float(row[head.index("Reward")]) for row in body if row[head.index("Reward")]]
    assert len(rewards) == 15
    assert sum(rewards[:3]) / 3 < 0.5
    assert sum(rewards[-3:]) / 3 > 0.8
    assert Path(tmp_path / "runs/notebook/metrics.jsonl").is_file()
