"""tokenizer.json against our own tokenizer, read by the library that transformers and vLLM read it with."""

from __future__ import annotations

import json

import pytest
from helpers.tiny_tokenizer import train_tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from telechat_mindie.checkpoint.elsewhere.tokenizer_json import tokenizer_json
from telechat_mindie.errors import TokenizerError
from telechat_mindie.text.tokenizer import TelechatTokenizer

TOOL_TAGS = {"9": "<tool_call>", "10": "</tool_call>", "11": "<tool_response>", "12": "</tool_response>"}
TURNS = ("<_start>", "<_end>", "<_pad>", "<_user>", "<_bot>", "<_system>")
RESERVED = [f"<reserve{number}>" for number in range(1, 12)]
SETTINGS = {
    "control_symbols": [*TURNS[3:], "<_observation>", "<_sep>", *(f"<_control{number}>" for number in range(1, 5))],
    "user_defined_symbols": [*"0123456789", "_", "\n", "\t", "__", "___", "____", *RESERVED],
}
"""The tiny tokenizer with all that the published one has."""

TEXTS = (
    "",
    " ",
    "  a  b ",
    "生抽与老抽的区别？",
    "😀 e\u0301 \0 \u3000全角",
    "def f(x_1):\r\n\treturn  x_1__2___3____4_____5______6_______7",
    "<_user> hi<_bot>你好<_end>\n<_user>\n",
    "a<_end>b <_pad><_pad>",
    "<tool_call>\n{}\n</tool_call>",
    "<_sep>\n<_observation>\n<_unk> <0x0A> <_control1>",
    "<reserve1><reserve10> x<reserve11>1<reserve1",
    "<reserve2>",
)


def read(tokenizer, file) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(tokenizer_json(file, tokenizer)))


@pytest.fixture(scope="module", params=["turns", "tool tags"])
def both(request, tmp_path_factory):
    """(our tokenizer, the library's) without and with added tokens of a tokenizer_config.json."""
    file = train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocab_size=520, **SETTINGS)
    added = None
    if request.param == "tool tags":
        tokens = dict(enumerate(TURNS, 1)) | TOOL_TAGS | {"600": "<beyond>"}
        added = {str(index): {"content": content, "special": True} for index, content in tokens.items()}
    ours = TelechatTokenizer(file, vocab_size=530, added_tokens_decoder=added)
    return ours, read(ours, file)


def assert_same(both, text):
    ours, theirs = both
    ids = ours.encode(text)
    assert theirs.encode(text, add_special_tokens=False).ids == ids
    if "\u2581" not in text:  # which is a space to sentencepiece
        assert theirs.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", TEXTS)
def test_the_same_ids_and_the_text_back(both, text):
    assert_same(both, text)


def test_every_piece_between_others(both):
    for piece in both[0].pieces()[0]:
        assert_same(both, f"\n{piece}\n".replace("\u2581", " "))


words = st.sampled_from([*TURNS, *TOOL_TAGS.values(), *RESERVED, " ", "_", "\n", "12", "the ", "soy", "老抽", "\u2581"])
texts = st.lists(words | st.characters(exclude_categories=["Cs"]) | st.text(max_size=5), max_size=20).map("".join)


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_any_text(both, text):
    assert_same(both, text)


def test_bytes_that_are_no_character_and_special_tokens(both):
    ours, theirs = both
    cut = ours.encode("a")[:-1] + ours.encode("😀")[1:-1]  # the last byte is missing
    assert theirs.decode(cut) == ours.decode(cut)
    answer = [5, *ours.encode("the meat"), 2]
    assert theirs.decode(answer, skip_special_tokens=True) == "the meat"
    assert theirs.decode(answer, skip_special_tokens=False) == "<_bot>the meat<_end>"


def test_a_text_is_framed_where_the_settings_say_so(tmp_path):
    file = train_tiny_tokenizer(tmp_path)
    for before in (False, True):
        for after in (False, True):
            ours = TelechatTokenizer(file, add_bos_token=before, add_eos_token=after)
            assert read(ours, file).encode("the meat").ids == ours.encode("the meat")


def test_a_piece_that_is_named_like_an_added_token(tmp_path):
    """As in a tokenizer.model of another make: `soy` is an ordinary piece there, and a token of its own here."""
    file = train_tiny_tokenizer(tmp_path, vocab_size=520, **SETTINGS)
    plain = TelechatTokenizer(file)
    piece = next(piece for piece in plain.pieces()[0][300:] if piece.isalpha() and len(piece) > 1)
    ours = TelechatTokenizer(file, added_tokens_decoder={"9": {"content": piece, "special": True}})
    theirs = read(ours, file)
    assert theirs.get_vocab_size() == ours.vocab_size
    for text in (piece, f"a{piece}b", f" {piece}"):
        assert theirs.encode(text).ids == ours.encode(text)


def test_another_kind_of_model_is_refused(tmp_path):
    file = train_tiny_tokenizer(tmp_path, model_type="unigram", vocab_size=360)
    with pytest.raises(TokenizerError, match="is not a BPE model"):
        tokenizer_json(file, TelechatTokenizer(file))


@pytest.mark.slow
@pytest.mark.parametrize("published", [False, True], ids=["115b", "7b"])
def test_the_published_tokenizer(shared, published):
    file = shared("telechat2-115b") / "tokenizer.model"
    added = None
    if published:
        added = json.loads(shared("published/tokenizer_config_7b.json").read_text())["added_tokens_decoder"]
    ours = TelechatTokenizer(file, added_tokens_decoder=added)
    both = ours, read(ours, file)
    for text in (*TEXTS, *(f"\n{piece}\n".replace("\u2581", " ") for piece in ours.pieces()[0][::29])):
        assert_same(both, text)
