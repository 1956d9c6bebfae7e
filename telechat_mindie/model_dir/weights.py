"""The yaml, config.json and the manifest against the weights, as the headers of the shards describe them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from telechat_mindie.checkpoint.formats.tensors import StoredTensor
from telechat_mindie.checkpoint.mapping import mindformers_targets
from telechat_mindie.checkpoint.sharding import rank_range
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import CheckpointError, name_some
from telechat_mindie.findings import Finding, error, ok
from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.model_dir.parts import READ_FAILURES, REBUILD, Parts, section

LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
PACKED = "attention.w_qkv.weight"
EMBEDDING = "model.tok_embeddings.embedding_weight"
STACKED = "feed_forward.ffn.w1.weight"


def check_weights(parts: Parts) -> Iterator[Finding]:
    """Ranks, dtype, qkv_concat, layers, and every name and shape of every rank."""
    found = [*_ranks(parts), *_parallel(parts), *_dtype(parts), *_qkv_concat(parts), *_tensors(parts)]
    yield from found
    if not found and not parts.problems:
        # The rules above name the fault; this is the gate that a runner has, for what they leave over.
        try:
            ModelDir.open(parts.path)
        except READ_FAILURES as failure:
            yield error("model-dir", parts.path, str(failure), REBUILD)
            return
        tensors = sum(map(len, parts.ranks.values()))
        yield ok(
            "weights", parts.path, f"{tensors} tensors in {len(parts.ranks)} rank(s), as the yaml and config.json say"
        )


def _ranks(parts: Parts) -> Iterator[Finding]:
    if parts.tp is None:
        if parts.manifest is not None:
            yield error("manifest", parts.path, "the manifest does not say for how many ranks it was built", REBUILD)
        return
    expected = set(range(parts.tp))
    if missing := expected - parts.ranks.keys():
        names = name_some(f"rank_{rank}" for rank in missing)
        yield error("rank-folders", parts.path, f"lacks {names} of tp {parts.tp}", REBUILD)
    if extra := parts.ranks.keys() - expected:
        names = name_some(f"rank_{rank}" for rank in extra)
        yield error(
            "rank-folders",
            parts.path,
            f"holds {names} beside those of tp {parts.tp}",
            "Move them out of the directory.",
        )


def _parallel(parts: Parts) -> Iterator[Finding]:
    """parallel_config.model_parallel and use_parallel, from which mindformers' own runner starts its ranks."""
    if parts.tp is None or not parts.yaml:
        return
    size = section(parts.yaml, "parallel_config").get("model_parallel")
    if size != parts.tp:
        yield error(
            "yaml-tp",
            f"{parts.yaml_path}: parallel_config.model_parallel",
            f"is {size!r}, and the weights are cut for tp {parts.tp}",
            f"Write {parts.tp}, or build the directory again for another tp.",
        )
    parallel = parts.yaml.get("use_parallel")
    if parallel is not (parts.tp > 1):
        yield error(
            "yaml-tp",
            f"{parts.yaml_path}: use_parallel",
            f"is {parallel!r} with tp {parts.tp}",
            f"Write {str(parts.tp > 1).lower()}.",
        )


def _dtype(parts: Parts) -> Iterator[Finding]:
    stored = sorted({tensor.dtype for tensors in parts.ranks.values() for tensor in tensors.values()})
    if not stored:
        return
    if len(stored) > 1:
        yield error("dtype", parts.path, f"weights of different dtypes: {' and '.join(stored)}", REBUILD)
        return
    stated = [(f"{parts.yaml_path}: model.model_config.param_init_type", parts.model_config.get("param_init_type"))]
    stated.append((f"{parts.yaml_path}: model.model_config.compute_dtype", parts.model_config.get("compute_dtype")))
    stated = stated if parts.model_config else []
    if parts.config_json is not None:
        stated.append((f"{parts.path}/config.json: torch_dtype", parts.config_json.get("torch_dtype")))
    for where, value in stated:
        if value != stored[0]:
            yield error(
                "dtype",
                where,
                f"is {value!r}, and the weights are {stored[0]}",
                f"Write {stored[0]}, or build again with --dtype.",
            )


def _qkv_concat(parts: Parts) -> Iterator[Finding]:
    names = {name for tensors in parts.ranks.values() for name in tensors}
    if not names:
        return
    packed = any(name.endswith(PACKED) for name in names)
    stated = [(f"{parts.path}/manifest.json: qkv_concat", (parts.manifest or {}).get("qkv_concat", packed))]
    if parts.model_config:
        stated.append((f"{parts.yaml_path}: model.model_config.qkv_concat", parts.model_config.get("qkv_concat")))
    for where, value in stated:
        if value is not packed:
            yield error(
                "qkv-concat",
                where,
                f"is {value!r}, and the weights are {'' if packed else 'not '}packed",
                f"Write {str(packed).lower()}: the names of the tensors decide.",
            )


def _tensors(parts: Parts) -> Iterator[Finding]:
    config, tp = parts.config, parts.tp
    if config is None or tp is None:
        return
    told = set()
    for rank, tensors in sorted(parts.ranks.items()):
        if rank >= tp:
            continue
        where = parts.path / f"rank_{rank}"
        for finding in _rank_tensors(tensors, config, tp, str(where)):
            told.add(finding.id)
            yield finding
    layers = parts.model_config.get("num_layers")
    if parts.model_config and layers != config.num_layers and "layers" not in told:
        yield error(
            "layers",
            f"{parts.yaml_path}: model.model_config.num_layers",
            f"is {layers!r}, and the weights have {config.num_layers} layers",
            f"Write {config.num_layers}.",
        )


def _rank_tensors(
    tensors: Mapping[str, StoredTensor], config: TelechatConfig, tp: int, where: str
) -> Iterator[Finding]:
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
    stacks = [tensor.shape[0] for name, tensor in tensors.items() if name.endswith(STACKED) and tensor.shape]
    if config.is_moe and set(stacks) != {config.num_experts}:
        yield error(
            "experts",
            where,
            f"holds {name_some(set(stacks)) or 'no'} experts a layer, and config.json says {config.num_experts}",
            REBUILD,
        )
        return
    # From here on the work is bounded by the number of tensors that are there.
    packed = any(name.endswith(PACKED) for name in tensors)
    try:
        for heads in (config.num_heads, config.num_kv_heads):
            rank_range(heads, 0, tp)
        targets = mindformers_targets(config, qkv_concat=packed, transposed_experts=config.is_moe)
        expected = {target.name: target.rank_shape(tp) for target in targets}
    except CheckpointError as failure:
        yield error("yaml-tp", where, str(failure), REBUILD)
        return
    for problem, odd in (
        ("lacks", expected.keys() - tensors.keys()),
        ("holds unknown", tensors.keys() - expected.keys()),
    ):
        if odd:
            yield error("tensor-names", where, f"{problem} {len(odd)} weights: {name_some(odd)}", REBUILD)
    wrong = [
        f"{name} is {list(tensors[name].shape)} and should be {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if wrong:
        yield error("shape", where, f"{len(wrong)} shapes do not fit tp {tp}: {name_some(wrong, 2)}", REBUILD)
