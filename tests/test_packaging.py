"""What an editable installation leaves for those who look for the package without running Python: type checkers."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_an_editable_installation_is_a_path_and_no_import_hook(tmp_path):
    source, built = tmp_path / "source", tmp_path / "built"
    (source / "trl_steppo").mkdir(parents=True)
    built.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "trl_steppo/__init__.py", "trl_steppo/py.typed"):
        shutil.copy(ROOT / name, source / name)
    build = f"from setuptools.build_meta import build_editable; build_editable({str(built)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        top = [name for name in files.namelist() if "/" not in name]
        assert len(top) == 1
        assert top[0].endswith(".pth")
        assert os.path.samefile(files.read(top[0]).decode().strip(), source)
