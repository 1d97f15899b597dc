"""
What a tool returned, as the `content` of its message.

As in TRL's `GRPOTrainer` a list stays a list, so that reward functions can read it, and anything else is shown as
`str` of it. The chat format shows the model a list as text.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from ..calls import as_text
from ..errors import DataError
from ..finite import shown
from ..types import map_texts, writable

_MEDIA = ("image", "image_url", "audio", "input_audio", "video", "video_url")


class MediaError(DataError):
    """Images or other media, which the policy cannot read."""


def content_of(value: Any) -> str | list[Any]:
    """
    The content of a tool's message.

    Args:
        value (`Any`):
            What the tool returned. A list (of values, or of content blocks such as `{"type": "text", "text": ...}`) is
            copied, since the tool may go on to change it.

    Returns:
        `str` or `list`: half surrogate pairs in it have become U+FFFD.

    Raises:
        MediaError: a list holds a block with an image, audio or video.
        TypeError: the value, or something in it, has no text of its own.
    """
    if not isinstance(value, list):
        return writable(as_text(value))
    _refuse_media(value)
    as_text(value)
    content: list[Any] = map_texts(copy.deepcopy(value), writable)
    return content


def text_of_blocks(blocks: list[Any], what: str) -> str:
    """
    The text of a list of content blocks.

    Args:
        blocks (`list`):
            Blocks of the form `{"type": "text", "text": ...}`, or plain text.
        what (`str`):
            How a message names what returned them.

    Raises:
        MediaError: one of them is an image, audio or video.
        TypeError: one of them is no block of text.
    """
    _refuse_media(blocks)
    texts: list[str] = []
    for block in blocks:
        text = block.get("text") if isinstance(block, Mapping) else block
        if not isinstance(text, str):
            raise TypeError(f"{what} a list with {shown(block)}; a block is {{'type': 'text', 'text': ...}}")
        texts.append(text)
    return "".join(texts)


def _refuse_media(blocks: list[Any]) -> None:
    for block in blocks:
        kind = block.get("type") if isinstance(block, Mapping) else None
        if isinstance(kind, str) and kind in _MEDIA and kind in block:
            raise MediaError(
                f"a content block of type {kind!r}: images and other media are not supported, the policy reads text. "
                "Leave such blocks out"
            )
