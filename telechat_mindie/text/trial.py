"""A checkpoint's tokenizer, tried before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from telechat_mindie.errors import InputError, TelechatMindieError, TokenizerError
from telechat_mindie.text.chat_template import RejectedError
from telechat_mindie.text.settings import constructor_arguments, template_file
from telechat_mindie.text.tokenizer import TelechatTokenizer

QUESTION = "生抽与老抽的区别？"
TURN = [{"role": "user", "content": QUESTION}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "查询天气",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def try_tokenizer(directory: Path, vocab_size: int, written: Mapping[str, Any]) -> TelechatTokenizer:
    """The tokenizer of a directory, with which a question was asked, once without and once with a tool.

    Args:
        directory: with a tokenizer.model; its template files count where they are there.
        vocab_size: rows of the embedding.
        written: the content of a tokenizer_config.json, in place of the directory's.

    Raises:
        ConfigError: a file that cannot be read.
        TokenizerError: no tokenizer comes of the files, or no prompt of the question.
    """
    model, config = directory / "tokenizer.model", directory / "tokenizer_config.json"
    arguments = constructor_arguments(written, directory)
    where = config
    try:
        tokenizer = TelechatTokenizer(model, vocab_size=vocab_size, **arguments)
        where = template_file(directory) or config
        for tools in (None, TOOLS):
            _ask(tokenizer, tools)
    except (InputError, TokenizerError) as error:
        # Of tokenizer.model an error speaks by itself.
        raise TokenizerError(str(error), where=None if str(error).startswith(f"{model}: ") else where) from None
    return tokenizer


def _ask(tokenizer: TelechatTokenizer, tools: object) -> None:
    try:
        ids = tokenizer.apply_chat_template(TURN, tools, add_generation_prompt=True)
    except RejectedError:  # by the template's own words: it may take other conversations, or know no tools
        return
    except TelechatMindieError as error:
        offer = " with a tool" if tools else ""
        raise TokenizerError(f"makes no prompt of a question{offer}: {error}") from None
    if not ids:
        raise TokenizerError("makes an empty prompt of a question")
