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

from telechat_mindie.checkpoint.elsewhere.tokenizer_json import token_json, tokenizer_json
from telechat_mindie.checkpoint.formats.bounds import open_bounded
from telechat_mindie.checkpoint.generation import read_generation
from telechat_mindie.computation import trained_theta
from telechat_mindie.config import TelechatConfig
from telechat_mindie.config_json import LLAMA_SECTION, SPELLINGS
from telechat_mindie.reading import read_json
from telechat_mindie.staging import dump_json
from telechat_mindie.text.control_tokens import CONTROL_IDS
from telechat_mindie.text.settings import constructor_arguments, template_names, token_text
from telechat_mindie.text.tokenizer import TelechatTokenizer

ARCHITECTURE = "TeleChat2ForCausalLM"
CODE = ("configuration_telechat2.py", "modeling_telechat2.py")
AUTO_MAP = {
    "AutoConfig": "configuration_telechat2.TeleChat2Config",
    "AutoModelForCausalLM": f"modeling_telechat2.{ARCHITECTURE}",
}

TURN_IDS = {f"{name}_token_id": CONTROL_IDS[f"<_{name}>"] for name in ("user", "bot", "system")}
"""What atb_llm makes a chat of, by their keys in generation_config.json."""

_LOADING = {"architectures", "auto_map", "model_type", "torch_dtype", "dtype", "_name_or_path"}
"""Keys of a config.json that say how it is loaded, not what the model is."""

_OVERRULED = {"auto_map", "tokenizer_class", "use_fast", "unk_token"}
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
    return {"config.json": dump_json(config_json(config, dtype)), **_beside(folders, config), **code_files()}


def llama_files(folders: Sequence[Path], config: TelechatConfig, dtype: str) -> dict[str, bytes]:
    """Everything beside the weights of a Llama form, as `hugging_face_files`; no code."""
    return {"config.json": dump_json(llama_config_json(config, dtype)), **_beside(folders, config)}


def _beside(folders: Sequence[Path], config: TelechatConfig) -> dict[str, bytes]:
    generation = generation_json(folders, config)
    return {"generation_config.json": dump_json(generation), **tokenizer_files(folders, config)}


def config_json(config: TelechatConfig, dtype: str) -> dict[str, Any]:
    """The content of config.json: every fact under its published name, then what else the source's file said."""
    loading = {"architectures": [ARCHITECTURE], "model_type": "telechat", "auto_map": AUTO_MAP, "torch_dtype": dtype}
    return loading | _described(config)


def llama_config_json(config: TelechatConfig, dtype: str) -> dict[str, Any]:
    """The content of a Llama form's config.json, with a section that has the keys of `config_json`.

    A Llama has no Dynamic NTK. Up to the trained length that is one base for the angles, which is given as rope_theta.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": min(config.seq_length, config.training_seqlen),
        "rope_theta": trained_theta(config),
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        LLAMA_SECTION: _described(config),
    }


def _described(config: TelechatConfig) -> dict[str, Any]:
    """The keys of config.json that say what the model is, and not how it is loaded."""
    moe = {"num_experts", "experts_per_token"}
    facts = {
        keys[0]: getattr(config, name)
        for name, keys in SPELLINGS.items()
        if hasattr(config, name) and name != "torch_dtype" and (config.is_moe or name not in moe)
    }
    spelled = {key for keys in SPELLINGS.values() for key in keys}
    kept = {key: value for key, value in config.raw.items() if key not in spelled | _LOADING}
    return facts | kept


def generation_json(folders: Sequence[Path], config: TelechatConfig) -> dict[str, Any]:
    """The content of generation_config.json: the source's own, and the ids and the length that atb must find there.

    Args:
        folders: where the source's file may lie; the first that has it counts.

    Raises:
        CheckpointError, ConfigError: the file is a link, or says something that cannot be.
    """
    found = _find("generation_config.json", folders)
    if found:
        _read(found)  # no link
    generation = read_generation(found.parent if found else folders[0], config)
    lengths = {"max_new_tokens", "max_length"}
    length = {} if lengths & generation.written.keys() else {"max_new_tokens": generation.max_new_tokens}
    texts = {name: getattr(config, name) for name in ("bos_token_id", "pad_token_id")}
    return length | texts | {"eos_token_id": generation.eos_token_id} | TURN_IDS | generation.written


def tokenizer_files(folders: Sequence[Path], config: TelechatConfig) -> dict[str, bytes]:
    """tokenizer.model, tokenizer.json, tokenizer_config.json and chat templates by name; none where there is no
    tokenizer.model.

    Args:
        folders: where the source's files may lie; for each the first that has it counts.

    Raises:
        CheckpointError, ConfigError, TokenizerError: a file is a link, damaged, or no tokenizer of this model.
    """
    model, settings = _find("tokenizer.model", folders), _find("tokenizer_config.json", folders)
    if model is None:
        return {}
    templates = {name: folder for folder in reversed(folders) for name in template_names(folder)}
    files = {name: _read(folder / name) for name, folder in templates.items()}
    files[model.name] = _read(model)
    given = _read_json(settings) if settings else {}
    beside = next(iter(templates.values()), folders[0])
    arguments = constructor_arguments(given, beside)
    tokenizer = TelechatTokenizer(model, vocab_size=config.vocab_size, **arguments)
    files["tokenizer.json"] = _dump_on_one_line(tokenizer_json(model, tokenizer))
    files["tokenizer_config.json"] = dump_json(_tokenizer_config(given, tokenizer, has_template=bool(templates)))
    return files


def _tokenizer_config(given: Mapping[str, Any], tokenizer: TelechatTokenizer, *, has_template: bool) -> dict[str, Any]:
    """The source's tokenizer_config.json for the library's tokenizer, which takes all tokens from tokenizer.json."""
    written = {key: value for key, value in given.items() if value is not None and key not in _OVERRULED}
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
            str(token.id): token_json(token)
            for token in tokenizer.added_tokens
            if str(token.id) in written["added_tokens_decoder"]
        }
    if "additional_special_tokens" in written:
        listed = map(token_text, written["additional_special_tokens"])
        written["additional_special_tokens"] = [text for text in listed if text in names]
    if not has_template:
        written.setdefault("chat_template", tokenizer.chat_template)
    return written


def code_files() -> dict[str, bytes]:
    """The code that transformers and vLLM load, by name."""
    folder = resources.files(__package__).joinpath("hugging_face")
    return {name: folder.joinpath(name).read_bytes() for name in CODE}


def _find(name: str, folders: Sequence[Path]) -> Path | None:
    """The file of this name in the first of the folders that has one."""
    return next((folder / name for folder in folders if (folder / name).exists()), None)


def _read(path: Path) -> bytes:
    """A file beside the weights. Raises CheckpointError for what is no file, such as a link to elsewhere."""
    with open_bounded(path) as file:
        return file.read(0, file.size)


def _read_json(path: Path) -> dict[str, Any]:
    _read(path)  # no link
    return read_json(path)


def _dump_on_one_line(data: Any) -> bytes:
    """JSON on one line: a vocabulary is for nobody's eyes."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
