"""What a checkpoint's tokenizer must be able to do before anything is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny_tokenizer import VOCAB_SIZE, write_tiny_checkpoint

from telechat_mindie.errors import TokenizerError
from telechat_mindie.reading import read_json
from telechat_mindie.text.trial import try_tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("trial"))


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{{ messages[0].no.role }}", "tokenizer_config.json: makes no prompt of a question: chat template: "),
        ("{{ messages | no_filter }}", "is not valid Jinja"),
        ("{% if tools %}{{ 1 / 0 }}{% else %}a{% endif %}", "makes no prompt of a question with a tool: "),
        ("", "makes an empty prompt of a question"),
        ("{% if tools %}{% else %}a{% endif %}", "makes an empty prompt"),
        ([{"name": "default", "template": "a"}, {"name": "tool_use", "template": "{{ 1 / 0 }}"}], "with a tool"),
        (7, "that is no text"),
    ],
)
def test_a_template_that_fails(tiny: Path, template: object, fault: str) -> None:
    with pytest.raises(TokenizerError, match=fault):
        try_tokenizer(tiny, VOCAB_SIZE, {"chat_template": template})


def test_the_file_is_named(tiny: Path) -> None:
    with pytest.raises(TokenizerError, match=r"^\S*tokenizer\.model: has more pieces"):
        try_tokenizer(tiny, VOCAB_SIZE - 1, {})
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: added_tokens_decoder: is not an object"):
        try_tokenizer(tiny, VOCAB_SIZE, {"added_tokens_decoder": []})


def test_a_template_may_choose_its_conversations(tiny: Path) -> None:
    for condition in ("true", "tools"):
        template = f"{{% if {condition} %}}{{{{ raise_exception('no') }}}}{{% endif %}}a"
        assert try_tokenizer(tiny, VOCAB_SIZE, {"chat_template": template}).chat_template == template


def test_as_the_directory_has_it(tiny: Path) -> None:
    written = read_json(tiny / "tokenizer_config.json")
    assert try_tokenizer(tiny, VOCAB_SIZE, written).encode("<_user>") == [4]


def test_the_file_of_a_template_is_named_once(tiny: Path) -> None:
    with pytest.raises(TokenizerError, match=r"^\S*/tokenizer_config\.json: has a chat_template that is no text"):
        try_tokenizer(tiny, VOCAB_SIZE, {"chat_template": 7})


@pytest.mark.parametrize("content", ["{}", '{"chat_template": null}'])
def test_a_file_of_a_template_without_one(tmp_path: Path, content: str) -> None:
    """It would hide tokenizer_config.json's own."""
    write_tiny_checkpoint(tmp_path)
    (tmp_path / "chat_template.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"^\S*/chat_template\.json: has a chat_template that is no text"):
        try_tokenizer(tmp_path, VOCAB_SIZE, {"chat_template": "a"})
