import pytest

from tests.rollout.scripted import ScriptedSampler, call, play_in
from trl_steppo.environments import make_playable
from trl_steppo.rollout import EpisodeRequest, pay_episodes
from trl_steppo.types import StopReason

ROW = {"prompt": [{"role": "user", "content": "Which genes?"}]}
ROWS = [("JNKK", 9606), ("MAPKK4", 9606)]


def play(chat, tool):
    return play_in(
        lambda row: make_playable(tools=[tool]),
        [EpisodeRequest(ROW, 0)],
        ScriptedSampler(chat, lambda order: call(tool.__name__) if order[2] == 0 else "*yes*<|im_end|>"),
        chat,
    )


def test_the_model_reads_a_list_as_text_and_a_reward_function_has_the_list(chat):
    def query() -> list[tuple]:
        """Ask the database."""
        return ROWS

    (episode,) = play(chat, query)
    assert str(ROWS) in chat.decode(episode.steps[1].prompt_ids)
    seen = []

    def pays_for_evidence(completions, **kwargs):
        seen.extend(completions[0])
        return [float(any(isinstance(message["content"], list) for message in completions[0]))]

    (scored,) = pay_episodes([pays_for_evidence], None, [episode], [ROW], chat=chat)
    assert seen[1] == {"role": "tool", "name": "query", "content": ROWS}
    assert scored.steps[-1].reward == 1.0


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_media_fail_the_episode(chat, kind):
    def query() -> list:
        """Take a picture."""
        return [{"type": kind, kind: b"..."}]

    (episode,) = play(chat, query)
    assert episode.stop_reason is StopReason.ERROR
    assert f"MediaError: the tool `query` returned a content block of type '{kind}'" in episode.error
