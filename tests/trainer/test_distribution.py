"""How a run is distributed, as accelerate or its file says it, and what engines cannot do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from accelerate import DistributedType, FullyShardedDataParallelPlugin

from tests.trainer.tiny import make_config
from trl_steppo.errors import ConfigurationError
from trl_steppo.trainer.distribution import Distribution, check_distribution


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("{}", Distribution("NO")),
        ("distributed_type: MULTI_GPU", Distribution("MULTI_GPU")),
        ("distributed_type: DEEPSPEED", Distribution("DEEPSPEED", zero_stage=2)),  # the launcher's default
        ("{distributed_type: DEEPSPEED, deepspeed_config: {zero_stage: 3}}", Distribution("DEEPSPEED", zero_stage=3)),
        ("{distributed_type: FSDP, fsdp_config: {fsdp_version: 1}}", Distribution("FSDP")),
    ],
)
def test_a_file_says_it(file, expected):
    assert Distribution.from_file(yaml.safe_load(file)) == expected


def test_options_that_a_file_does_not_set_are_the_launchers():
    distribution = Distribution.from_file(
        {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": True}}
    )
    assert distribution.is_fsdp2
    assert distribution.fsdp_options == {
        "reshard_after_forward": True,
        "offload_params": True,
        "activation_checkpointing": False,
        "cpu_ram_efficient_loading": True,
        "ignored_modules": None,
    }


@pytest.mark.parametrize(
    ("plugin", "settings", "given", "words"),
    [
        ({"fsdp_version": 1}, {}, {}, "`fsdp_version: 2`"),
        ({"reshard_after_forward": False}, {}, {}, "`fsdp_reshard_after_forward` is False"),
        ({"cpu_offload": True}, {}, {}, "`fsdp_offload_params` is True.*zero3_offload"),
        ({"activation_checkpointing": True}, {}, {}, "`gradient_checkpointing`"),
        ({"cpu_ram_efficient_loading": True}, {}, {}, "`fsdp_cpu_ram_efficient_loading` is True"),
        ({"ignored_modules": ".*norm"}, {}, {}, "`fsdp_ignored_modules` is '.*norm'"),
        ({}, {}, {"optimizers": (object(), None)}, "`optimizers` is set, and FSDP2"),
        ({}, {"critic_shares_base": True}, {}, "two networks cannot share parameters under FSDP2"),
    ],
)
def test_what_fsdp_cannot_do(tmp_path, monkeypatch, plugin, settings, given, words):
    """With ranks it is no mock: see `test_ranks.py`."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # accelerate writes there
    found = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **plugin})
    accelerator: Any = SimpleNamespace(
        distributed_type=DistributedType.FSDP,
        is_fsdp2=found.fsdp_version == 2,
        state=SimpleNamespace(fsdp_plugin=found),
    )
    distribution = Distribution.from_accelerator(accelerator)
    with pytest.raises(ConfigurationError, match=words):
        check_distribution(make_config(tmp_path, **settings), distribution, given.get("optimizers", (None, None)))


@pytest.mark.parametrize(
    ("stage", "settings", "given", "words"),
    [
        (0, {}, {}, "stage 0 shards nothing"),
        (2, {}, {"optimizers": (object(), None)}, "`optimizers` is set"),
        (3, {"ds3_gather_for_generation": False}, {}, "`ds3_gather_for_generation` is False"),
        (3, {}, {"mismatches": ["- ds gradient_clipping=2 vs hf max_grad_norm=1"]}, "gradient_clipping=2"),
    ],
)
def test_what_deepspeed_cannot_do(tmp_path, stage, settings, given, words):
    """In a process of its own an engine is no mock: see `test_ranks.py`."""
    args = make_config(tmp_path, **settings)
    args.hf_deepspeed_config = SimpleNamespace(mismatches=given.get("mismatches", []))
    accelerator: Any = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED, deepspeed_plugin=SimpleNamespace(zero_stage=stage)
    )
    with pytest.raises(ConfigurationError, match=words):
        check_distribution(args, Distribution.from_accelerator(accelerator), given.get("optimizers", (None, None)))
