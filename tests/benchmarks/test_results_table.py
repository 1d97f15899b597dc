"""The table of benchmarks names every program, and says of each kept result how, when and where it was measured."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAMS = sorted(path.name for path in BENCHMARKS.glob("*.py"))
RESULTS = sorted(path.stem for path in (BENCHMARKS / "results").glob("*.json"))


def rows():
    lines = (BENCHMARKS / "README.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {cells[0].strip("`"): cells[1:] for cells in table}


def test_every_program_has_a_row():
    assert sorted(rows()) == PROGRAMS


@pytest.mark.parametrize("name", [name for name in RESULTS if f"{name}.py" in PROGRAMS])
def test_a_row_says_what_its_result_says(name):
    _, command, date, commit, machine = rows()[f"{name}.py"]
    record = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())
    assert command == f"`{record['command']}`"
    assert date == record["date"][:10]
    assert machine == f"{record['machine']['cpus']} CPU cores"
    if "commit" in record:
        measured, plus, changes = record["commit"].partition("+")
        assert commit == f"{measured[:7]}{plus}{changes}"
    else:  # a note says which
        assert all(part in record["note"] for part in commit.split(", "))
