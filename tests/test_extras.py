"""How extras are installed, by where the package comes from."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest

from trl_steppo import extras
from trl_steppo.extras import EXTRA_OF, install_command, missing_library

ROOT = Path(__file__).parents[1]


def test_every_extra_of_the_table_installs_its_modules():
    text = (ROOT / "pyproject.toml").read_text()
    names = {
        "faiss": "faiss-cpu",
        "sentence_transformers": "sentence-transformers",
        "opentelemetry": "opentelemetry-api",
    }
    for module, extra in EXTRA_OF.items():
        (line,) = (line for line in text.splitlines() if line.startswith(f"{extra} = ["))
        assert f'"{names.get(module, module)}>=' in line


def test_in_a_clone_its_folder_is_installed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert install_command("report") == f'pip install -e "{ROOT}[report]"'
    monkeypatch.chdir(ROOT)
    assert install_command("report") == 'pip install -e ".[report]"'


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        ({"url": "file:///home/me/clone", "dir_info": {}}, 'pip install "trl-steppo[vllm] @ file:///home/me/clone"'),
        (
            {"url": "https://host/a.git", "vcs_info": {"vcs": "git", "commit_id": "1"}},
            'pip install "trl-steppo[vllm] @ git+https://host/a.git"',
        ),
        (None, 'pip install "trl-steppo[vllm]"'),
    ],
)
def test_elsewhere_it_is_installed_from_where_the_package_came_from(origin, command, tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "__file__", str(tmp_path / "site-packages" / "trl_steppo" / "extras.py"))
    written = None if origin is None else json.dumps(origin)
    monkeypatch.setattr(extras, "distribution", lambda name: SimpleNamespace(read_text=lambda file: written))
    assert install_command("vllm") == command


def test_without_metadata_the_index_is_named(tmp_path, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "__file__", str(tmp_path / "lib" / "trl_steppo" / "extras.py"))
    monkeypatch.setattr(extras, "distribution", missing)
    assert install_command("peft") == 'pip install "trl-steppo[peft]"'


def test_only_modules_of_extras_have_a_cure():
    assert missing_library(ModuleNotFoundError("no", name="scipy.stats")) == (
        f"needs `scipy`, which is not installed: {install_command('report')}"
    )
    assert missing_library(ModuleNotFoundError("no", name="trl_steppo.gone")) is None
    assert missing_library(ImportError("no")) is None
