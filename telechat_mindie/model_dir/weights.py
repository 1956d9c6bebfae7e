"""The yaml, config.json and the manifest against the weights, as the headers of the shards describe them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from telechat_mindie.checkpoint.formats.safetensors import read_safetensors
from telechat_mindie.checkpoint.formats.tensors import StoredTensor
from telechat_mindie.checkpoint.mapping import differences, mindformers_targets
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import name_some
from telechat_mindie.findings import Finding, error, ok
from telechat_mindie.model_dir.manifest import MANIFEST, REBUILD, section
from telechat_mindie.model_dir.parts import Parts, attempt

Tensors = dict[str, StoredTensor]

LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
RANK = re.compile(r"rank_(0|[1-9][0-9]{0,8})")
PACKED = "attention.w_qkv.weight"
EMBEDDING = "model.tok_embeddings.embedding_weight"
STACKED = "feed_forward.ffn.w1.weight"


def check_weights(parts: Parts) -> Iterator[Finding]:
    """Ranks, dtype, qkv_concat, layers, and every name and shape of every rank."""
    found: list[Finding] = []
    ranks = _read_ranks(parts.path, found)
    found += [*_statements(parts, ranks), *_tensors(parts, ranks)]
    yield from found
    if not found and not parts.problems:
        count = sum(map(len, ranks.values()))
        yield ok("weights", parts.path, f"{count} tensors in {len(ranks)} rank(s), as the yaml and config.json say")


def _read_ranks(path: Path, problems: list[Finding]) -> dict[int, Tensors]:
    """The tensors of each rank_N folder by name."""
    ranks: dict[int, Tensors] = {}
    for folder in sorted(path.glob("rank_*")):
        if not (match := RANK.fullmatch(folder.name)) or not folder.is_dir():
            continue
        tensors = ranks[int(match[1])] = {}
        for file in sorted(folder.glob("*.safetensors")):
            found = attempt(problems, "weights", file, lambda file=file: read_safetensors(file)) or {}  # type: ignore[misc]
            if twice := found.keys() & tensors.keys():
                problems.append(error("weights", file, f"{name_some(twice)} stand in two files", REBUILD))
            tensors |= found
    return ranks


def _statements(parts: Parts, ranks: Mapping[int, Tensors]) -> Iterator[Finding]:
    """What the manifest, the yaml and config.json say of the weights, against the weights."""
    tp = parts.tp
    if tp is not None:
        for problem, others, advice in (
            ("lacks", set(range(tp)) - ranks.keys(), REBUILD),
            ("holds", ranks.keys() - set(range(tp)), "Move them out of the directory."),
        ):
            if others:
                listed = name_some(f"rank_{rank}" for rank in others)
                yield error("rank-folders", parts.path, f"{problem} {listed}, and was built for tp {tp}", advice)
    dtypes = {tensor.dtype for tensors in ranks.values() for tensor in tensors.values()}
    if len(dtypes) > 1:
        yield error("dtype", parts.path, f"weights of different dtypes: {' and '.join(sorted(dtypes))}", REBUILD)
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    names = {name for tensors in ranks.values() for name in tensors}
    packed = any(name.endswith(PACKED) for name in names) if names else None

    manifest = (parts.path / MANIFEST, parts.manifest)
    config_json = (parts.path / "config.json", parts.config_json)
    yaml = (parts.yaml_path, parts.yaml)
    cut = None if tp is None else tp > 1
    for id, (file, content), place, actual, what in (
        # From the first two mindformers' own runner starts its ranks.
        ("yaml-tp", yaml, "parallel_config.model_parallel", tp, f"cut for tp {tp}"),
        ("yaml-tp", yaml, "use_parallel", cut, f"cut for tp {tp}"),
        ("dtype", manifest, "dtype", dtype, dtype),
        ("dtype", config_json, "torch_dtype", dtype, dtype),
        ("dtype", yaml, "model.model_config.compute_dtype", dtype, dtype),
        ("qkv-concat", manifest, "qkv_concat", packed, "packed" if packed else "not packed"),
        ("qkv-concat", yaml, "model.model_config.qkv_concat", packed, "packed" if packed else "not packed"),
    ):
        *folders, key = place.split(".")
        value = section(content, *folders).get(key)
        if content and actual is not None and (type(value) is not type(actual) or value != actual):
            advice = f"Write {json.dumps(actual)} there, or build the directory again."
            yield error(id, f"{file}: {place}", f"is {value!r}, and the weights are {what}", advice)


def _tensors(parts: Parts, ranks: Mapping[int, Tensors]) -> Iterator[Finding]:
    config, tp = parts.config, parts.tp
    if config is None or tp not in config.allowed_tp():
        return  # told where these were read
    for rank, tensors in sorted(ranks.items()):
        if rank < tp:
            yield from _rank_tensors(tensors, config, tp, parts.path / f"rank_{rank}")


def _rank_tensors(tensors: Tensors, config: TelechatConfig, tp: int, where: Path) -> Iterator[Finding]:
    layers = 1 + max((int(match[1]) for name in tensors if (match := LAYER.match(name))), default=-1)
    if layers != config.num_layers:
        yield error("layers", where, f"holds {layers} layers, and config.json says {config.num_layers}", REBUILD)
        return
    embedding = tensors.get(EMBEDDING)
    if embedding is not None and len(embedding.shape) == 2 and embedding.shape[0] * tp != config.vocab_size:
        yield error(
            "vocabulary",
            where,
            f"its embedding has {embedding.shape[0]} rows, {embedding.shape[0] * tp} over {tp} rank(s), and "
            f"config.json says vocab_size {config.vocab_size}",
            REBUILD,
        )
        return
    stacks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(STACKED) and tensor.shape}
    if config.is_moe and stacks != {config.num_experts}:
        message = f"holds {name_some(stacks) or 'no'} experts a layer, and config.json says {config.num_experts}"
        yield error("experts", where, message, REBUILD)
        return
    packed = any(name.endswith(PACKED) for name in tensors)
    targets = mindformers_targets(config, qkv_concat=packed, transposed_experts=config.is_moe)
    expected = {target.name: target.rank_shape(tp) for target in targets}
    for problem, clause in differences({name: tensor.shape for name, tensor in tensors.items()}, expected):
        yield error("shape" if problem == "shape" else "tensor-names", where, clause, REBUILD)
