"""What a tokenizer_config.json, a yaml's `processor.tokenizer` or a caller may set on a TelechatTokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from telechat_mindie.errors import TokenizerError, name_some
from telechat_mindie.reading import read_json, read_text

CONTROL_TOKEN_MODES = ("ids", "published")
BARE_PROMPT_MODES = ("chat", "raw")
TURN_TOKEN_MODES = ("hide", "show")
FLAG = (False, True)

Choice = TypeVar("Choice", str, bool)

SETTINGS = (
    "add_bos_token",
    "add_eos_token",
    "added_tokens_decoder",
    "additional_special_tokens",
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
    "unk_token",
)
"""Keys of a tokenizer_config.json that mean something here. Files by others hold many more."""

_COMMON_ARGUMENTS = """
    _commit_hash _from_auto auto_map bot_token cache_dir call_end_token
    call_start_token code_revision fast_tokenizer force_download legacy local_files_only name_or_path padding_side
    processor_class repo_end_token repo_start_token revision spaces_between_special_tokens special_tokens_map_file
    split_special_tokens subfolder sys_token token tokenizer_class tokenizer_file truncation_side trust_remote_code type
    use_fast usr_token verbose
"""
WITHOUT_EFFECT = frozenset(_COMMON_ARGUMENTS.split())
"""Arguments that Hugging Face or mindformers give to any tokenizer, and that change nothing for this one."""


DEFAULT, WITH_TOOLS = "default", "tool_use"
"""Names of chat templates that transformers chooses by itself."""

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
"""What transformers writes beside tokenizer_config.json; the first that is there wins, over that file too."""

NAMED_TEMPLATES = "additional_chat_templates"
"""The folder of a NAME.jinja for each further template, beside chat_template.jinja (transformers 4.52 and later)."""

TEMPLATE_BYTES = 1 << 20
_MAX_NAMED = 32


def read_settings(directory: Path) -> dict[str, Any]:
    """Constructor arguments from a directory's tokenizer_config.json, template files and config.json, if there.

    Raises:
        ConfigError: a file that cannot be read.
        TokenizerError: a chat template that is neither Jinja source nor named ones with a default.
    """
    file = directory / "tokenizer_config.json"
    settings = constructor_arguments(read_json(file) if file.exists() else {}, directory)
    if (file := directory / "config.json").exists():
        settings["vocab_size"] = read_json(file).get("vocab_size")
    return settings


def constructor_arguments(written: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The settings in the content of a tokenizer_config.json, with the chat template that wins in its directory.

    Raises:
        ConfigError: a template file that cannot be read.
        TokenizerError: a chat template that is neither Jinja source nor named ones with a default, or a file of one
            that holds none.
    """
    settings = {key: written[key] for key in SETTINGS if written.get(key) is not None}
    source, file = settings.pop("chat_template", None), template_file(directory)
    if file is not None:
        is_json = file.suffix == ".json"
        source = read_json(file, TEMPLATE_BYTES).get("chat_template") if is_json else read_text(file, TEMPLATE_BYTES)
    if source is not None or file is not None:
        settings["chat_template"] = named_templates(source, file or directory / "tokenizer_config.json")
    if further := _further(directory):
        where = directory / NAMED_TEMPLATES
        if len(further) > _MAX_NAMED:
            raise TokenizerError("holds too many templates", where=where, expected=_MAX_NAMED, found=len(further))
        named = {path.stem: read_text(path, TEMPLATE_BYTES) for path in further}
        settings["chat_template"] = named_templates(settings.get("chat_template", {}) | named, where)
    return settings


def template_names(directory: Path) -> list[str]:
    """The files of a directory that hold chat templates, as paths in it."""
    names = [name for name in TEMPLATE_FILES if (directory / name).exists()]
    return names + [f"{NAMED_TEMPLATES}/{file.name}" for file in _further(directory)]


def _further(directory: Path) -> list[Path]:
    """The files of templates with a name of their own."""
    return sorted((directory / NAMED_TEMPLATES).glob("*.jinja"))


def template_file(directory: Path) -> Path | None:
    """The file that holds a directory's chat template; None where tokenizer_config.json may hold it."""
    return next((file for name in TEMPLATE_FILES if (file := directory / name).exists()), None)


def named_templates(source: object, where: object) -> dict[str, str]:
    """Chat templates by name, from Jinja source, or from transformers' list or object of several.

    Raises:
        TokenizerError: none of these, or no template named default.
    """
    if isinstance(source, str):
        source = {DEFAULT: source}
    elif isinstance(source, list):
        source = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
    if not isinstance(source, Mapping) or not all(isinstance(text, str) for text in source.values()):
        raise TokenizerError("has a chat_template that is no text", where=where, expected="Jinja source", found=source)
    if DEFAULT not in source:
        raise TokenizerError("names no default chat_template", where=where, found=name_some(source) or "no name")
    return dict(source)


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
    if (content := token_text(given)) != token:
        raise TokenizerError("is not TeleChat2's", where=name, expected=token, found=repr(content))


def token_text(given: object) -> object:
    """What a token is written as: a string, an AddedToken (of any library), or the JSON of one."""
    return given.get("content") if isinstance(given, Mapping) else getattr(given, "content", given)


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
