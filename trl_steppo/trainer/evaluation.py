"""Greedy episodes of rows that are not trained on: the metrics of an evaluation, and examples to look at."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice

from accelerate import Accelerator
from datasets import IterableDataset
from transformers import TrainerState

from ..errors import DataError
from ..inference import Engine
from ..learning.metrics import Means
from ..learning.ranks import gather_objects, together
from ..rollout import EpisodeRequest
from ..types import Episode
from .data_stream import RowSource, check_same_order, checksum, first_rows, numbered_rows
from .metrics import add_episode_metrics, with_free_names, with_names_in_trl
from .player import EpisodePlayer
from .rollouts import Played, pay_together


class Evaluation:
    """
    Plays rows greedily. The engine must run.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Knows the ranks.
        player ([`EpisodePlayer`]):
            Plays and pays episodes.
        engine ([`Engine`]):
            Samples.
        on_episode (`Callable[[], None]`):
            Called whenever an episode has ended.
    """

    def __init__(
        self, accelerator: Accelerator, player: EpisodePlayer, engine: Engine, on_episode: Callable[[], None]
    ) -> None:
        self._accelerator = accelerator
        self._player = player
        self._engine = engine
        self._on_episode = on_episode

    def measure(
        self,
        dataset: RowSource,
        state: TrainerState,
        log: Callable[[Sequence[Episode]], None] = lambda episodes: None,
    ) -> dict[str, float]:
        """
        Metrics of a dataset, each row of which is played once. Collective: every rank must call this.

        Args:
            dataset (`Dataset`, `Sequence[dict]` or [`~datasets.IterableDataset`]):
                The rows.
            state (`TrainerState`):
                Shown to reward functions.
            log (`Callable[[Sequence[Episode]], None]`, *optional*):
                Called with this rank's episodes.

        Raises:
            DataError: If there are no rows, or a stream has another order on each rank.
        """
        start = time.perf_counter()
        rank, num_ranks = self._accelerator.process_index, self._accelerator.num_processes
        if num_ranks > 1 and isinstance(dataset, IterableDataset):
            check_same_order(checksum(first_rows(dataset)), "eval_dataset")
        rows = numbered_rows(dataset, first=rank, every=num_ranks)
        requests = [EpisodeRequest(row, index, dataset_row=index) for index, row in rows]
        num_rows = sum(gather_objects([len(requests)]))
        if num_rows == 0:  # on every rank
            raise DataError("`eval_dataset` has no rows")
        means, reward_means = Means(), Means()
        episodes = self._play(requests, "eval/", state, reward_means)
        add_episode_metrics(means, episodes)
        log(episodes)
        runtime = time.perf_counter() - start
        metrics = {
            name.removeprefix("env/").removeprefix("rollout/"): value
            for name, value in with_names_in_trl(means.reduced()).items()
            if name != "objective/scores"
        }
        metrics |= {"runtime": runtime, "samples_per_second": num_rows / runtime}
        return metrics | with_free_names(reward_means.reduced(), metrics)

    def examples(self, dataset: RowSource, count: int | None, state: TrainerState) -> list[Episode]:
        """
        Episodes of the first rows, which the first rank plays. Collective: every rank must call this.

        Args:
            dataset (`Dataset`, `Sequence[dict]` or [`~datasets.IterableDataset`]):
                The rows.
            count (`int`, *optional*):
                How many of them; `None`: all.
            state (`TrainerState`):
                Shown to reward functions.
        """
        rows = islice(numbered_rows(dataset), count) if self._accelerator.is_main_process else ()
        requests = [EpisodeRequest(row, index, dataset_row=index) for index, row in rows]
        return self._play(requests, "shown/", state, Means())

    def _play(
        self, requests: Sequence[EpisodeRequest], id_prefix: str, state: TrainerState, reward_means: Means
    ) -> list[Episode]:
        """Play in parts: environments that reward functions see are all kept until they were seen."""

        def play(part: Sequence[EpisodeRequest]) -> Played:
            prepared = self._player.prepare(part)
            return prepared, self._player.play(prepared, greedy=True, id_prefix=id_prefix, on_episode=self._on_episode)

        most = max(gather_objects([len(requests)]))
        size = self._player.episodes_at_once or max(most, 1)
        episodes: list[Episode] = []
        with self._player.environments.kept():
            for start in range(0, most, size):  # on every rank as often
                played = together(partial(play, requests[start : start + size]), self._engine.sampling())
                episodes += pay_together(self._player, played, state, reward_means)
        return episodes
