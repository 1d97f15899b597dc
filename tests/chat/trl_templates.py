"""A small tokenizer for each chat template in TRL, with the tokens that the template writes."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import trl
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(trl.__file__).parent / "chat_templates"
_ONLY_PARTS = ("idefics3", "llava_next")  # for images: messages are lists of parts
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.startswith(_ONLY_PARTS))
WITH_TOOLS = [name for name in NAMES if "tools" in (FOLDER / f"{name}.jinja").read_text()]

_SPECIAL = re.compile(r"<\|[^|<>{}' ]+\|?>|<[a-z_]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_[a-z]+>|<sop>|</s>")
_FRAMING = re.compile(r"</?(?:tool_call|tool_response|tool_output|think|tools|tool|arg_key|arg_value)>")
_TEXT = 'Where is the tower? The tower is in Paris, the search is over. <b>the</b> {"query": "the tower"} (a|b) # the'


@cache
def make_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Byte-level; what frames tool calls and thoughts is added and not special, as in Qwen3's tokenizer."""
    template = (FOLDER / f"{name}.jinja").read_text()
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([_TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    special = set(_SPECIAL.findall(template)) | {"<|user|>", "<|assistant|>", "<|system|>"}
    tokenizer.add_special_tokens({"extra_special_tokens": sorted(special)})
    tokenizer.add_tokens(
        sorted(set(_FRAMING.findall(template)) | {"<think>", "</think>", "<tool_call>", "</tool_call>"})
    )
    tokenizer.chat_template = template
    return tokenizer
