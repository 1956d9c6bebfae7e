"""What a tokenizer_config.json, a yaml's `processor.tokenizer` or a caller may set on a TelechatTokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from telechat_mindie.errors import TokenizerError, name_some
from telechat_mindie.reading import read_json

CONTROL_TOKEN_MODES = ("ids", "published")
BARE_PROMPT_MODES = ("chat", "raw")
TURN_TOKEN_MODES = ("hide", "show")

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


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> str:
    """`value`, if it is one of the allowed words.

    Raises:
        TokenizerError: anything else.
    """
    if not isinstance(value, str) or value not in allowed:
        raise TokenizerError("has an unknown value", where=name, expected=" or ".join(allowed), found=repr(value))
    return value


def check_flag(name: str, value: object) -> bool:
    """`value`, if it is true or false.

    Raises:
        TokenizerError: anything else.
    """
    if not isinstance(value, bool):
        raise TokenizerError("is not a flag", where=name, expected="true or false", found=repr(value))
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
    if clean_up_tokenization_spaces:
        raise TokenizerError(
            "would change the text of an answer",
            where="clean_up_tokenization_spaces",
            expected="false",
            found=repr(clean_up_tokenization_spaces),
        )
    if sp_model_kwargs:
        raise TokenizerError(
            "would make prompts irreproducible",
            where="sp_model_kwargs",
            expected="nothing",
            found=repr(sp_model_kwargs),
        )


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
