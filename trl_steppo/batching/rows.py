"""Steps -> rows: which tokens are forwarded together, and where each step's action stands in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..types import Step, TokenIds


@dataclass
class Row:
    """
    One sequence of a forward pass.

    Args:
        ids ([`TokenIds`]):
            The tokens.
        steps (`list[tuple[int, int]]`):
            For each step whose action stands in this row: its position in the list of steps, and the index of the
            first token of its response. The value of a step is read at the index before.
    """

    ids: TokenIds
    steps: list[tuple[int, int]]


def row_per_step(steps: Sequence[Step]) -> list[Row]:
    """One row for each step: its prompt, then its response."""
    return [Row(_joined(step), [(position, len(step.prompt_ids))]) for position, step in enumerate(steps)]


def share_prefixes(steps: Sequence[Step]) -> list[Row]:
    """
    Rows in which a step continues the row of the step before it, where its prompt begins with that row's tokens.

    The steps of an append-only episode become one causal row: O(T) tokens for T steps, where a row for each step takes
    O(T²). A step whose prompt was rewritten starts a new row.

    Args:
        steps (`Sequence[Step]`):
            Steps of one episode, in order.

    Returns:
        `list[Row]`: Rows that together hold every step once.
    """
    rows: list[Row] = []
    for position, step in enumerate(steps):
        if rows and step.prompt_ids[: len(rows[-1].ids)] == rows[-1].ids:
            rows[-1] = Row(_joined(step), [*rows[-1].steps, (position, len(step.prompt_ids))])
        else:
            rows.append(Row(_joined(step), [(position, len(step.prompt_ids))]))
    return rows


def _joined(step: Step) -> TokenIds:
    return TokenIds(step.prompt_ids.tolist() + step.response_ids.tolist())
