"""What ranks do together, as one of them sees it."""

from __future__ import annotations

import pytest

from trl_steppo.errors import RolloutError
from trl_steppo.learning import ranks
from trl_steppo.learning.ranks import from_first_rank, gather_objects


def test_one_rank_has_what_it_has():
    own = [1, 2]
    assert gather_objects(own) is own
    assert from_first_rank("a") == "a"


def test_what_fails_on_another_rank_is_raised_here(monkeypatch) -> None:
    monkeypatch.setattr(ranks, "gather_objects", lambda own: own)
    assert ranks.together(lambda: 7) == 7
    with pytest.raises(OSError, match="broken"):
        ranks.together(lambda: (_ for _ in ()).throw(OSError("broken")))
    other = ranks._sendable(RolloutError("no server"))
    monkeypatch.setattr(ranks, "gather_objects", lambda own: [*own, other])
    with pytest.raises(RolloutError, match="on another rank: no server"):
        ranks.together(lambda: 7)
