import json
import math
import pickle
from dataclasses import replace

import pytest

from trl_steppo.errors import DataError
from trl_steppo.rollout import dump_episodes, episode_file, load_episodes
from trl_steppo.types import Episode, Step, StopReason, TokenIds

BUFFER = TokenIds([1, 2, 3, 4, 5, 6, 2**31 - 1])


def make_step(index: int, prompt_ids, response_ids, **kwargs) -> Step:
    defaults = {
        "rollout_logprobs": [-0.1 - 1e-17, -math.pi, -1e-300][: len(response_ids)],
        "reward": 0.1 + 0.2,
        "step_index": index,
        "policy_version": 3,
        "temperature": 0.7,
        "stop_reason": StopReason.STOP,
    }
    return Step(prompt_ids, response_ids, **{**defaults, **kwargs})


GROWING = Episode(
    "7-1",
    7,
    1,
    (
        make_step(0, BUFFER[:2], BUFFER[2:4], observation=[{"role": "tool", "content": 'ü\u2028\n"x"'}]),
        make_step(1, BUFFER[:5], BUFFER[5:6], info={"state_key": (1, ("a", None))}, stop_reason=StopReason.LENGTH),
    ),
    terminated=False,
    truncated=True,
    final_prompt_ids=BUFFER,
    metrics={"tool_calls": 2, "exact_match": 1 / 3},
    stop_reason=StopReason.MAX_INTERACTION_STEPS,
)
REWRITTEN = Episode(
    "x", 0, 0, (make_step(0, [9, 8], [7, 6]), make_step(1, [9, 5], [7])), terminated=True, truncated=False
)
KNOWN = replace(REWRITTEN, dataset_row=12, question=[{"role": "user", "content": "Wo? ü\u2028"}])
FAILED = Episode("y", 0, 2, (), False, False, error="reset: ValueError: no", stop_reason=StopReason.ERROR)


def test_loading_gives_the_episodes_that_were_dumped(tmp_path):
    path = tmp_path / "new" / "episodes.jsonl"
    dump_episodes(path, [GROWING, REWRITTEN, KNOWN, FAILED])
    assert load_episodes(path) == [GROWING, REWRITTEN, KNOWN, FAILED]
    assert [file.name for file in path.parent.iterdir()] == ["episodes.jsonl"]


def test_recordings_of_older_versions_are_read(tmp_path):
    """They have the position in the stream as `row_index`, and know nothing of the dataset."""
    path = tmp_path / "e"
    dump_episodes(path, [GROWING])
    data = json.loads(path.read_text(encoding="utf-8"))
    assert (data.pop("dataset_row"), data.pop("question")) == (None, None)
    data["row_index"] = data.pop("stream_position")
    path.write_text(json.dumps(data) + "\n", encoding="utf-8")
    assert load_episodes(path) == [GROWING]


def test_the_old_name_of_the_position_still_works():
    with pytest.warns(DeprecationWarning, match="`row_index` is now called `stream_position`"):
        episode = Episode(
            "x", row_index=7, generation_index=0, steps=(), terminated=False, truncated=False, error="no"
        )
    with pytest.warns(DeprecationWarning, match="`stream_position`"):
        assert episode.row_index == episode.stream_position == 7
    assert replace(episode, stream_position=8).stream_position == 8
    assert pickle.loads(pickle.dumps(episode)) == episode
    with pytest.raises(TypeError, match="give one of them"):
        replace(episode, row_index=8)


def test_floats_survive_to_the_last_bit(tmp_path):
    step = replace(GROWING.steps[0], rollout_logprobs=(-5e-324, -math.inf), reward=1e22 + 1.0)
    dump_episodes(tmp_path / "e", [replace(GROWING, steps=(step,))])
    (loaded,) = load_episodes(tmp_path / "e")
    assert loaded.steps[0].rollout_logprobs == (-5e-324, -math.inf)
    assert loaded.steps[0].reward == 1e22 + 1.0


def test_shared_ids_are_written_once_and_shared_again(tmp_path):
    dump_episodes(tmp_path / "e", [GROWING])
    (loaded,) = load_episodes(tmp_path / "e")
    ids = [x for step in loaded.steps for x in (step.prompt_ids, step.response_ids)] + [loaded.final_prompt_ids]
    assert len({id(x._storage) for x in ids}) == 1
    assert (tmp_path / "e").read_text().count(str(2**31 - 1)) == 1


def test_values_that_json_lacks_become_the_nearest_json_value(tmp_path):
    step = replace(GROWING.steps[0], info={"state_key": frozenset({2, 1}), "tool": print})
    dump_episodes(tmp_path / "e", [replace(GROWING, steps=(step,))])
    info = load_episodes(tmp_path / "e")[0].steps[0].info
    assert info["state_key"] == (1, 2)
    assert "print" in info["tool"]


def test_a_failed_dump_leaves_what_was_there(tmp_path):
    path = tmp_path / "e"
    dump_episodes(path, [FAILED])

    def breaks():
        yield GROWING
        raise ValueError("broken on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        dump_episodes(path, breaks())
    assert load_episodes(path) == [FAILED]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damage", ["cut", "field", "value", "reference", "other"])
def test_a_damaged_line_is_named(tmp_path, damage):
    path = tmp_path / "e"
    dump_episodes(path, [FAILED, GROWING])
    first, second = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    data = json.loads(second)
    if damage == "field":
        del data["steps"][0]["reward"]
    elif damage == "value":
        data["steps"][0]["stop_reason"] = "tired"
    elif damage == "reference":
        data["steps"][1]["prompt_ids"] = 99
    second = {"cut": second[:-20], "other": "[1, 2]"}.get(damage, json.dumps(data))
    path.write_text(f"{first}\n{second}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"e, line 2: not a recorded episode"):
        load_episodes(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        load_episodes(tmp_path / "nowhere.jsonl")


def test_file_names_sort_by_update_and_differ_by_rank(tmp_path):
    names = [episode_file(tmp_path, update, rank).name for update in (2, 10, 100) for rank in (0, 1)]
    assert names == sorted(set(names))
