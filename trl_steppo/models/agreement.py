"""Whether a model attends to a trie correctly, tried out on a few tokens.

The layouts rely on how a version of transformers hands masks, positions and other arguments on to its attention, which
no interface promises. One that ignores them computes other numbers without an error.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from ..batching import Segment
from ..compat.transformers import attention_of, exchange_attention
from ..modes import evaluating
from ..numerics import deviates
from .attention import prepare_for_tries, segment_arguments

_STEM, _BRANCH = 3, 3  # tokens that both branches share, and tokens of each branch
_known: dict[tuple[type, type, str, torch.dtype], bool] = {}  # for this process, whose library versions are fixed


def agrees_on_tries(model: PreTrainedModel) -> bool:
    """
    Whether two short branches give the same hidden states in one trie as in a row each. Tried once for each class of
    model and attention implementation. Exchanges the model's attention, see [`prepare_for_tries`].

    Args:
        model (`PreTrainedModel`):
            A model with a backbone at `base_model_prefix`, whole on this rank.
    """
    prepare_for_tries(model)
    exchange_attention(model, attention_of(model.config))  # also where a configuration only says that it is prepared
    backbone = getattr(model, model.base_model_prefix)
    attention = attention_of(model.config)
    key = (type(model), type(backbone), attention, next(model.parameters()).dtype)
    if key not in _known:
        _known[key] = _agrees(model)
    return _known[key]


@torch.no_grad()
def _agrees(model: PreTrainedModel) -> bool:
    backbone: nn.Module = getattr(model, model.base_model_prefix)
    device = next(model.parameters()).device
    stem, end = _STEM, _STEM + _BRANCH
    ids = torch.arange(1, end + _BRANCH + 1, device=device) % model.config.get_text_config().vocab_size
    positions = torch.arange(end, device=device)
    first, second = ids[:end], torch.cat([ids[:stem], ids[end:]])
    before = ((0, stem),)
    segments = [Segment(0, stem, ()), Segment(stem, end, before), Segment(end, end + _BRANCH, before)]

    def states(input_ids: torch.Tensor, position_ids: torch.Tensor, **arguments: object) -> torch.Tensor:
        hidden: torch.Tensor = backbone(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, **arguments
        ).last_hidden_state
        return hidden

    with evaluating(model):
        apart = states(torch.stack([first, second]), positions.repeat(2, 1))
        packed = torch.cat([positions, positions[stem:]])[None]
        trie = states(ids[None], packed, **segment_arguments(model, segments))[0]
        # One branch after the other in a row: as far off as a version that knows of no branches would be.
        mixed = states(ids[None], torch.arange(len(ids), device=device)[None])
    expected = torch.cat([apart[0], apart[1, stem:]])
    spans = (slice(0, stem), slice(stem, end), slice(end, None))
    return not any(deviates(trie[span], expected[span], mixed[0, end:] - expected[end:]) for span in spans)
