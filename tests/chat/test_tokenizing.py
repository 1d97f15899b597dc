import random
import string

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from trl_steppo.assets import ROOMS_POLICY, locate_model
from trl_steppo.chat import ChatFormat
from trl_steppo.chat.tokenizing import characters_per_token

CHARACTERS = [*string.printable, "é", "e\u0301", "\u1f82", "が", "か\u3099", "中", "😀", "\u200b", "  ", "aaaaaaaa"]


def byte_level(normalizer=None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["aaaaaaaa aaaaaaaa the the there が が 中 中"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def with_byte_fallback() -> PreTrainedTokenizerFast:
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "aa", "aaaa"]
    backend = Tokenizer(
        models.BPE(
            {word: index for index, word in enumerate(words)},
            [("a", "a"), ("aa", "aa")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


BOUNDED = {
    "byte level": byte_level(),
    "composed": byte_level(normalizers.NFC()),
    "byte fallback": with_byte_fallback(),
    "mini_wiki": AutoTokenizer.from_pretrained(locate_model("mini_wiki")),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_no_text_has_fewer_tokens_than_its_characters_allow(name):
    tokenizer, rng = BOUNDED[name], random.Random(0)
    most = characters_per_token(tokenizer)
    assert most < 100
    for _ in range(300):
        text = "".join(rng.choices(CHARACTERS[rng.randrange(len(CHARACTERS)) :], k=rng.randrange(200)))
        assert len(tokenizer.encode(text, add_special_tokens=False)) >= len(text) / most


def test_a_tokenizer_whose_tokens_may_stand_for_any_text_has_no_bound():
    words = AutoTokenizer.from_pretrained(ROOMS_POLICY)
    assert characters_per_token(words) == float("inf")
    assert len(words.encode("x" * 10_000, add_special_tokens=False)) == 1
    swallowing = byte_level()
    swallowing.add_tokens(AddedToken("<|end|>", rstrip=True))
    assert characters_per_token(swallowing) == float("inf")
    dropping = byte_level()
    dropping.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()]
    )
    assert characters_per_token(dropping) == float("inf")


def test_a_longer_token_changes_the_number():
    tokenizer = byte_level()
    before = characters_per_token(tokenizer)
    tokenizer.add_tokens("x" * 500)
    assert before < 100 < characters_per_token(tokenizer) == 500


def test_messages_have_at_least_the_tokens_that_are_counted():
    chat = ChatFormat(BOUNDED["mini_wiki"])
    text = " the tower " * 100
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    assert 10 < chat.min_tokens(messages) <= len(chat.render(messages))
    parts = [{"role": "user", "content": [{"type": "text", "text": text}]}, messages[1]]
    assert chat.min_tokens(parts) == chat.min_tokens(messages)
    assert chat.min_tokens(text) >= chat.min_tokens(messages)
    assert chat.min_tokens("") == chat.min_tokens([]) == 0
