"""A tokenizer's chat formats, one for every set of tools."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from ..chat import ChatFormat
from ..types import JsonObject, Tokenizer
from .conversation import RequestError, tools_key

_MAX_FORMATS = 64


class ChatFormats:
    """
    Chat formats of one tokenizer: one for every set of tools. Several threads may use it.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer with a chat template.
        chat_template_kwargs (`Mapping[str, object]`, *optional*):
            Arguments of the template.
        end_token_ids (`Sequence[int]`, *optional*):
            Tokens that end a response in addition to those of the template, as the model's generation configuration
            names them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        chat_template_kwargs: Mapping[str, object] | None = None,
        end_token_ids: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._end_token_ids = tuple(end_token_ids)
        self._template_kwargs = chat_template_kwargs
        self._formats: OrderedDict[bytes, ChatFormat] = OrderedDict()
        self._lock = threading.Lock()
        self.num_ids = len(tokenizer)

    def of(self, tools: Sequence[JsonObject], *, key: bytes | None = None) -> ChatFormat:
        """
        The format that shows these tools.

        Args:
            tools (`Sequence[dict]`):
                JSON schemas.
            key (`bytes`, *optional*):
                Their [`~gateway.conversation.tools_key`], where it is known.

        Raises:
            RequestError: The template cannot show them.
        """
        key = tools_key(tools) if key is None else key
        with self._lock:
            chat = self._formats.get(key)
        if chat is None:
            try:
                chat = ChatFormat(
                    self._tokenizer,
                    tools=tools,
                    chat_template_kwargs=self._template_kwargs,
                    end_token_ids=self._end_token_ids,
                )
            except Exception as error:  # jinja code may raise anything about the client's tools
                raise RequestError(400, f"these tools cannot be shown: {error}", param="tools") from error
        with self._lock:
            self._formats[key] = chat
            self._formats.move_to_end(key)
            if len(self._formats) > _MAX_FORMATS:
                self._formats.popitem(last=False)
        return chat

    def knows(self, tools: Sequence[JsonObject]) -> bool:
        """Whether the format of these tools has been made, so that [`of`] returns at once."""
        with self._lock:
            return tools_key(tools) in self._formats

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str), "one sequence has one text"
        return text
