"""What msmodelslim leaves of a quantised model: its description, and the tensors that this asks for.

W8A8 keeps the published names. A quantised `X.weight` is int8 and has beside it `X.input_scale` and `X.input_offset`,
one number each, `X.quant_bias` in int32 and `X.deq_scale` in int64, one number an output. Biases, norms and whatever
the description calls FLOAT stay as they were. W8A8SC is compressed for one tensor parallel size: a folder
`partRANK-of-TP` a rank, with the names of the model that ran (MindIE-LLM v3.0.0 examples/atb_models/examples/convert/
model_slim/sparse_compressor.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from telechat_mindie.checkpoint.formats.bounds import quoted
from telechat_mindie.checkpoint.formats.safetensors import read_safetensors
from telechat_mindie.checkpoint.formats.tensors import StoredTensor, read_files
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import CheckpointError, ConfigError, name_some
from telechat_mindie.reading import read_json

DESCRIPTION = "quant_model_description.json"
DESCRIPTION_NAME = re.compile(r"quant_model_description(_\w+)?\.json")
"""Older releases put the kind into the name: quant_model_description_w8a8.json."""

W8A8, W8A8SC, FLOAT = "W8A8", "W8A8SC", "FLOAT"
KINDS = (W8A8, W8A8SC)
"""The kinds that MindIE's TeleChat takes (MindIE-LLM v3.0.0 examples/atb_models/examples/models/telechat/README.md)."""

QUANTISE_AGAIN = (
    "Copy it again, or quantise the float16 checkpoint again with MindIE's examples/models/telechat/"
    "convert_quant_weights.py."
)
KIND_ADVICE = (
    "MindIE's TeleChat takes W8A8, and W8A8SC where its sparse_compressor made it of W8A8S: quantise the float16 "
    "checkpoint again with MindIE's examples/models/telechat/convert_quant_weights.py."
)

NOT_SERVED = ("kv_quant_type", "fa_quant_type", "reduce_quant_type")
"""Keys of the description, or of config.json's quantization_config, for the cache, attention and sums over cards."""

PART = re.compile(r"part(0|[1-9]\d{0,3})-of-([1-9]\d{0,3})")


@dataclass(frozen=True)
class Quantised:
    """A directory that msmodelslim made.

    Attributes:
        kind: W8A8 or W8A8SC.
        description: tensor -> W8A8, W8A8SC or FLOAT; for W8A8SC that of part 0.
        config: without the keys that say that it is quantised.
        tensors: by name; those of all parts, for W8A8SC by `partRANK-of-TP/NAME`.
        tp: the tensor parallel size that W8A8SC was compressed for, else 0.
        files: what holds the weights and describes them, below `path`.
    """

    path: Path
    kind: str
    description: Mapping[str, str]
    config: TelechatConfig
    tensors: Mapping[str, StoredTensor]
    tp: int = 0
    files: tuple[str, ...] = field(default=(), repr=False)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def allowed_tp(self) -> tuple[int, ...]:
        """Numbers of cards that it can be served with."""
        return (self.tp,) if self.tp else self.config.allowed_tp()

    def layers(self, *, quantised: bool) -> list[str]:
        """`self_attention.query`, `lm_head`: the matrices that are quantised, or that stay float, each once."""
        names = {
            re.sub(r"^(transformer|model)\.(h\.\d+\.)?", "", name).removesuffix(".weight")
            for name, kind in self.description.items()
            if name.endswith(".weight") and "norm" not in name and "ln_f" not in name
            if (kind != FLOAT) == quantised
        }
        return sorted(names)


def description_file(path: Path) -> Path | None:
    """The description of a directory, which may be that of its first part; None where it is not quantised so."""
    if not path.is_dir():
        return None
    folders = [path, *sorted(folder for folder in path.iterdir() if PART.fullmatch(folder.name) and folder.is_dir())]
    for folder in folders[:2]:
        for name in sorted(entry.name for entry in folder.iterdir()):
            if DESCRIPTION_NAME.fullmatch(name):
                return folder / name
    return None


def read_config(data: Mapping[str, Any]) -> TelechatConfig:
    """A config.json without what says that its weights are quantised. Raises ConfigError as `TelechatConfig`."""
    plain = {key: value for key, value in data.items() if key not in ("quantize", "quantization_config")}
    return TelechatConfig.from_dict(plain)


def read_quantised(path: Path) -> Quantised:
    """Read the description, config.json and the headers of the weights; `quantised_problems` says what is wrong there.

    Raises:
        ConfigError: config.json or the description is missing or malformed.
        CheckpointError: a kind that MindIE's TeleChat does not take, parts that are missing, a damaged file.
    """
    file = description_file(path)
    if file is None:
        raise CheckpointError("holds no description of quantised weights", where=path, expected=DESCRIPTION)
    data = read_json(path / "config.json")
    kind, description = _description(file, data)
    try:
        config = read_config(data)
    except ConfigError as failure:
        raise ConfigError(str(failure), where=path / "config.json") from None
    if kind == W8A8SC:
        parts = _parts(path)
        tp = len(parts)
        tensors = {
            f"{folder.name}/{name}": tensor for folder in parts for name, tensor in _read_folder(folder, path).items()
        }
        files = [str(file.relative_to(path)) for folder in parts for file in folder.iterdir()]
    else:
        tp, tensors = 0, _read_folder(path, path)
        files = [file.name for file in path.glob("*.safetensors")]
    files += [entry.name for entry in path.iterdir() if DESCRIPTION_NAME.fullmatch(entry.name)]
    return Quantised(path, kind, description, config, tensors, tp, tuple(sorted(files)))


def _description(file: Path, config: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """The kind, and each tensor's own."""
    content = read_json(file)
    described = {name: kind for name, kind in content.items() if isinstance(kind, str) and "." in name}
    said = content.get("model_quant_type") or config.get("quantize")
    if not isinstance(said, str):
        raise CheckpointError(
            "does not say how the model is quantised",
            where=file,
            expected='a model_quant_type here, or "quantize" in config.json',
            advice=KIND_ADVICE,
        )
    given = config.get("quantize")
    if isinstance(given, str) and given != said.lower():
        raise CheckpointError(
            "is contradicted by config.json's quantize, which MindIE compares letter by letter",
            where=file,
            expected=said.lower(),
            found=given,
            advice=f'Write "quantize": "{said.lower()}" in config.json.',
        )
    section = config.get("quantization_config")
    for key in NOT_SERVED:
        for said_in in (content, section):
            if isinstance(said_in, Mapping) and (kind := said_in.get(key)) is not None:
                what = "quantises what MindIE's TeleChat keeps in float16"
                raise CheckpointError(what, where=file, found=f"{key} {quoted(kind)}", advice=KIND_ADVICE)
    if said.upper() not in KINDS:
        raise CheckpointError(
            "is of a kind that is not served", where=file, expected=" or ".join(KINDS), found=said, advice=KIND_ADVICE
        )
    return said.upper(), described


def _parts(path: Path) -> list[Path]:
    """The folders of a W8A8SC model in the order of their ranks.

    Raises:
        CheckpointError: they are not those of one tensor parallel size, each once.
    """
    found = {match.group(): match for entry in path.iterdir() if (match := PART.fullmatch(entry.name))}
    sizes = {int(match[2]) for match in found.values()}
    size = max(sizes, default=1)
    wanted = [f"part{rank}-of-{size}" for rank in range(size)]
    if len(sizes) > 1 or set(wanted) != found.keys():
        raise CheckpointError(
            "holds the parts of several sizes, or not all of one",
            where=path,
            expected=f"part0-of-{size} to part{size - 1}-of-{size}",
            found=name_some(found) or "none",
        )
    return [path / name for name in wanted]


def _read_folder(folder: Path, root: Path) -> dict[str, StoredTensor]:
    tensors = read_files(sorted(folder.glob("*.safetensors")), read_safetensors, root)
    if not tensors:
        raise CheckpointError("holds no safetensors", where=folder, advice="The copy is incomplete.")
    return tensors
