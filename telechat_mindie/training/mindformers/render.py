"""The files of a finetune by mindformers: yaml, environment, a script for each machine, and what to run when."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from telechat_mindie import variants
from telechat_mindie.errors import InputError, OutputError
from telechat_mindie.staging import StagedDirectory, write_file
from telechat_mindie.templates import render
from telechat_mindie.training.mindformers.layout import Cluster, Lora, Work, as_yaml_offset, too_small
from telechat_mindie.training.mindformers.memory import (
    CAPACITY_FACTOR,
    GRADIENT_GROUPS,
    SHARD_THRESHOLD_KB,
    usable_bytes,
)
from telechat_mindie.training.mindformers.propose import Proposal
from telechat_mindie.units import GB

YAML, README, ENVIRONMENT = "finetune.yaml", "README.md", "environment.sh"

RUN_OUTPUT = "output"
"""Where mindformers writes, below the folder that is made."""

_START = re.compile(r"start_node_\d+\.sh")

UNKNOWN_SAVE_STEPS = 500
"""Steps between checkpoints where the number of rows is not known."""


@dataclass(frozen=True)
class Run:
    """What a person decides beside the layout.

    Attributes:
        data: a folder or file of mindrecord, on the machines that train.
        source: the checkpoint's folder, which has its config.json and tokenizer; None where only its size is known.
        checkpoint: the converted one that mindformers loads; None: in the folder that is made.
        learning_rate: at its highest; a tenth of it is left at the end.
        save_steps: steps between two checkpoints; None: an epoch.
        keep: checkpoints that are kept.
        master_addr: of the first machine; None: asked for when the run starts.
    """

    data: Path
    source: Path | None = None
    checkpoint: Path | None = None
    epochs: int = 1
    learning_rate: float = 1.5e-4
    weight_decay: float = 0.1
    save_steps: int | None = None
    keep: int = 3
    seed: int = 0
    master_addr: str | None = None
    master_port: int = 8118

    def __post_init__(self) -> None:
        for fault in too_small({"--epochs": self.epochs, "--save-every": self.save_steps, "--keep": self.keep}):
            raise fault
        fits = {
            "--learning-rate": (0 < self.learning_rate < 1, "above 0, below 1", self.learning_rate),
            "--weight-decay": (0 <= self.weight_decay < 1, "from 0, below 1", self.weight_decay),
            "--master-port": (1024 <= self.master_port < 65536, "1024 to 65535", self.master_port),
            "--seed": (0 <= self.seed < 2**32, "0 to 4294967295", self.seed),
        }
        for flag, (right, expected, value) in fits.items():
            if not right:
                raise InputError("is out of range", where=flag, expected=expected, found=value)


def write_run(
    output: Path, run: Run, proposal: Proposal, work: Work, cluster: Cluster, *, force: bool = False
) -> list[str]:
    """Make the folder `output`, all of it or nothing, and give its files' names.

    Raises:
        OutputError: it exists, cannot be written, or holds what a run has trained or what was converted for one.
        ConfigError: a path that no file can name.
    """
    output = output.absolute()
    if force and (output / YAML).is_file():
        for path in sorted(output.iterdir()):
            if path.name not in (YAML, README, ENVIRONMENT) and not _START.fullmatch(path.name):
                what = "holds what a run has trained" if path.name == RUN_OUTPUT else "would be deleted by --force"
                raise OutputError(what, where=path, advice="Choose another folder, or take it away yourself.")
    files = render_run(output, run, proposal, work, cluster)
    with StagedDirectory(output, replace=force, marker=YAML) as staged:
        for name, text in files.items():
            write_file(staged.path / name, text.encode())
        staged.commit()
    return list(files)


def render_run(output: Path, run: Run, proposal: Proposal, work: Work, cluster: Cluster) -> dict[str, str]:
    """The texts by their files' names; `output` is the folder where they will lie."""
    layout, config, lora = proposal.layout, work.config, work.lora
    steps = None if work.rows is None else work.rows // layout.global_batch
    eos = config.eos_token_id
    values: dict[str, Any] = {
        **vars(run),
        "data": str(run.data.absolute()),
        "source": str(run.source.absolute()) if run.source else "CHECKPOINT",
        "checkpoint": str((run.checkpoint or output / "checkpoint.ckpt").absolute()),
        "output": str(output),
        "label": variants.label_for(config),
        "config": config,
        "eos_token_id": eos if isinstance(eos, int) else eos[0],  # training looks for none
        "layout": layout,
        "offset": as_yaml_offset(layout.offsets(config.num_layers)),
        "divided": layout.tp * layout.pp * layout.ep > 1,
        "nodes": cluster.nodes,
        "cards": cluster.cards,
        "world": cluster.world,
        "shard_threshold_kb": SHARD_THRESHOLD_KB,
        "gradient_groups": GRADIENT_GROUPS,
        "capacity_factor": CAPACITY_FACTOR,
        "sequence_length": work.sequence_length,
        "dtype": work.dtype,
        "param_dtype": work.param_dtype,
        "lora": lora and _lora_values(lora),
        "learning_rate_end": run.learning_rate / 10,
        "steps": steps,
        "save_steps": run.save_steps or steps or UNKNOWN_SAVE_STEPS,
        "device_memory": f"{math.floor(usable_bytes(cluster) / GB)}GB",
        "device_gb": cluster.device_gb,
        "usable": _gb(usable_bytes(cluster)),
        "memory": memory_table(proposal, work),
    }
    if cluster.nodes == 1:
        values["master_addr"] = run.master_addr or "127.0.0.1"
    files = {YAML: render("mindformers_finetune.yaml.j2", **values)}
    yaml.safe_load(files[YAML])
    files[ENVIRONMENT] = render("mindformers_environment.sh.j2", **values)
    for node in range(cluster.nodes):
        files[f"start_node_{node}.sh"] = render("mindformers_start_node.sh.j2", node=node, **values)
    files[README] = render("mindformers_README.md.j2", **values)
    return files


def memory_table(proposal: Proposal, work: Work) -> list[dict[str, Any]]:
    """Each stage's layers and GB by part."""
    layers = proposal.layout.stage_layers(work.config.num_layers)
    return [
        {
            "stage": stage,
            "layers": sum(run[stage] for run in layers),
            "parts": [_gb(nbytes) for nbytes in asdict(memory).values()],
            "total": _gb(memory.total),
        }
        for stage, memory in enumerate(proposal.stages)
    ]


def _lora_values(lora: Lora) -> dict[str, Any]:
    # A cell's own name has to match from its first letter on (pet/tuners/lora_adapter.py).
    modules = "|".join(f"{name}$" for name in lora.targets)
    return {
        "rank": lora.rank,
        "alpha": lora.alpha,
        "modules": modules,
        "scale": f"{lora.alpha / lora.rank:g}",
    }


def _gb(nbytes: float) -> float:
    return round(nbytes / GB, 1)
