"""What stands beside the weights of a directory that vLLM, vllm-ascend, atb and transformers load as it is.

Who reads what of it, run with transformers 4.55 and 5.19, vLLM 0.32 and atb_llm of MindIE 3.0:

- vLLM knows the model by `architectures`, and only under this name; transformers and vLLM load
  configuration_telechat2.py by `auto_map`, and transformers modeling_telechat2.py too.
- atb_llm knows it by `model_type`, and looks for "telechat2" in the values of `auto_map`. It reads the ids of a turn
  from generation_config.json, and knows no default for any size.
- All but atb take tokenizer.json, and the chat template of tokenizer_config.json or of the files beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from telechat_mindie.checkpoint.elsewhere.tokenizer_json import tokenizer_json
from telechat_mindie.checkpoint.formats.bounds import open_bounded
from telechat_mindie.checkpoint.generation import read_generation
from telechat_mindie.config import SPELLINGS, TelechatConfig
from telechat_mindie.reading import parse_json
from telechat_mindie.staging import dump_json
from telechat_mindie.text.control_tokens import CONTROL_IDS
from telechat_mindie.text.settings import constructor_arguments, template_names
from telechat_mindie.text.tokenizer import TelechatTokenizer

ARCHITECTURE = "TeleChat2ForCausalLM"
CODE = ("configuration_telechat2.py", "modeling_telechat2.py")
AUTO_MAP = {
    "AutoConfig": "configuration_telechat2.TeleChat2Config",
    "AutoModelForCausalLM": f"modeling_telechat2.{ARCHITECTURE}",
}

LOADERS_KEYS = {"architectures", "auto_map", "model_type", "torch_dtype", "dtype", "_name_or_path"}
"""Keys of a config.json that say how it is loaded, not what the model is."""

SPOKEN_AGAINST = {"auto_map", "tokenizer_class", "use_fast", "unk_token"}
"""Keys of a tokenizer_config.json that would lead away from tokenizer.json, or add a token to it: with byte fallback
there is no unknown one."""


def hugging_face_files(folders: Sequence[Path], config: TelechatConfig, dtype: str) -> dict[str, bytes]:
    """Everything beside the weights, by name.

    Args:
        folders: where the source's own files may lie; for each the first that has it counts.
        dtype: of the weights.

    Raises:
        CheckpointError, ConfigError, TokenizerError: one of them is damaged, or does not fit the model.
    """
    return {
        "config.json": dump_json(config_json(config, dtype)),
        "generation_config.json": dump_json(generation_json(folders, config)),
        **tokenizer_files(folders, config),
        **code_files(),
    }


def config_json(config: TelechatConfig, dtype: str) -> dict[str, Any]:
    """The content of config.json: every fact under its published name, then what else the source's file said."""
    return {"architectures": [ARCHITECTURE], "model_type": "telechat", "auto_map": AUTO_MAP} | described(config, dtype)


def described(config: TelechatConfig, dtype: str) -> dict[str, Any]:
    """The keys of config.json that do not depend on who loads it."""
    moe = {"num_experts", "experts_per_token"}
    facts = {
        keys[0]: getattr(config, name)
        for name, keys in SPELLINGS.items()
        if hasattr(config, name) and name != "torch_dtype" and (config.is_moe or name not in moe)
    }
    spelled = {key for keys in SPELLINGS.values() for key in keys} - {"max_position_embeddings"}
    kept = {key: value for key, value in config.raw.items() if key not in spelled | LOADERS_KEYS}
    return {"torch_dtype": dtype} | facts | kept


def generation_json(folders: Sequence[Path], config: TelechatConfig) -> dict[str, Any]:
    """The content of generation_config.json: the source's own, and the ids and the length that atb must find there.

    Args:
        folders: where the source's file may lie; the first that has it counts.

    Raises:
        CheckpointError, ConfigError: the file is a link, or says something that cannot be.
    """
    found = find("generation_config.json", folders)
    if found:
        read_side_file(found)
    generation = read_generation(found.parent if found else folders[0], config)
    lengths = {"max_new_tokens", "max_length"}
    length = {} if lengths & generation.written.keys() else {"max_new_tokens": generation.max_new_tokens}
    turns = {f"{name}_token_id": CONTROL_IDS[f"<_{name}>"] for name in ("user", "bot", "system")}
    texts = {name: getattr(config, name) for name in ("bos_token_id", "pad_token_id")}
    return length | texts | {"eos_token_id": generation.eos_token_id} | turns | generation.written


def tokenizer_files(folders: Sequence[Path], config: TelechatConfig) -> dict[str, bytes]:
    """tokenizer.model, tokenizer.json, tokenizer_config.json and chat templates by name; none where there is no
    tokenizer.model.

    Args:
        folders: where the source's files may lie; for each the first that has it counts.

    Raises:
        CheckpointError, ConfigError, TokenizerError: a file is a link, damaged, or no tokenizer of this model.
    """
    templates = {name: folder for folder in reversed(folders) for name in template_names(folder)}
    files = {name: read_side_file(folder / name) for name, folder in templates.items()}
    model, settings = find("tokenizer.model", folders), find("tokenizer_config.json", folders)
    if model is None:
        return {}
    files[model.name] = read_side_file(model)
    given = parse_json(read_side_file(settings).decode(), settings) if settings else {}
    beside = next(iter(templates.values()), folders[0])
    arguments = constructor_arguments(given, beside)
    tokenizer = TelechatTokenizer(model, vocab_size=config.vocab_size, **arguments)
    files["tokenizer.json"] = dump_compact(tokenizer_json(model, tokenizer))
    files["tokenizer_config.json"] = dump_json(_tokenizer_config(given, tokenizer, has_template=bool(templates)))
    return files


def _tokenizer_config(given: Mapping[str, Any], tokenizer: TelechatTokenizer, *, has_template: bool) -> dict[str, Any]:
    """The source's tokenizer_config.json for the library's tokenizer, which takes all tokens from tokenizer.json."""
    written = {key: value for key, value in given.items() if value is not None and key not in SPOKEN_AGAINST}
    names = {token.content for token in tokenizer.added_tokens}
    written |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "clean_up_tokenization_spaces": False,
    }
    # What names a token that tokenizer.json does not have would add it there, with an id beyond the embedding.
    if "added_tokens_decoder" in written:
        written["added_tokens_decoder"] = {
            str(token.id): token._asdict() | {"normalized": False}
            for token in tokenizer.added_tokens
            if str(token.id) in written["added_tokens_decoder"]
        }
        for token in written["added_tokens_decoder"].values():
            del token["id"]
    if "additional_special_tokens" in written:
        listed = written["additional_special_tokens"]
        texts = [token["content"] if isinstance(token, dict) else token for token in listed]
        written["additional_special_tokens"] = [text for text in texts if text in names]
    if not has_template:
        written.setdefault("chat_template", tokenizer.chat_template)
    return written


def code_files() -> dict[str, bytes]:
    """The code that transformers and vLLM load, by name."""
    folder = resources.files(__package__).joinpath("hugging_face")
    return {name: folder.joinpath(name).read_bytes() for name in CODE}


def find(name: str, folders: Sequence[Path]) -> Path | None:
    """The file of this name in the first of the folders that has one."""
    return next((folder / name for folder in folders if (folder / name).exists()), None)


def read_side_file(path: Path) -> bytes:
    """A file beside the weights. Raises CheckpointError for what is no file, such as a link to elsewhere."""
    with open_bounded(path) as file:
        return file.read(0, file.size)


def dump_compact(data: Any) -> bytes:
    """JSON on one line: a vocabulary is for nobody's eyes."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
