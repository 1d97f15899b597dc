"""`trl-steppo config`, as a shell calls it."""

from __future__ import annotations

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from trl_steppo.cli import main
from trl_steppo.commands.config import CONFIGS


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_config_names_a_file_that_accelerate_reads(path, capsys):
    assert main(["config", path.stem]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    config = load_config_from_file(str(path))
    assert config.num_processes == (1 if "single" in path.stem else 2 if "cpu2" in path.stem else 8)
    if "fsdp2" in path.stem:
        assert config.fsdp_config["fsdp_version"] == 2
    if "zero" in path.stem:
        assert config.deepspeed_config["zero_stage"] == int(path.stem.removeprefix("zero")[0])


def test_config_lists_the_shipped_files(capsys):
    assert main(["config"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert listed == {path.stem for path in CONFIGS.glob("*.yaml")}
    assert main(["config", "zero9"]) == 1
    assert "zero3" in capsys.readouterr().err
