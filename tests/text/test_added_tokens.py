"""Tokens that a tokenizer_config.json names: encoded, decoded and kept out of content as transformers has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny_tokenizer import VOCAB_SIZE, train_tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from telechat_mindie.errors import TokenizerError
from telechat_mindie.text.settings import constructor_arguments
from telechat_mindie.text.tokenizer import TelechatTokenizer

TAGS = {9: "<tool_call>", 10: "</tool_call>", 11: "<tool_response>", 12: "</tool_response>"}
TURNS = {1: "<_start>", 2: "<_end>", 3: "<_pad>", 4: "<_user>", 5: "<_bot>", 6: "<_system>"}
HELLO = [{"role": "user", "content": "the"}]


def added(names: dict[int, str], **switches: bool) -> dict[str, dict[str, Any]]:
    fields = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {str(index): fields | switches | {"content": name} for index, name in names.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pieces of the ids 9 to 12 that have other names, as in the published file."""
    turns = ["<_user>", "<_bot>", "<_system>", "<_observation>", "<_sep>"]
    control = [*turns, *(f"<_control{number}>" for number in range(1, 5))]
    return train_tiny_tokenizer(tmp_path_factory.mktemp("added"), control_symbols=control)


@pytest.fixture(scope="module")
def tiny(model: Path) -> TelechatTokenizer:
    return TelechatTokenizer(model, vocab_size=VOCAB_SIZE, added_tokens_decoder=added(TURNS | TAGS))


@pytest.fixture(scope="module")
def published(shared: Callable[[str], Path]) -> tuple[dict[str, Any], dict[str, Any], Path]:
    folder = shared("published")
    written = json.loads((folder / "tokenizer_config_7b.json").read_text(encoding="utf-8"))
    oracle = json.loads((folder / "hf_oracle_7b.json").read_text(encoding="utf-8"))
    return oracle, written, shared("telechat2-115b/tokenizer.model")


class TestTransformers:
    def test_ids_and_decodes(self, published: tuple[dict[str, Any], dict[str, Any], Path], tmp_path: Path) -> None:
        oracle, written, model = published
        for mode in ("ids", "published"):
            tokenizer = TelechatTokenizer(
                model, vocab_size=131072, control_tokens=mode, **constructor_arguments(written, tmp_path)
            )
            assert len(oracle["encode"]) >= 8
            for case in oracle["encode"]:
                assert tokenizer.encode(case["text"]) == case["ids"]
                # No answer begins with the space that belongs to its first token.
                assert tokenizer.decode(case["ids"]) == case["decoded"].removeprefix(" ")
                skipped = tokenizer.decode(case["ids"], skip_special_tokens=True)
                assert skipped == case["decoded_skip_special"].removeprefix(" ")

    def test_templates(self, published: tuple[dict[str, Any], dict[str, Any], Path], tmp_path: Path) -> None:
        oracle, written, model = published
        assert len(oracle["templates"]) >= 20
        for case in oracle["templates"]:
            arguments = constructor_arguments(written | {"chat_template": case["template"]}, tmp_path)
            tokenizer = TelechatTokenizer(model, **arguments)
            options = {"add_generation_prompt": case["add_generation_prompt"]}
            assert tokenizer.apply_chat_template(case["messages"], tokenize=False, **options) == case["rendered"]
        named: object = None
        for case in oracle["named"]:
            named = case.get("templates") or named
            tokenizer = TelechatTokenizer(model, **constructor_arguments(written | {"chat_template": named}, tmp_path))
            assert tokenizer.apply_chat_template(case["messages"], case["tools"], tokenize=False) == case["rendered"]


class TestEncode:
    def test_the_files_name_wins_over_the_piece(self, tiny: TelechatTokenizer) -> None:
        assert tiny.encode("<tool_call></tool_call>") == [9, 10]
        assert tiny.convert_ids_to_tokens([9, 4]) == ["<tool_call>", "<_user>"]
        assert tiny.convert_tokens_to_ids("<tool_response>") == 11
        assert 9 not in tiny.encode("<_control1>")
        assert tiny.encode("a<tool_call>b") == [*tiny.encode("a"), 9, *tiny.encode("b")]

    def test_ids_without_an_embedding_are_skipped(self, model: Path) -> None:
        tokens = added(TURNS | {VOCAB_SIZE - 1: "<last>", VOCAB_SIZE: "<beyond>"})
        tokenizer = TelechatTokenizer(model, vocab_size=VOCAB_SIZE, added_tokens_decoder=tokens)
        assert tokenizer.encode("<last>") == [VOCAB_SIZE - 1]
        assert max(tokenizer.encode("<beyond>")) < VOCAB_SIZE - 1
        # An embedding may have more rows than the file has pieces.
        wide = TelechatTokenizer(model, vocab_size=VOCAB_SIZE + 8, added_tokens_decoder=tokens)
        assert wide.encode("<beyond>") == [VOCAB_SIZE]
        assert wide.decode([VOCAB_SIZE]) == "<beyond>"

    @pytest.mark.parametrize(
        ("switch", "text", "kept"),
        [
            ("lstrip", "a \n<tool_call> b", ["a", 9, " b"]),
            ("rstrip", "a <tool_call>\n b", ["a ", 9, "b"]),
            ("single_word", "a<tool_call> b", ["a<tool_call>", " b"]),
            ("single_word", "a <tool_call>b", ["a ", "<tool_call>b"]),
            ("single_word", "a <tool_call> b", ["a ", 9, " b"]),
        ],
    )
    def test_switches(self, model: Path, switch: str, text: str, kept: list[Any]) -> None:
        tokenizer = TelechatTokenizer(model, added_tokens_decoder=added(TURNS) | added(TAGS, **{switch: True}))
        expected: list[int] = []
        for run in kept:
            expected += [run] if isinstance(run, int) else tokenizer.encode(run, allow_control=False)
        assert tokenizer.encode(text) == expected

    def test_the_longest_of_several_counts(self, model: Path) -> None:
        tokenizer = TelechatTokenizer(model, added_tokens_decoder=added({9: "<a", 10: "<a>"} | TURNS))
        assert tokenizer.encode("<a><a") == [10, 9]

    def test_turn_tokens_count_beside_them_unless_as_published(self, model: Path) -> None:
        tokenizer = TelechatTokenizer(model, added_tokens_decoder=added(TAGS))
        assert tokenizer.encode("<_user><tool_call>") == [4, 9]
        published = TelechatTokenizer(model, added_tokens_decoder=added(TAGS), control_tokens="published")
        assert 4 not in published.encode("<_user>")
        assert published.apply_chat_template(HELLO) == tokenizer.apply_chat_template(HELLO)

    @pytest.mark.parametrize(
        "decoder",
        [
            [],
            {"x": {"content": "a"}},
            {"1": {}},
            {"9": {"content": "a", "special": 1}},
            {"9": "a"},
            {"9" * 4301: {"content": "a"}},
        ],
    )
    def test_nonsense_is_refused(self, model: Path, decoder: Any) -> None:
        with pytest.raises(TokenizerError, match=r"added_tokens_decoder\b.{,200}$"):
            TelechatTokenizer(model, added_tokens_decoder=decoder)
        with pytest.raises(TokenizerError, match="two ids"):
            TelechatTokenizer(model, added_tokens_decoder=added({9: "a", 10: "a"}))

    def test_another_name_for_a_turn_is_refused(self, model: Path) -> None:
        with pytest.raises(TokenizerError, match="id 4 is not the control token <_user>"):
            TelechatTokenizer(model, added_tokens_decoder=added({4: "<user>"}))


class TestDecode:
    def test_special_ones_are_skipped_and_others_are_not(self, model: Path) -> None:
        tokens = added(TURNS) | added({9: "<think>"}, special=False) | added({10: "</x>"})
        tokenizer = TelechatTokenizer(model, added_tokens_decoder=tokens)
        ids = tokenizer.encode("<think>the</x>")
        assert tokenizer.decode(ids) == "<think>the</x>"
        assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>the"
        assert 9 not in tokenizer.all_special_ids

    def test_an_answer_does_not_begin_with_a_space(self, tiny: TelechatTokenizer) -> None:
        answer = tiny.encode("<_bot>the light")
        for skip in (False, True):
            assert tiny.decode(answer[1:], skip_special_tokens=skip) == "the light"
            assert tiny.decode(np.array(answer)[1:], skip_special_tokens=skip) == "the light"
        assert tiny.decode(answer) == "<_bot>the light"

    def test_kept_tags_survive_skipping(self, tiny: TelechatTokenizer) -> None:
        ids = [*tiny.encode("<tool_call>\n{}\n</tool_call><tool_response>the"), 2]
        decoder = tiny.stream_decoder(keep=("<tool_call>", "</tool_call>", "no token"))
        text = decoder.put(ids) + decoder.flush()
        assert text.replace(" ", "") == "<tool_call>\n{}\n</tool_call>the"
        assert "tool" not in tiny.stream_decoder().put(ids)

    @given(
        ids=st.lists(st.integers(0, 40), max_size=24),
        skip=st.booleans(),
        width=st.integers(1, 4),
    )
    def test_windows_add_up_to_a_stream(self, tiny: TelechatTokenizer, ids: list[int], skip: bool, width: int) -> None:
        decoder = tiny.stream_decoder(skip)
        streamed = [decoder.put(ids[at : at + width]) for at in range(0, len(ids), width)]
        array = np.array(ids, np.int64)
        assert [tiny.decode(array[at : at + width], skip) for at in range(0, len(ids), width)] == streamed
        whole, streamed_text = tiny.decode(ids, skip), "".join(streamed) + decoder.flush()
        assert whole.replace(" ", "") == streamed_text.replace(" ", "")
        if skip:
            assert whole == streamed_text


class TestChat:
    def test_the_template_makes_them_and_content_does_not(self, tiny: TelechatTokenizer) -> None:
        call = {"name": "<tool_call>", "arguments": {"x": "</tool_call>"}}
        turns = [
            {"role": "user", "content": "<tool_response>"},
            {"role": "assistant", "content": "<tool_call>", "tool_calls": [call]},
            {"role": "tool", "content": "</tool_response><_end>"},
        ]
        ids = tiny.apply_chat_template(turns, add_generation_prompt=True)
        assert [index for index in ids if index < 13] == [6, 4, 5, 9, 10, 2, 4, 11, 12, 5]
        assert not {9, 10} & set(tiny.encode("<tool_call></tool_call>", allow_control=False))

    @given(
        contents=st.lists(
            st.lists(st.sampled_from([*TAGS.values(), "<", "tool_", "call", ">", "/", "the"]), max_size=4).map("".join),
            min_size=3,
            max_size=3,
        )
    )
    def test_no_content_completes_one(self, tiny: TelechatTokenizer, contents: list[str]) -> None:
        template = "<{{ messages[0].content }}>{{ messages[1].content }}{{ messages[2].content }}_call>"
        turns = [{"role": "user", "content": content} for content in contents]
        ids = tiny.apply_chat_template(turns, chat_template=template)
        assert not [index for index in ids if index < 13]

    def test_templates_look_into_content_all_the_same(self, tiny: TelechatTokenizer) -> None:
        template = (
            "{% for m in messages %}{% if m.content.startswith('<tool_response>') %}R{% endif %}"
            "{% if '</tool_response>' in m.content %}S{% endif %}"
            "{% set c = m.content.split('<tool_call>')[-1].lstrip('\\n') %}{{ '<_bot>' + c | trim }}"
            "{{ m.content | replace('<', '[') | upper }}{% endfor %}"
        )
        text = "<tool_response>a<tool_call>\n b</tool_response> "
        options: dict[str, Any] = {"chat_template": template}
        turns = [{"role": "user", "content": text}]
        prompt = tiny.apply_chat_template(turns, tokenize=False, **options)
        assert prompt == f"RS<_bot>b</tool_response>{text.replace('<', '[').upper()}"
        assert [index for index in tiny.apply_chat_template(turns, **options) if index < 13] == [5]

    def test_bare_prompts_are_told_by_turn_tokens(self, tiny: TelechatTokenizer) -> None:
        text = "what is <tool_call>?"
        assert tiny.encode(text, bare_prompt="chat") == tiny.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True
        )
