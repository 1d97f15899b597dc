"""What is compared with `GRPOTrainer`, and that it is the same work."""

import pytest
import vs_grpo_trainer as benchmark

from trl_steppo.environments.hotpotqa import BM25Retriever
from trl_steppo.environments.hotpotqa.retrieval import Passage


def cost(seconds: float, tokens: float, peak: int) -> benchmark.Cost:
    return benchmark.Cost(
        seconds, cpu_seconds=seconds / 2, sampled_tokens=tokens, responses=5.0, peak_bytes=peak, import_bytes=1
    )


def test_ratios_are_those_of_processes_that_ran_after_each_other():
    costs = {
        benchmark.OURS: [cost(1.0, 100.0, 6), cost(4.0, 100.0, 8)],
        benchmark.THEIRS: [cost(2.0, 100.0, 10), cost(4.0, 80.0, 10)],
    }
    found = benchmark.compare(costs, benchmark.THEIRS)
    assert found["tokens_per_s"] == pytest.approx({"median": 1.625, "min": 1.25, "max": 2.0})
    assert found["tokens_per_cpu_s"] == found["tokens_per_s"]
    assert found["seconds"] == pytest.approx({"median": 0.75, "min": 0.5, "max": 1.0})
    assert found["peak_memory"] == pytest.approx({"median": 0.7, "min": 0.6, "max": 0.8})
    assert found["sampled_tokens"] == pytest.approx(100 / 90)


def test_both_trainers_say_how_much_each_update_sampled():
    ours = [{"perf/sampled_tokens": 640.0, "env/episode_steps": 5.0}, {"train_runtime": 1.0}]
    theirs = [{"completions/mean_length": 10.0, "tools/call_frequency": 4.0}, {"train_runtime": 1.0}]
    single = [{"completions/mean_length": 10.0}]
    assert benchmark.updates_of(benchmark.OURS, ours) == [(640.0, 5.0)]
    assert benchmark.updates_of(benchmark.THEIRS, theirs) == [(640.0, 5.0)]
    assert benchmark.updates_of(benchmark.DEFAULTS, single) == [(640.0, 1.0)]


def test_other_work_is_refused():
    benchmark.check_work("agent", 1.05)
    with pytest.raises(SystemExit, match=r"agent: StepPOTrainer sampled 1\.30 times as many tokens as GRPOTrainer"):
        benchmark.check_work("agent", 1.3)


def test_an_answer_ends_no_episode():
    wiki = benchmark.EndlessWiki(BM25Retriever([Passage("Ada", "Ada was born in 1815.")]), top_k=1)
    wiki.reset(answer="1815")
    assert wiki.answer("Ada") == wiki.search("Ada") == "[1] Ada: Ada was born in 1815."
    assert not wiki.done
