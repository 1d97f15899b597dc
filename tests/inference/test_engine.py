"""Engines: what a sampler is told of the policy's weights."""

from __future__ import annotations

import inspect
import re
from copy import deepcopy
from typing import Any

from tests.trainer.tiny import TOKENIZER, Hash, make_config, make_model, message_rows, same, weights
from trl_steppo import StepPOTrainer
from trl_steppo.inference import Engine, FixedEngine, SamplerEngine
from trl_steppo.inference.local import LocalSampler
from trl_steppo.testing import ScriptedSampler


def test_an_engine_tells_its_sampler_the_version_and_a_fixed_one_does_not():
    for engine_class, versions in ((SamplerEngine, [3, 4]), (FixedEngine, [7, 7])):
        sampler = ScriptedSampler("a", policy_version=7)
        engine = engine_class(sampler)
        assert isinstance(engine, Engine)
        seen = []
        with engine.running(3), engine.sampling():
            seen.append(sampler.policy_version)
            engine.take_weights(4)
            seen.append(sampler.policy_version)
        assert seen == versions


def test_the_example_of_the_protocol_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", inspect.getdoc(Engine) or "", flags=re.DOTALL)
    policy = make_model()
    names: dict[str, Any] = {
        "SamplerEngine": SamplerEngine,
        "LocalSampler": LocalSampler,
        "StepPOTrainer": StepPOTrainer,
        "deepcopy": deepcopy,
        "policy": policy,
        "tokenizer": TOKENIZER,
        "args": make_config(tmp_path, max_steps=2),
        "rows": message_rows(),
        "Game": Hash,
    }
    exec(compile(code, "Engine", "exec"), names)
    before = weights(deepcopy(policy))
    trainer = names["trainer"]
    trainer.train()
    engine = trainer.engine
    assert not same(weights(policy), before)
    assert same(weights(engine.copy), weights(policy))
    assert engine.sampler.policy_version == 2
    assert [logs["rollout/staleness"] for logs in trainer.state.log_history if "rollout/staleness" in logs] == [0, 0]
