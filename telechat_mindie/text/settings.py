"""What a tokenizer_config.json, a yaml's `processor.tokenizer` or a caller may set on a TelechatTokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from telechat_mindie.errors import TokenizerError, name_some
from telechat_mindie.reading import read_json

CONTROL_TOKEN_MODES = ("ids", "published")
BARE_PROMPT_MODES = ("chat", "raw")
TURN_TOKEN_MODES = ("hide", "show")
FLAG = (False, True)

Choice = TypeVar("Choice", str, bool)

SETTINGS = (
    "add_bos_token",
    "add_eos_token",
    "bare_prompt",
    "bos_token",
    "chat_template",
    "clean_up_tokenization_spaces",
    "control_tokens",
    "eos_token",
    "model_max_length",
    "pad_token",
    "sp_model_kwargs",
    "turn_tokens",
)
"""Keys of a tokenizer_config.json that mean something here. Files by others hold many more."""

_COMMON_ARGUMENTS = """
    _commit_hash _from_auto added_tokens_decoder additional_special_tokens auto_map bot_token cache_dir call_end_token
    call_start_token code_revision fast_tokenizer force_download legacy local_files_only name_or_path padding_side
    processor_class repo_end_token repo_start_token revision spaces_between_special_tokens special_tokens_map_file
    split_special_tokens subfolder sys_token token tokenizer_class tokenizer_file truncation_side trust_remote_code type
    unk_token use_fast usr_token verbose
"""
WITHOUT_EFFECT = frozenset(_COMMON_ARGUMENTS.split())
"""Arguments that Hugging Face or mindformers give to any tokenizer, and that change nothing for this one."""


def read_settings(directory: Path) -> dict[str, Any]:
    """Constructor arguments from the tokenizer_config.json and config.json of a directory, either of which may lack.

    Raises:
        ConfigError: a file that cannot be read.
        TokenizerError: a chat_template that is neither Jinja source nor a list that names a default.
    """
    settings: dict[str, Any] = {}
    if (file := directory / "tokenizer_config.json").exists():
        settings = constructor_arguments(read_json(file), file)
    if (file := directory / "config.json").exists():
        settings["vocab_size"] = read_json(file).get("vocab_size")
    return settings


def constructor_arguments(written: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The settings in the content of a tokenizer_config.json.

    Raises:
        TokenizerError: a chat_template that is neither Jinja source nor a list that names a default.
    """
    settings = {key: written[key] for key in SETTINGS if written.get(key) is not None}
    settings["chat_template"] = _default_template(settings.get("chat_template"), file)
    return settings


def _default_template(template: object, file: Path) -> object:
    """Of several templates ({"name", "template"} each, as Hugging Face writes them) the one named default."""
    if not isinstance(template, list):
        return template
    named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if "default" not in named:
        raise TokenizerError("names no default chat_template", where=file, found=name_some(named) or "no name")
    return named["default"]


def check_choice(name: str, value: Choice, allowed: tuple[Choice, ...]) -> Choice:
    """`value`, if it is one of the allowed words, or flags.

    Raises:
        TokenizerError: anything else.
    """
    if type(value) is not type(allowed[0]) or value not in allowed:  # 1 is not True here
        choices = " or ".join(str(choice) for choice in allowed)
        raise TokenizerError("has an unknown value", where=name, expected=choices, found=repr(value))
    return value


def check_token(name: str, given: object, token: str) -> None:
    """Refuse another token in a role that the vocabulary's layout has fixed.

    Args:
        name: the role, such as `eos_token`.
        given: a string, an AddedToken (of any library), or the JSON of one.
        token: the piece that has the role.

    Raises:
        TokenizerError: another token.
    """
    content = given.get("content") if isinstance(given, Mapping) else getattr(given, "content", given)
    if content != token:
        raise TokenizerError("is not TeleChat2's", where=name, expected=token, found=repr(content))


def check_exact(clean_up_tokenization_spaces: object, sp_model_kwargs: object) -> None:
    """Refuse settings under which a text and its ids would not determine each other.

    Raises:
        TokenizerError: spaces would be removed from decoded text, or encoding would be sampled.
    """
    for name, value, fault, expected in (
        ("clean_up_tokenization_spaces", clean_up_tokenization_spaces, "change the text of an answer", "false"),
        ("sp_model_kwargs", sp_model_kwargs, "make prompts irreproducible", "nothing"),
    ):
        if value:
            raise TokenizerError(f"would {fault}", where=name, expected=expected, found=repr(value))


def refuse_unknown(arguments: Iterable[str]) -> None:
    """Refuse arguments that no tokenizer has: a misspelt setting must not be lost in silence.

    Raises:
        TokenizerError: with the unknown names.
    """
    unknown = sorted(set(arguments) - WITHOUT_EFFECT)
    if unknown:
        raise TokenizerError(
            f"knows no argument {name_some(unknown)}", where="TelechatTokenizer", expected=", ".join(SETTINGS)
        )
