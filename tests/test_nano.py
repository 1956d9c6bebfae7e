"""telechat2-nano, as shipped: a real checkpoint that becomes a directory and answers its questions."""

from __future__ import annotations

import json

import pytest
from helpers import ROOT

from telechat_mindie.checkpoint.source import open_checkpoint
from telechat_mindie.errors import OutputError
from telechat_mindie.model_dir.build import build
from telechat_mindie.nano import write_checkpoint

CORPUS = ROOT / "tools" / "nano_corpus.jsonl"


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    from telechat_mindie.engine.local import open_local

    root = tmp_path_factory.mktemp("nano")
    write_checkpoint(root / "telechat2-nano")
    build(root / "model_path", root / "telechat2-nano")
    return open_local(root / "model_path")


def ask(local, prompt_ids):
    from telechat_mindie.engine.params import GenerationParams

    outputs = list(local.engine.generate(prompt_ids, GenerationParams(max_new_tokens=200)))
    return "".join(output.text for output in outputs), outputs[-1].finish_reason.value


def test_the_checkpoint_is_published_format_and_small(tmp_path):
    write_checkpoint(tmp_path / "nano")
    checkpoint = open_checkpoint(tmp_path / "nano")
    assert checkpoint.dtype == "bfloat16"
    assert sum(file.stat().st_size for file in (tmp_path / "nano").iterdir()) < 8_000_000
    with pytest.raises(OutputError, match="not empty"):
        write_checkpoint(tmp_path / "nano")
    write_checkpoint(tmp_path / "nano", replace=True)


def test_the_question_of_the_readme(local):
    """Bare, as the curl request of the published README sends it to MindIE's /generate."""
    prompt_ids = local.tokenizer(["生抽与老抽的区别？"], return_tensors="np")["input_ids"][0].tolist()
    answer, reason = ask(local, prompt_ids)
    assert reason == "eos"
    assert answer.count("。") >= 2
    assert "生抽颜色浅" in answer and "老抽" in answer and "上色" in answer
    assert "<_" not in answer and "\ufffd" not in answer


def test_a_dozen_other_questions(local):
    entries = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    single = [entry for entry in entries if "answer" in entry and "system" not in entry]
    for entry in single[3 :: len(single) // 12]:
        messages = [{"role": "user", "content": entry["questions"][0]}]
        answer, reason = ask(local, local.tokenizer.apply_chat_template(messages, add_generation_prompt=True))
        assert (answer, reason) == (entry["answer"], "eos")


def test_a_second_turn(local):
    entries = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    (first, answer), (second, expected) = next(entry for entry in entries if "turns" in entry)["turns"]
    messages = [{"role": "user", "content": first}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": second})
    assert ask(local, local.tokenizer.apply_chat_template(messages, add_generation_prompt=True))[0] == expected
