import json
from dataclasses import replace

from trl_steppo.episodes.json import episode_from_json, episode_to_json, plain_episode_json
from trl_steppo.types import Episode, Step, StopReason, TokenIds

IDS = TokenIds([1, 2, 3, 4, 5])
STEP = Step(IDS[:2], IDS[2:4], (-0.5, -0.25), 1.5, 0, 3, 0.7, StopReason.STOP, "seen", {"state_key": (1, "a")})
EPISODE = Episode("x", 7, 1, (STEP,), False, True, IDS, stop_reason=StopReason.MAX_EPISODE_S, logged={"why": "late"})


def test_what_is_written():
    """Byte for byte: recordings of other versions are compared with it."""
    assert json.dumps(episode_to_json(EPISODE)) == (
        '{"episode_id": "x", "stream_position": 7, "dataset_row": null, "question": null, "generation_index": 1, '
        '"terminated": false, "truncated": true, "stop_reason": "max_episode_s", "error": null, "metrics": {}, '
        '"reset_text": null, "logged": {"why": "late"}, "token_ids": [1, 2, 3, 4, 5], "final_prompt_ids": 5, '
        '"steps": [{"step_index": 0, "prompt_ids": 2, "response_ids": 2, "rollout_logprobs": [-0.5, -0.25], '
        '"reward": 1.5, "policy_version": 3, "temperature": 0.7, "stop_reason": "stop", "observation": "seen", '
        '"info": {"state_key": [1, "a"]}}]}'
    )


def test_what_is_read_equals_what_was_written():
    for episode in (
        EPISODE,
        replace(EPISODE, agent_output="done\n"),
        replace(EPISODE, steps=(replace(STEP, prompt_ids=TokenIds([9, 8])),)),
    ):
        assert episode_from_json(json.loads(json.dumps(episode_to_json(episode)))) == episode


def test_a_plain_episode_has_all_ids_and_nothing_of_the_trainer():
    plain = plain_episode_json(EPISODE)
    assert plain["final_prompt_ids"] == [1, 2, 3, 4, 5]
    assert (plain["steps"][0]["prompt_ids"], plain["steps"][0]["response_ids"]) == ([1, 2], [3, 4])
    assert not {"token_ids", "question", "reset_text", "logged"} & set(plain)
