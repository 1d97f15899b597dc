"""Tells why a run cannot learn: its rewards do not differ."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from transformers import TrainerState

from ..types import Episode, StopReason, TokenIds
from .figures import EpisodeFigures, all_equal
from .steppo_config import StepPOConfig

PATIENCE = 3
"""Updates without differing rewards at the beginning of a run, after which it warns."""

_MAX_SHOWN = 300  # characters of a response
_OFTEN = 0.5  # share of responses or episodes from which on something is worth a look
_PAGE = 'docs/guides/troubleshooting.md, "Reward is 0"'


class EqualRewards:
    """
    Looks at the rewards of each update, and warns once if they have never differed.

    Args:
        args ([`StepPOConfig`]):
            The run's settings.
        decode (`Callable[[TokenIds], str]`):
            Converts token ids to text.
    """

    def __init__(self, args: StepPOConfig, decode: Callable[[TokenIds], str]) -> None:
        self._args = args
        self._decode = decode
        self._rewards: list[float] = []
        self._num_updates = 0
        self._is_over = False

    @property
    def compares_groups(self) -> bool:
        """Whether only the episodes of one dataset row are compared with each other."""
        return self._args.estimator.compares_episodes

    def warning(self, state: TrainerState, episodes: Sequence[Episode], figures: EpisodeFigures) -> str | None:
        """
        The warning, at the end of the first updates if their rewards did not differ.

        Args:
            state (`TrainerState`):
                The trainer's, before the update.
            episodes (`Sequence[Episode]`):
                This rank's episodes of the update.
            figures ([`EpisodeFigures`]):
                Of the valid episodes of all ranks, at least one.
        """
        if self._is_over:
            return None
        is_equal = figures.has_equal_rewards(compares_groups=self.compares_groups)
        if not is_equal or figures.pays_steps or _have_differed(state):
            self._is_over = True
            return None
        self._rewards += figures.returns
        self._num_updates += 1
        if self._num_updates < PATIENCE:
            return None
        self._is_over = True
        last = state.global_step + 1
        return self._text(last, [episode for episode in episodes if episode.valid])

    def _text(self, update: int, episodes: Sequence[Episode]) -> str:
        count = len(self._rewards)
        if all_equal(self._rewards):
            what = f"all {count} rewards are {self._rewards[0]:.3g}"
        elif self.compares_groups:
            what = f"among the {count} episodes, no two of one row have different rewards"
        else:
            what = f"in each update, all rewards are equal ({count} in all)"
        lines = [f"updates {update - PATIENCE + 1} to {update}: {what}, so there is nothing to learn from."]
        if episodes:
            lines.append(f"The last response: {self._shown(episodes[-1])}")
        lines += [f"- {hint}" for hint in self._hints(episodes)]
        return "\n".join([*lines, f"See {_PAGE}."])

    def _shown(self, episode: Episode) -> str:
        text = " ".join(self._decode(episode.steps[-1].response_ids).split())
        half = _MAX_SHOWN // 2
        return repr(text if len(text) <= _MAX_SHOWN else f"{text[:half]} ... {text[-half:]}")

    def _hints(self, episodes: Sequence[Episode]) -> Iterator[str]:
        """What to look at, by what happened in the last update."""
        args = self._args
        steps = [step for episode in episodes for step in episode.steps]
        counts: Counter[str] = Counter()
        for episode in episodes:
            counts.update(name for name, value in episode.metrics.items() if value > 0)
            counts.update([str(episode.stop_reason.value)] if episode.truncated and episode.stop_reason else [])
        num = len(episodes)
        cut = sum(step.stop_reason is StopReason.LENGTH for step in steps)
        if cut > _OFTEN * len(steps):
            yield (
                f"{cut} of {len(steps)} responses were cut at `response_length` = {args.response_length} "
                "(`rollout/length_stopped`): raise it, or ask for shorter ones"
            )
        if counts["malformed_tool_calls"] > _OFTEN * num:
            yield (
                f"{counts['malformed_tool_calls']} of {num} episodes have tool calls that cannot be read "
                "(`env/malformed_tool_calls`): does the model know the form in its chat template?"
            )
        elif any("tool_calls" in episode.metrics for episode in episodes) and not counts["tool_calls"]:
            yield "no tool was called (`env/tool_calls`): does the system message name the tools, and how to call one?"
        for name in ("unknown_tools", "wrong_arguments", "tool_errors", "tool_timeouts"):
            if counts[name] > _OFTEN * num:
                yield f"{counts[name]} of {num} episodes have `env/{name}`: read one of them"
        for reason in (StopReason.MAX_INTERACTION_STEPS, StopReason.MAX_PROMPT_LENGTH, StopReason.MAX_EPISODE_TOKENS):
            if counts[reason.value] > _OFTEN * num:
                yield f"{counts[reason.value]} of {num} episodes were cut at `{reason.value}` (`env/truncated`)"
        show = f"`trl-steppo show {shlex.quote(str(args.output_dir))}` prints episodes"
        if not args.log_episodes:
            show = "`log_episodes` writes episodes for `trl-steppo show`"
        yield f"read what was played: {show}, `trl-steppo try` plays one with its rewards"


def _have_differed(state: TrainerState) -> bool:
    """Whether an earlier update of a resumed run had differing rewards."""
    return any(logs.get("env/equal_rewards", 1.0) < 1.0 for logs in state.log_history)
