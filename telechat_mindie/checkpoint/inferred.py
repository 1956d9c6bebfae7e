"""The strategy of ranks that come without strategy files, where their shapes leave no doubt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from telechat_mindie.checkpoint.formats.strategy import Strategy
from telechat_mindie.checkpoint.formats.strategy_layout import Layout
from telechat_mindie.checkpoint.formats.tensors import StoredTensor
from telechat_mindie.checkpoint.mapping import OPTIMIZER_PREFIX, mindformers_targets, training_state
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import CheckpointError, name_some

PACKED = (".attention.w_qkv.weight", ".feed_forward.w_gate_hidden.weight")


def infer_strategy(ranks: Sequence[Mapping[str, StoredTensor]], config: TelechatConfig | None, where: Path) -> Strategy:
    """How ranks divide the model that `config` describes: each tensor is whole in all, or one axis cut into as many.

    Ranks that divide a tensor into fewer parts, or hold different tensors, could do so in several ways, and packed
    weights are cut either way through their parts or across them.

    Raises:
        CheckpointError: there is doubt, or no config.
    """

    def refuse(why: str) -> CheckpointError:
        return CheckpointError(
            f"no strategy file says how {len(ranks)} ranks divide the weights, and {why}",
            where=where,
            advice="Name what the run saved as output/strategy with --strategy: a folder of ckpt_strategy_rank_N.ckpt.",
        )

    if config is None:
        raise refuse("no config.json says how large the model is (--config)")
    everywhere = set().union(*ranks)
    for rank, tensors in enumerate(ranks):
        if lacking := everywhere - tensors.keys():
            raise refuse(f"rank {rank} lacks {name_some(lacking, 2)}, as with pipeline stages")
    packed = any(name.endswith(PACKED) for name in everywhere)
    targets = mindformers_targets(config, qkv_concat=packed, transposed_experts=False)
    shapes = {target.name: target.shape for target in targets}
    layouts = {}
    for name, tensor in ranks[0].items():
        if training_state(name) in ("counter", "buffer"):
            continue
        prefix = OPTIMIZER_PREFIX.match(name)
        parameter = name[prefix.end() :] if prefix else name
        whole = shapes.get(parameter)
        if whole is None:
            raise refuse(f"{name} is no weight of the model of config.json")
        layout = _layout(tensor.shape, whole, len(ranks))
        if layout is None or any(tensors[name].shape != tensor.shape for tensors in ranks):
            raise refuse(f"{name} is {list(tensor.shape)} of {list(whole)}")
        if any(layout.axes) and parameter.endswith(PACKED):
            raise refuse(f"{name} is packed from several weights and cut")
        layouts[name] = layout
    return Strategy((layouts,))


def _layout(shape: tuple[int, ...], whole: tuple[int, ...], ranks: int) -> Layout | None:
    if shape == whole:
        return Layout((ranks,), ((),) * len(whole))
    if len(shape) != len(whole):
        return None
    axes = [axis for axis in range(len(whole)) if shape[axis] != whole[axis]]
    if len(axes) != 1 or shape[axes[0]] * ranks != whole[axes[0]]:
        return None
    return Layout((ranks,), tuple((0,) if axis == axes[0] else () for axis in range(len(whole))))
