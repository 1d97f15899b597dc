"""Text -> token ids: how few tokens a text can have."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import pre_tokenizers

_NFC_SHRINKS = 4  # most characters that Unicode normalization composes into one
_DROPS_NOTHING = {"ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "UnicodeScripts", "FixedLength"}
_EVERY_BYTE = frozenset(pre_tokenizers.ByteLevel.alphabet())
_longest: weakref.WeakKeyDictionary[Any, tuple[int, float]] = weakref.WeakKeyDictionary()


def characters_per_token(tokenizer: Any) -> float:
    """
    The most characters of a text that one token can stand for; infinite where no number is known, as for a vocabulary
    of words whose unknown token stands for a word of any length. Computed once for each tokenizer and vocabulary.
    """
    size, known = len(tokenizer), _longest.get(tokenizer)
    if known is None or known[0] != size:
        known = _longest[tokenizer] = (size, _characters_per_token(tokenizer))
    return known[1]


def _characters_per_token(tokenizer: Any) -> float:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = tokenizer.get_vocab()
    shrinks = None if backend is None else _normalizer_shrinks(_state(backend.normalizer))
    if backend is None or shrinks is None or not _keeps_every_character(backend, vocabulary):
        return float("inf")
    if any(token.lstrip or token.rstrip for token in tokenizer.added_tokens_decoder.values()):
        return float("inf")  # such a token swallows the white space beside it, however long it is
    return float(max(map(len, vocabulary)) * shrinks)


def _keeps_every_character(backend: Any, vocabulary: Mapping[str, int]) -> bool:
    """Whether the ids of a text stand for all of its characters, with no token for unknown text of any length."""
    parts = _parts(_state(backend.pre_tokenizer), "pretokenizers")
    if any(part["type"] not in _DROPS_NOTHING or part.get("behavior") == "Removed" for part in parts):
        return False
    if any(part["type"] == "ByteLevel" for part in parts):
        return vocabulary.keys() >= _EVERY_BYTE
    has_bytes = all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    return bool(getattr(backend.model, "byte_fallback", False)) and has_bytes


def _normalizer_shrinks(state: Mapping[str, Any] | None) -> int | None:
    """How many characters a normalizer may make one of; `None` where that is not known."""
    shrinks = 1
    for part in _parts(state, "normalizers"):
        if part["type"] in ("NFC", "NFKC"):
            shrinks *= _NFC_SHRINKS
        elif part["type"] == "Replace":
            pattern = part["pattern"].get("String")
            if not pattern or len(pattern) > len(part["content"]):
                return None
        elif part["type"] not in ("NFD", "NFKD", "Prepend", "ByteLevel"):
            return None
    return shrinks


def _parts(state: Mapping[str, Any] | None, name: str) -> Sequence[Mapping[str, Any]]:
    if state is None:
        return ()
    return [part for one in state[name] for part in _parts(one, name)] if state["type"] == "Sequence" else [state]


def _state(component: Any) -> Mapping[str, Any] | None:
    """What a part of a fast tokenizer is, as `tokenizer.json` has it."""
    return None if component is None else json.loads(component.__getstate__())
