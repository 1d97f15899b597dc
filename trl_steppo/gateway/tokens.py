"""A tokenizer's chat formats, one for every set of tools."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from ..chat import ChatFormat
from ..types import JsonObject
from .conversation import RequestError, tools_key

_MAX_FORMATS = 64


class ChatFormats:
    """
    A tokenizer's chat format for every set of tools. May be used by several threads.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer with a chat template.
        chat_template_kwargs (`Mapping[str, Any]`, *optional*):
            Passed on to the template.
        end_token_ids (`Sequence[int]`, *optional*):
            Tokens that end a response beside those of the template, as the model's generation configuration names
            them.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        end_token_ids: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._end_token_ids = tuple(end_token_ids)
        self._template_kwargs = chat_template_kwargs
        self._formats: OrderedDict[bytes, ChatFormat] = OrderedDict()
        self._lock = threading.Lock()
        self.num_ids = len(tokenizer)

    def of(self, tools: Sequence[JsonObject], *, key: bytes | None = None) -> ChatFormat:
        """The format that shows these tools, whose key may be known; a `RequestError` if the template cannot."""
        key = tools_key(tools) if key is None else key
        with self._lock:
            found = self._formats.get(key)
        if found is None:
            try:
                found = ChatFormat(
                    self._tokenizer,
                    tools=tools,
                    chat_template_kwargs=self._template_kwargs,
                    end_token_ids=self._end_token_ids,
                )
            except Exception as error:  # whatever jinja code raises about the client's tools
                raise RequestError(400, f"these tools cannot be shown: {error}", param="tools") from error
        with self._lock:
            self._formats[key] = found
            self._formats.move_to_end(key)
            if len(self._formats) > _MAX_FORMATS:
                self._formats.popitem(last=False)
        return found

    def knows(self, tools: Sequence[JsonObject]) -> bool:
        """Whether [`of`] has these tools at hand, and does not have to try what the template makes of them."""
        with self._lock:
            return tools_key(tools) in self._formats

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
