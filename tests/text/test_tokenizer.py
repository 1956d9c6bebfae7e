"""TelechatTokenizer: ids and texts, against the published tokenizer, sentencepiece, and MindIE's way of streaming."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny_tokenizer import VOCAB_SIZE, train_tiny_tokenizer, write_tiny_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

import telechat_mindie
from telechat_mindie.backend.get_model import get_model
from telechat_mindie.errors import ConfigError, InputError, ModelDirError, TelechatMindieError, TokenizerError
from telechat_mindie.text.input_builder import InputBuilder
from telechat_mindie.text.tokenizer import TelechatTokenizer

PUBLISHED = "telechat2-115b"
CONTROL = ["<_start>", "<_end>", "<_pad>", "<_user>", "<_bot>", "<_system>"]
PIECE, TRAINER_SETTINGS = 0x0A, 0x12  # tags of the fields 1 and 2 of sentencepiece's ModelProto
BYTES_OF = {"🙂": 4, "与": 3, "é": 2}  # characters that the tiny tokenizer has no piece for, and their byte tokens

# Text with all that can go wrong at a boundary: control tokens, their halves, runs of spaces, characters without a
# piece. U+2581 is sentencepiece's own sign for a space and cannot be told from one.
fragments = st.sampled_from(
    [*CONTROL, "<_us", "er>", "<", "_", ">", " ", "  ", "\n", "the", "生抽", *BYTES_OF, "0", "\0"]
)
texts = st.one_of(
    st.lists(fragments, max_size=12).map("".join),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=30),
)
plain_ids = st.lists(st.integers(9, VOCAB_SIZE - 1), max_size=24)
any_ids = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=24)


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(tiny_dir: Path) -> TelechatTokenizer:
    return TelechatTokenizer.from_pretrained(tiny_dir)


@pytest.fixture(scope="module")
def tiny_chat(tiny_dir: Path) -> TelechatTokenizer:
    return TelechatTokenizer.from_pretrained(tiny_dir, bare_prompt="chat")


@pytest.fixture(scope="module")
def oracle(shared: Callable[[str], Path]) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads(shared(f"{PUBLISHED}/tokenizer_oracle.json").read_text(encoding="utf-8"))
    return cases


class TestPublishedTokenizer:
    def test_published_mode_is_the_published_tokenizer(
        self, shared: Callable[[str], Path], oracle: list[dict[str, Any]]
    ) -> None:
        tokenizer = TelechatTokenizer.from_pretrained(shared(PUBLISHED), control_tokens="published")
        for case in oracle:
            assert tokenizer.encode(case["text"]) == case["official"]
            assert tokenizer.decode(case["official"]) == case["decode"]
            assert tokenizer.decode(np.array(case["official"], np.int64)) == case["decode"]
            assert tokenizer.decode(case["official"], skip_special_tokens=True) == case["decode_skip"]

    def test_content_is_encoded_as_sentencepiece_does(
        self, shared: Callable[[str], Path], oracle: list[dict[str, Any]]
    ) -> None:
        tokenizer = TelechatTokenizer.from_pretrained(shared(PUBLISHED))
        for case in oracle:
            assert tokenizer.encode(case["text"], allow_control=False) == case["raw_sp"]
            assert tokenizer.tokenize(case["text"], allow_control=False) == case["pieces"]
            assert tokenizer.decode(case["raw_sp"]) == case["text"]

    def test_ids_mode_recognises_control_tokens_and_stays_in_the_vocabulary(
        self, shared: Callable[[str], Path], oracle: list[dict[str, Any]]
    ) -> None:
        tokenizer = TelechatTokenizer.from_pretrained(shared(PUBLISHED))
        assert tokenizer.encode("<_start><_user>生抽与老抽的区别？<_bot>") == [
            *(1, 4),
            *(25104, 127499, 126325, 73611, 29151, 126271),
            5,
        ]
        for case in oracle:
            ids = tokenizer.encode(case["text"])
            assert tokenizer.decode(ids) == case["text"]
            assert max(ids, default=0) < len(tokenizer) == 131072
            assert sum(index <= 6 for index in ids) == sum(case["text"].count(token) for token in CONTROL)

    @pytest.mark.parametrize("name", ["mha_fp32", "moe_fp32"])
    def test_oracle_checkpoints(self, shared: Callable[[str], Path], name: str) -> None:
        tokenizer = TelechatTokenizer.from_pretrained(shared(f"oracle/{name}/ckpt"))
        assert tokenizer.decode(tokenizer.encode("<_user>生抽🙂<_bot>")) == "<_user>生抽🙂<_bot>"


class TestEncode:
    def test_each_run_between_control_tokens_is_encoded_on_its_own(self, tiny: TelechatTokenizer) -> None:
        question, answer = tiny.encode("老抽 the"), tiny.encode(" light\n")
        assert tiny.encode("<_user>老抽 the<_bot> light\n<_end>") == [4, *question, 5, *answer, 2]

    def test_published_mode_on_single_words(self, tiny_dir: Path) -> None:
        tokenizer = TelechatTokenizer.from_pretrained(tiny_dir, control_tokens="published")
        content = {
            text: tokenizer.encode(text, allow_control=False) for text in ("a<_end>", "a ", " b", "b", "<_end>b")
        }
        assert tokenizer.encode("a<_end>b") == content["a<_end>"] + content["b"]
        assert tokenizer.encode("a <_end> b") == [*content["a "], 2, *content[" b"]]
        assert tokenizer.encode("a <_end>b") == content["a "] + content["<_end>b"]
        assert tokenizer.encode("<_start>b") == [1, *content["b"]]
        assert tokenizer.encode("<_pad>") == [3]
        assert not {4, 5, 6} & set(tokenizer.encode("<_user><_bot><_system>"))

    @given(text=texts)
    def test_without_control_nothing_is_a_control_id(self, tiny: TelechatTokenizer, text: str) -> None:
        ids = tiny.encode(text, allow_control=False)
        assert all(index >= 9 for index in ids)
        assert tiny.decode(ids) == text

    @given(text=texts)
    def test_round_trip(self, tiny: TelechatTokenizer, text: str) -> None:
        ids = tiny.encode(text)
        assert tiny.decode(ids) == text
        assert [index for index in ids if index <= 6] == [
            1 + CONTROL.index(token) for token in _control_tokens_in(text)
        ]

    def test_begin_and_end_tokens(self, tiny_dir: Path) -> None:
        tokenizer = TelechatTokenizer.from_pretrained(tiny_dir, add_bos_token=True, add_eos_token=True)
        plain = tokenizer.encode("the", add_special_tokens=False)
        assert tokenizer.encode("the") == [1, *plain, 2]
        assert not {1, 2} & set(plain)

    def test_a_megabyte_takes_linear_time(self, tiny: TelechatTokenizer) -> None:
        for unit in ("<_user>老抽 the<_bot>", "a", " ", "<_us"):
            text = unit * (1_000_000 // len(unit.encode()))
            began = time.perf_counter()
            ids = tiny.encode(text)
            assert time.perf_counter() - began < 10  # about 0.4 s; a quadratic pass would take hours
            assert len(ids) >= len(text) // 128

    @pytest.mark.parametrize("text", ["\ud800", "good \udfff", None, 7, b"bytes"])
    def test_what_is_not_text_is_refused(self, tiny: TelechatTokenizer, text: Any) -> None:
        with pytest.raises(InputError, match="text: "):
            tiny.encode(text)
        with pytest.raises(InputError):
            tiny([text])


class TestCall:
    def test_as_mindie_calls_it(self, tiny: TelechatTokenizer) -> None:
        ids = tiny(["<_user>the"], return_tensors="np")["input_ids"]
        assert ids.dtype == np.int64
        assert ids[0].tolist() == tiny.encode("<_user>the")

    def test_lists_and_masks(self, tiny: TelechatTokenizer) -> None:
        short, long = tiny.encode("a"), tiny.encode("a dark colour")
        assert tiny("a") == {"input_ids": short, "attention_mask": [1] * len(short)}
        assert tiny(["a", "a dark colour"]) == {
            "input_ids": [short, long],
            "attention_mask": [[1] * len(short), [1] * len(long)],
        }
        assert tiny(["a", "a"], return_tensors="np")["attention_mask"].shape == (2, len(short))
        assert tiny([], return_tensors="np")["input_ids"].shape == (0, 0)

    def test_what_has_no_array_is_refused(self, tiny: TelechatTokenizer) -> None:
        with pytest.raises(InputError, match="different lengths"):
            tiny(["a", "a dark colour"], return_tensors="np")
        with pytest.raises(InputError, match="return_tensors"):
            tiny("a", return_tensors="pt")
        with pytest.raises(InputError, match="list of texts"):
            tiny({"a": 1})  # type: ignore[arg-type]


class TestBarePrompt:
    def test_a_bare_text_becomes_a_user_turn(self, tiny: TelechatTokenizer, tiny_chat: TelechatTokenizer) -> None:
        question = [{"role": "user", "content": "老抽？"}]
        prompt = tiny.apply_chat_template(question, add_generation_prompt=True)
        assert tiny_chat(["老抽？"], return_tensors="np")["input_ids"][0].tolist() == prompt
        assert tiny_chat.encode("老抽？") == prompt
        assert tiny.encode("老抽？", bare_prompt="chat") == prompt
        assert prompt[-1] == 5

    @pytest.mark.parametrize("token", CONTROL)
    def test_a_text_with_a_control_token_is_left_as_it_is(
        self, tiny: TelechatTokenizer, tiny_chat: TelechatTokenizer, token: str
    ) -> None:
        assert tiny_chat.encode(f"the {token}") == tiny.encode(f"the {token}")

    def test_opting_out(self, tiny: TelechatTokenizer, tiny_chat: TelechatTokenizer) -> None:
        assert tiny_chat.encode("老抽？", bare_prompt="raw") == tiny.encode("老抽？")
        assert tiny_chat.encode("<_bot>", allow_control=False) == tiny.encode("<_bot>", allow_control=False)
        with pytest.raises(TokenizerError, match="chat or raw"):
            tiny.encode("老抽？", bare_prompt="neither")

    def test_is_read_from_the_directory(self, tmp_path: Path) -> None:
        write_tiny_checkpoint(tmp_path, bare_prompt="chat", control_tokens="ids")
        assert TelechatTokenizer.from_pretrained(tmp_path).encode("a")[0] == 6
        assert TelechatTokenizer.from_pretrained(tmp_path, bare_prompt="raw").encode("a")[0] != 6


class TestDecode:
    @given(ids=plain_ids)
    def test_agrees_with_sentencepiece(self, tiny: TelechatTokenizer, tiny_dir: Path, ids: list[int]) -> None:
        sentencepiece = SentencePieceProcessor(model_file=str(tiny_dir / "tokenizer.model"))
        assert tiny.decode(ids) == sentencepiece.decode(ids)

    @given(ids=any_ids)
    def test_skipping_leaves_no_control_token(self, tiny: TelechatTokenizer, ids: list[int]) -> None:
        runs = "".join(map(tiny.decode, _runs_without_control(ids)))
        assert tiny.decode(ids, skip_special_tokens=True) == runs

    @pytest.mark.parametrize("make", [list, tuple, np.array, lambda ids: np.array(ids, np.int32)])
    def test_forms_of_ids(self, tiny: TelechatTokenizer, make: Callable[[list[int]], Any]) -> None:
        assert tiny.decode(make(tiny.encode("the 🙂"))) == "the 🙂"
        assert tiny.decode(make([])) == ""

    def test_one_id(self, tiny: TelechatTokenizer) -> None:
        assert tiny.decode(5) == tiny.decode(np.int64(5)) == "<_bot>"

    def test_batch(self, tiny: TelechatTokenizer) -> None:
        ids = np.array([tiny.encode("a <_end>"), tiny.encode("a <_bot>")])
        assert tiny.batch_decode(ids) == ["a <_end>", "a <_bot>"]
        assert tiny.batch_decode(ids, skip_special_tokens=True) == ["a ", "a "]

    @pytest.mark.parametrize("character", BYTES_OF)
    def test_a_cut_off_character(self, tiny: TelechatTokenizer, character: str) -> None:
        ids = tiny.encode(f"the{character}")
        assert len(ids) == len(tiny.encode("the")) + BYTES_OF[character]
        for cut in range(1, BYTES_OF[character]):
            assert tiny.decode(ids[:-cut]) == "the" + "\ufffd" * (BYTES_OF[character] - cut)

    def test_a_control_token_ends_a_character(self, tiny: TelechatTokenizer) -> None:
        first, *rest = tiny.encode("与")[-3:]
        assert tiny.decode([first, *rest]) == "与"
        assert tiny.decode([first, 2, *rest], skip_special_tokens=True) == "\ufffd" * 3
        assert tiny.decode([first, 2, *rest]) == "\ufffd<_end>\ufffd\ufffd"

    @pytest.mark.parametrize(
        "ids", [[VOCAB_SIZE], [-1], [2**40], ["a"], [1.5], "ab", [[1]], None, np.zeros((1, 1), int)]
    )
    def test_what_is_not_ids_is_refused(self, tiny: TelechatTokenizer, ids: Any) -> None:
        with pytest.raises(InputError, match="token id"):
            tiny.decode(ids)

    def test_rows_of_the_embedding_without_a_piece_are_silent(self, tiny_dir: Path) -> None:
        tokenizer = TelechatTokenizer(tiny_dir / "tokenizer.model", vocab_size=VOCAB_SIZE + 8)
        assert tokenizer.decode([*tokenizer.encode("the"), VOCAB_SIZE + 7]) == "the"
        assert tokenizer.convert_ids_to_tokens(VOCAB_SIZE + 7) == ""
        with pytest.raises(InputError, match=f"0 to {VOCAB_SIZE + 7}"):
            tokenizer.decode([VOCAB_SIZE + 8])


class TestTurnTokens:
    def test_the_frame_of_an_answer_is_not_part_of_it(
        self, tiny: TelechatTokenizer, tiny_chat: TelechatTokenizer
    ) -> None:
        answer = tiny.encode("<_bot>老抽<_end><_pad><_pad>")
        assert tiny.decode(answer) == "<_bot>老抽<_end><_pad><_pad>"
        assert tiny_chat.decode(answer) == "老抽"

    def test_tokens_within_are_printed(self, tiny_chat: TelechatTokenizer) -> None:
        for text in ("<_system>a<_bot>b<_end>\n<_user>c<_bot>", "a<_end><_pad><_user>c", "<_system><_bot><_pad>a"):
            assert tiny_chat.decode(tiny_chat.encode(text)) == text

    def test_may_be_set_apart_from_bare_prompts(self, tiny_dir: Path) -> None:
        tokenizer = TelechatTokenizer.from_pretrained(tiny_dir, turn_tokens="hide")
        assert tokenizer.decode(tokenizer.encode("the<_end>")) == "the"


def mindie_stream(tokenizer: TelechatTokenizer, ids: list[int], steps: list[int], skip: bool, advance: bool) -> str:
    """What a client of MindIE receives: mf_tokenizer_wrapper's windows, with its marks moved after every step.

    Args:
        steps: tokens that arrive at once, again and again.
        advance: whether the marks move after a step without output, as they do in MindIE-LLM v3.0.0.beta.2.
    """
    emitted, previous, current, end, step = [], 0, 0, 0, 0
    while end < len(ids):
        end, step = end + steps[step % len(steps)], step + 1
        array = np.array(ids[:end])
        window = tokenizer.decode(array[previous:], skip_special_tokens=skip)
        seen = tokenizer.decode(array[previous:current], skip_special_tokens=skip)
        if len(window) > len(seen) and not window.endswith("\ufffd"):
            emitted.append(window[len(seen) :])
        elif not advance:
            continue
        previous, current = current, len(array)
    return "".join(emitted)


def mindie_stop_text(tokenizer: TelechatTokenizer, ids: list[int], width: int = 3) -> str:
    """The text that MindIE searches for stop strings: tg_decode_util.decode_one, token by token."""
    output = ""
    for end in range(1, len(ids) + 1):
        array = np.array(ids[:end])
        start = max(end - 1 - width, 0)
        window = tokenizer.decode(array[start:], skip_special_tokens=True)
        seen = tokenizer.decode(array[start : end - 1], skip_special_tokens=True).rstrip("\ufffd") if end > 1 else ""
        if len(window) > len(seen) and not window.endswith("\ufffd"):
            output += window[len(seen) :]
    return output


class TestStreaming:
    @given(
        text=texts, steps=st.lists(st.integers(1, 5), min_size=1, max_size=4), skip=st.booleans(), advance=st.booleans()
    )
    def test_mindie_streams_the_whole_text(
        self, tiny: TelechatTokenizer, text: str, steps: list[int], skip: bool, advance: bool
    ) -> None:
        text = text.replace("\ufffd", "")  # MindIE holds back any text that ends with it
        ids = tiny.encode(text)
        assert mindie_stream(tiny, ids, steps, skip, advance) == tiny.decode(ids, skip_special_tokens=skip)

    @given(ids=any_ids, skip=st.booleans())
    def test_mindie_streams_all_but_broken_bytes(self, tiny: TelechatTokenizer, ids: list[int], skip: bool) -> None:
        whole = tiny.decode(ids, skip_special_tokens=skip)
        streamed = mindie_stream(tiny, ids, [1], skip, advance=True)
        assert streamed.replace("\ufffd", "") == whole.replace("\ufffd", "")

    @given(text=texts)
    def test_mindie_finds_stop_strings(self, tiny: TelechatTokenizer, text: str) -> None:
        text = text.replace("\ufffd", "")
        ids = tiny.encode(text)
        assert mindie_stop_text(tiny, ids) == tiny.decode(ids, skip_special_tokens=True)

    def test_answer_frames_are_not_streamed(self, tiny_chat: TelechatTokenizer) -> None:
        ids = tiny_chat.encode("<_bot>老抽🙂 the<_end>")
        assert mindie_stream(tiny_chat, ids, [1], skip=False, advance=True) == "老抽🙂 the"

    def test_slices_share_out_the_characters(self, tiny: TelechatTokenizer) -> None:
        ids = np.array(tiny.encode("the 🙂 light"))
        for cut in range(len(ids) + 1):
            assert tiny.decode(ids[:cut]) + tiny.decode(ids[cut:]) == "the 🙂 light"

    def test_a_slice_of_a_prompt_and_an_answer(self, tiny: TelechatTokenizer) -> None:
        prompt, answer = tiny.encode("<_user>the<_bot>"), tiny.encode("light 🙂")
        assert tiny.decode(np.array(prompt + answer)[len(prompt) :]) == "light 🙂"

    def test_only_slices_of_one_dimension_are_windows(self, tiny: TelechatTokenizer) -> None:
        ids = np.array(tiny.encode("the light"))
        last = tiny.decode(ids[-1:].copy())
        assert not last.startswith(" ")
        assert tiny.decode(ids[-1:]) == " " + last
        assert tiny.decode(ids[::-1][:1]) == last
        assert tiny.decode(np.stack([ids, ids])[0, -1:]) == last

    def test_padding_before_a_slice_does_not_matter(self, tiny: TelechatTokenizer) -> None:
        ids = np.array([-1, VOCAB_SIZE, *tiny.encode("<_bot>the")])
        assert tiny.decode(ids[2:], skip_special_tokens=True) == "the"

    @given(
        ids=any_ids, skip=st.booleans(), hide=st.booleans(), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3)
    )
    def test_stream_decoder_adds_up(
        self,
        tiny: TelechatTokenizer,
        tiny_chat: TelechatTokenizer,
        ids: list[int],
        skip: bool,
        hide: bool,
        sizes: list[int],
    ) -> None:
        tokenizer = tiny_chat if hide else tiny
        decoder = tokenizer.stream_decoder(skip_special_tokens=skip)
        parts, start, turn = [], 0, 0
        while start < len(ids):
            size, turn = sizes[turn % len(sizes)], turn + 1
            parts.append(decoder.put(ids[start : start + size]))
            start += size
        parts.append(decoder.flush())
        assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=skip)

    def test_stream_decoder_never_splits_a_character(self, tiny: TelechatTokenizer) -> None:
        decoder = tiny.stream_decoder()
        assert [decoder.put([index]) for index in tiny.encode("the🙂")][-5:] == ["the", "", "", "", "🙂"]
        assert decoder.flush() == ""

    def test_stream_decoder_starts_anew_after_a_flush(self, tiny: TelechatTokenizer) -> None:
        decoder = tiny.stream_decoder()
        decoder.put(tiny.encode("the🙂")[:-1])
        assert decoder.flush() == "\ufffd" * 3
        assert decoder.put(tiny.encode("the")) == "the"


class TestVocabulary:
    def test_names_and_ids(self, tiny: TelechatTokenizer) -> None:
        assert len(tiny) == tiny.vocab_size == VOCAB_SIZE
        assert tiny.convert_tokens_to_ids(["<_unk>", *CONTROL]) == list(range(7))
        assert tiny.convert_ids_to_tokens(np.arange(7)) == ["<_unk>", *CONTROL]
        assert tiny.convert_ids_to_tokens(4) == "<_user>"
        assert tiny.convert_tokens_to_ids("no such piece") == tiny.unk_token_id == 0
        assert (tiny.bos_token_id, tiny.eos_token_id, tiny.pad_token_id) == (1, 2, 3)
        assert (tiny.bos_token, tiny.eos_token, tiny.pad_token) == ("<_start>", "<_end>", "<_pad>")
        assert tiny.all_special_ids == list(range(9))
        with pytest.raises(InputError):
            tiny.convert_ids_to_tokens(VOCAB_SIZE)

    def test_larger_than_the_model_is_refused(self, tmp_path: Path) -> None:
        write_tiny_checkpoint(tmp_path)
        (tmp_path / "config.json").write_text(f'{{"vocab_size": {VOCAB_SIZE - 1}}}', encoding="utf-8")
        with pytest.raises(TokenizerError, match=f"expected at most {VOCAB_SIZE - 1}, found {VOCAB_SIZE}"):
            TelechatTokenizer.from_pretrained(tmp_path)

    @pytest.mark.parametrize("size", [0, -1, "480", 480.0])
    def test_a_vocabulary_size_is_a_number(self, tiny_dir: Path, size: Any) -> None:
        with pytest.raises(TokenizerError, match="vocab_size"):
            TelechatTokenizer(tiny_dir / "tokenizer.model", vocab_size=size)

    @pytest.mark.parametrize("keep", [0, 1, 100, 5000, -1])
    def test_a_truncated_file_is_refused(self, tiny_dir: Path, tmp_path: Path, keep: int) -> None:
        damaged = tmp_path / "tokenizer.model"
        damaged.write_bytes((tiny_dir / "tokenizer.model").read_bytes()[:keep])
        with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
            TelechatTokenizer(damaged)

    def test_a_file_cut_between_two_records_is_refused(self, tiny_dir: Path, tmp_path: Path) -> None:
        data = (tiny_dir / "tokenizer.model").read_bytes()
        records = list(_records(data))
        assert b"".join(records) == data
        for missing in ("normalizer settings", "all settings", "a piece"):
            kept = {
                "normalizer settings": [record for record in records if record[0] in (PIECE, TRAINER_SETTINGS)],
                "all settings": [record for record in records if record[0] == PIECE],
                "a piece": records[:7],
            }[missing]
            (tmp_path / "tokenizer.model").write_bytes(b"".join(kept))
            with pytest.raises(TokenizerError, match="damaged"):
                TelechatTokenizer(tmp_path / "tokenizer.model")

    def test_a_piece_that_is_not_utf8_is_refused(self, tiny_dir: Path, tmp_path: Path) -> None:
        data = (tiny_dir / "tokenizer.model").read_bytes()
        (tmp_path / "tokenizer.model").write_bytes(data.replace("老抽".encode(), b"\xff" * 6, 1))
        with pytest.raises(TokenizerError, match="damaged"):
            TelechatTokenizer(tmp_path / "tokenizer.model")

    @pytest.mark.parametrize(
        ("options", "fault"),
        [
            ({"control_symbols": ["<_bot>", "<_user>", "<_system>"]}, "id 4 is not the control token <_user>"),
            ({"control_symbols": [], "user_defined_symbols": ["<_user>", "<_bot>", "<_system>"]}, "id 4"),
            ({"bos_piece": "<s>"}, "id 1 is not the control token <_start>"),
            ({"unk_id": 3, "pad_id": 0}, "id 0 is not its unknown token"),
            ({"remove_extra_whitespaces": True}, "does not keep the spaces"),
        ],
    )
    def test_another_layout_is_refused(self, tmp_path: Path, options: dict[str, Any], fault: str) -> None:
        file = train_tiny_tokenizer(tmp_path, **options)
        with pytest.raises(TokenizerError, match=fault):
            TelechatTokenizer(file)

    def test_what_is_no_file_is_refused(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        for name, fault in [("absent", "missing"), (".", "regular file"), ("fifo", "regular file")]:
            with pytest.raises(TokenizerError, match=fault):
                TelechatTokenizer(tmp_path / name)
        with pytest.raises(TokenizerError, match="not a path"):
            TelechatTokenizer(None)  # type: ignore[arg-type]
        with pytest.raises(TokenizerError, match="not a directory"):
            TelechatTokenizer.from_pretrained(tmp_path / "absent")


class TestSettings:
    def test_as_mindformers_builds_it(self, tiny_dir: Path) -> None:
        from_yaml = TelechatTokenizer(
            vocab_file=str(tiny_dir / "tokenizer.model"),
            unk_token="<unk>",
            bos_token="<_start>",
            eos_token="<_end>",
            pad_token="<_pad>",
            type="TelechatTokenizer",
        )
        from_auto = TelechatTokenizer.from_pretrained(
            str(tiny_dir), revision=None, trust_remote_code=False, use_fast=True
        )
        assert from_yaml.encode("<_user>the") == from_auto.encode("<_user>the")

    def test_the_published_settings_are_accepted(self, tmp_path: Path) -> None:
        added = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": True}
        write_tiny_checkpoint(
            tmp_path,
            tokenizer_class="TelechatTokenizer",
            auto_map={"AutoTokenizer": ["tokenization_telechat.TelechatTokenizer", None]},
            clean_up_tokenization_spaces=False,
            eos_token=added | {"content": "<_end>"},
            pad_token=added | {"content": "<_pad>"},
            unk_token=added | {"content": "<_end>"},
            bos_token=None,
            chat_template=None,
            model_max_length=100000000,
            sp_model_kwargs={},
            some_key_of_another_tool=1,
        )
        assert TelechatTokenizer.from_pretrained(tmp_path).model_max_length == 100000000

    @pytest.mark.parametrize(
        "options",
        [
            {"vocabulary_file": "x"},
            {"eos_token": "</s>"},
            {"bos_token": None},
            {"pad_token": {"content": "<pad>"}},
            {"additional_special_tokens": "<a>"},
            {"control_tokens": "all"},
            {"bare_prompt": True},
            {"turn_tokens": "maybe"},
            {"add_bos_token": "false"},
            {"clean_up_tokenization_spaces": True},
            {"sp_model_kwargs": {"enable_sampling": True}},
        ],
    )
    def test_nonsense_is_refused_by_name(self, tiny_dir: Path, options: dict[str, Any]) -> None:
        with pytest.raises(TokenizerError, match=next(iter(options))):
            TelechatTokenizer.from_pretrained(tiny_dir, **options)

    def test_settings_of_the_directory_are_checked_too(self, tmp_path: Path) -> None:
        write_tiny_checkpoint(tmp_path, control_tokens="some")
        with pytest.raises(TokenizerError, match="ids or published"):
            TelechatTokenizer.from_pretrained(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
        with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
            TelechatTokenizer.from_pretrained(tmp_path)

    def test_only_the_model_file_is_needed(self, tmp_path: Path) -> None:
        train_tiny_tokenizer(tmp_path)
        assert len(TelechatTokenizer.from_pretrained(tmp_path)) == VOCAB_SIZE

    def test_chat_template_of_the_directory(self, tmp_path: Path) -> None:
        write_tiny_checkpoint(tmp_path, chat_template="<_user>{{ messages[0].content }}")
        tokenizer = TelechatTokenizer.from_pretrained(tmp_path)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "<_user>a"
        named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
        write_tiny_checkpoint(tmp_path, chat_template=named)
        assert TelechatTokenizer.from_pretrained(tmp_path).chat_template == "yes"
        write_tiny_checkpoint(tmp_path, chat_template=named[:1])
        with pytest.raises(TokenizerError, match="no default chat_template"):
            TelechatTokenizer.from_pretrained(tmp_path)


class TestProcesses:
    def test_pickle(self, tiny_dir: Path) -> None:
        tokenizer = TelechatTokenizer.from_pretrained(tiny_dir, bare_prompt="chat", control_tokens="published")
        copy = pickle.loads(pickle.dumps(tokenizer))
        for text in ("the🙂", "a <_end> <_user>"):
            assert copy.encode(text) == tokenizer.encode(text)
            assert copy.decode(copy.encode(text)) == tokenizer.decode(tokenizer.encode(text))

    def test_several_processes(self, tiny: TelechatTokenizer) -> None:
        texts = ["<_user>the🙂", "老抽", ""]
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            assert list(pool.map(tiny.encode, texts)) == list(map(tiny.encode, texts))


class TestGetModel:
    def test_as_mindie_calls_it(self, tiny_dir: Path, tiny: TelechatTokenizer) -> None:
        tokenizer, builder = get_model(str(tiny_dir))
        assert isinstance(tokenizer, TelechatTokenizer)
        assert isinstance(builder, InputBuilder)
        messages = [{"role": "user", "content": "老抽？"}]
        ids = builder.make_context(0, messages, chat_template_kwargs={"enable_thinking": False})
        assert ids == tiny.apply_chat_template(messages, add_generation_prompt=True)
        assert builder.make_context(1, messages, False, True) == tiny.apply_chat_template(messages)

    def test_ignores_what_mindformers_takes(self, tiny_dir: Path) -> None:
        tokenizer, _ = telechat_mindie.get_model(tiny_dir, None, trust_remote_code=False, use_fast=True)
        assert len(tokenizer) == VOCAB_SIZE

    def test_tools_by_argument_or_as_mindie_appends_them(self, tiny_dir: Path) -> None:
        _, builder = get_model(tiny_dir)
        messages = [{"role": "user", "content": "北京"}]
        tools = [{"type": "function", "function": {"name": "get_weather"}}]
        appended = [*messages, {"role": "tools_call", "tools": tools, "tool_choice": "auto", "content": ""}]
        assert builder.make_context(0, appended) == builder.make_context(0, messages, tools=tools)
        assert builder.make_context(0, appended) != builder.make_context(0, messages)

    def test_a_thinking_model_does_not_see_its_earlier_thoughts(self, tmp_path: Path) -> None:
        """MindIE hands over the client's messages as they are, so that nobody else would drop them."""
        shown = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
        named = [{"name": "default", "template": shown}, {"name": "tool_use", "template": shown + "<_bot><think>"}]
        tokenizer = TelechatTokenizer.from_pretrained(write_tiny_checkpoint(tmp_path, chat_template=named))
        thought = "<think>\na\n</think>\n\nb"
        call = {"name": "f", "arguments": {}}
        messages = [
            {"role": "user", "content": [{"type": "text", "text": thought}]},
            {"role": "assistant", "content": [{"type": "text", "text": thought}]},
            {"role": "bot", "content": thought},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
        builder = InputBuilder(tokenizer)
        kept = f"user:{thought};assistant:{thought};bot:{thought};assistant:;"
        assert tokenizer.decode(builder.make_context(0, messages)) == kept
        dropped = f"user:{thought};assistant:b;bot:b;assistant:;<_bot><think>"
        tools = [{"name": "f"}]
        assert tokenizer.decode(builder.make_context(0, messages, tools=tools)) == dropped
        appended = [*messages, {"role": "tools_call", "tools": tools, "content": ""}]
        assert tokenizer.decode(builder.make_context(0, appended)) == dropped

    def test_a_bad_directory_is_a_sentence(self, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.touch()
        for path in (tmp_path / "absent", file):
            with pytest.raises(ModelDirError, match="is not a model directory"):
                get_model(path)
        with pytest.raises(TelechatMindieError, match=r"tokenizer\.model: file is missing"):
            get_model(tmp_path)


def _control_tokens_in(text: str) -> list[str]:
    starts = {text.find(token, at): token for at in range(len(text)) for token in CONTROL}
    return [starts[at] for at in sorted(starts) if at >= 0]


def _runs_without_control(ids: list[int]) -> list[list[int]]:
    runs: list[list[int]] = [[]]
    for index in ids:
        if index < 9:
            runs.append([])
        else:
            runs[-1].append(index)
    return runs


def _records(data: bytes) -> Iterator[bytes]:
    """The top-level fields of a protobuf message, all of which are length-delimited in a sentencepiece model."""
    start = 0
    while start < len(data):
        length, shift, at = 0, 0, start + 1
        while True:
            length |= (data[at] & 0x7F) << shift
            shift, at = shift + 7, at + 1
            if data[at - 1] < 0x80:
                break
        yield data[start : at + length]
        start = at + length
