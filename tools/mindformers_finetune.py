"""Loads the finetunes that this package renders in the real mindformers 1.6.0, and asks its own rules about them.

python tools/mindformers_finetune.py SOURCES      (see tools/mindformers_seam.sh for the environment)

SOURCES is a folder with `research/telechat2` in it. No network is built and no NPU needed.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from telechat_mindie import variants
from telechat_mindie.training.mindformers.layout import Cluster, Layout, Lora, Work, adaptable
from telechat_mindie.training.mindformers.memory import estimate
from telechat_mindie.training.mindformers.propose import Choice, Proposal, propose
from telechat_mindie.training.mindformers.render import YAML, Run, render_run

CLUSTERS = {"3b": (1, 8), "7b": (1, 8), "35b": (2, 8), "115b": (8, 8), "39b-a12b": (16, 8)}
ONE_CARD = "3b"  # with an adapter
UNEVEN = Layout(
    dp=1,
    tp=8,
    pp=8,
    interleave=3,
    micro_batches=8,
    recompute="select",
    offset=((-1, -1, 0, 0, 0, 0, 0, 0), (-1, 0, 0, 0, 0, 0, 0, 0), (0, 0, 0, 1, 1, 1, 1, -1)),
)
"""The stages of the published 115B yaml."""


def runs() -> Iterator[tuple[str, Proposal, Work, Cluster]]:
    """A label and what is rendered: every size, all weights and an adapter, and uneven interleaved stages."""
    for name, (nodes, cards) in CLUSTERS.items():
        config, cluster = variants.named(name), Cluster(nodes, cards, 64)
        whole = Work(config, 8192)
        yield f"{name} all weights", propose(Choice(), whole, cluster)[0], whole, cluster
        adapter = Work(config, 8192, Lora(targets=adaptable(config)))
        cluster = Cluster(1, 1, 64) if name == ONE_CARD else cluster
        yield f"{name} LoRA", propose(Choice(), adapter, cluster)[0], adapter, cluster
    work = Work(variants.named("115b"), 8192)
    yield "115b interleaved", Proposal(UNEVEN, tuple(estimate(UNEVEN, work))), work, Cluster(8, 8, 64)


def main(sources: Path) -> None:
    sys.path.insert(0, str(sources))
    os.environ["REGISTER_PATH"] = str(sources / "research" / "telechat2")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LOG_MF_PATH"] = folder  # not below where this is called
        for label, proposal, work, cluster in runs():
            path = Path(folder) / YAML
            path.write_text(render_run(Path(folder), Run(Path("data")), proposal, work, cluster)[YAML])
            unknown = sorted(set(check(path, cluster)))
            if unknown:
                raise SystemExit(f"{label}: keys that mindformers does not know: {', '.join(unknown)}")
            print(f"{label}: {proposal.layout} on {cluster.world} cards, loaded; all keys known; all rules kept")


def check(path: Path, cluster: Cluster) -> Iterator[str]:
    """Keys that mindformers would not look at; whatever it refuses is raised as it says it."""
    import mindspore
    from mindformers.core.callback import CheckpointMonitor, MFLossMonitor
    from mindformers.core.lr import CosineWithWarmUpLR
    from mindformers.core.optim import AdamW
    from mindformers.core.parallel_config import build_parallel_config
    from mindformers.models.utils import LayerSetting
    from mindformers.modules.transformer import moe
    from mindformers.pet.pet_config import LoraConfig
    from mindformers.tools import check_rules
    from mindformers.tools.register import MindFormerConfig
    from mindformers.tools.register.template import CONFIG_NAME_TO_CLASS
    from mindformers.wrapper import MFTrainOneStepCell

    raw = yaml.safe_load(path.read_text())
    yield from raw.keys() - CONFIG_NAME_TO_CLASS.keys() - set(CONFIG_NAME_TO_CLASS["general_config"].keys())
    config = MindFormerConfig(str(path))  # raises on an unknown key of the sections that it fills in
    telechat = importlib.import_module("research.telechat2.telechat_config").TelechatConfig
    classes: list[tuple[Any, dict[str, Any]]] = [
        (telechat, raw["model"]["model_config"]),
        (AdamW, raw["optimizer"]),
        (CosineWithWarmUpLR, raw["lr_schedule"]),
        (MFTrainOneStepCell, raw["runner_wrapper"]),
        (LoraConfig, raw["model"]["model_config"].get("pet_config", {})),
        *zip((MFLossMonitor, CheckpointMonitor), raw["callbacks"], strict=True),
    ]
    taken_apart = {"type", "auto_register", "pet_config", "pet_type"}
    for made, given in classes:
        makers = (made.__init__, made.__new__)  # AdamW is made of another class
        taken = {name for maker in makers for name in inspect.signature(maker).parameters}
        yield from given.keys() - taken - taken_apart
    context = set(inspect.signature(mindspore.set_auto_parallel_context).parameters)
    documented = mindspore.set_auto_parallel_context.__doc__ or ""
    yield from (key for key in raw["parallel"] if key not in context and key not in documented)

    parallel = raw["parallel"]
    mindspore.reset_auto_parallel_context()
    mindspore.set_auto_parallel_context(
        parallel_mode="semi_auto_parallel",
        pipeline_stages=raw["parallel_config"]["pipeline_stage"],
        **{
            key: parallel[key]
            for key in (
                "full_batch", "search_mode", "gradients_mean", "enable_alltoall", "enable_parallel_optimizer",
                "parallel_optimizer_config", "pipeline_config",
            )
            if key in parallel
        },
    )  # fmt: skip
    build_parallel_config(config)
    model = telechat(
        parallel_config=config.parallel_config,
        moe_config=config.moe_config,
        **{key: value for key, value in raw["model"]["model_config"].items() if key not in taken_apart},
    )
    stages = LayerSetting(model.num_layers, model.offset, model.parallel_config, model.pp_interleave_num)
    assert stages.layer_list.sum() == model.num_layers
    with (
        patch.object(check_rules, "get_device_num", lambda: cluster.world),
        patch.object(moe.D, "get_group_size", lambda: cluster.world),
    ):
        if cluster.world > 1:
            check_rules._check_parallel(config)
            moe._check_moe_config(config.moe_config, config.parallel_config)
    check_rules._check_recompute(config)
    check_rules._check_config_campacity(config)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
