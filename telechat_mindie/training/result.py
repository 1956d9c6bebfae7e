"""What a run leaves: a Hugging Face checkpoint, or a LoRA adapter as peft saves it. Both are what `build` takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from telechat_mindie.checkpoint.adapters.peft import CONFIG
from telechat_mindie.checkpoint.convert import OutputOptions, to_hugging_face
from telechat_mindie.checkpoint.formats.containers import SAFETENSORS
from telechat_mindie.checkpoint.source import Checkpoint, open_checkpoint
from telechat_mindie.foreign import ADAPTER_FILES
from telechat_mindie.staging import StagedDirectory, dump_json, reporting_os_errors, write_file
from telechat_mindie.training.arrays import StoredArrays, write_arrays
from telechat_mindie.training.lora import peft_config, peft_tensors
from telechat_mindie.training.settings import Lora


class Trained:
    """What the tensor parallel ranks trained, each in a folder as mindformers keeps a rank's, on the way to a result.

    Args:
        folder: of the rank folders.
        tp: how many there are.
    """

    def __init__(self, folder: Path, tp: int) -> None:
        self._folder = folder
        self._tp = tp

    def save(self, tp_rank: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a rank's, in place of what an earlier run left."""
        file = self._file(tp_rank)
        with reporting_os_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(file.parent, file.name, arrays)

    def write_model(self, base: Checkpoint, output: Path, dtype: str) -> None:
        """Put the ranks' weights together under their published names, with config.json and tokenizer of `base`.

        Args:
            base: what was trained.
            output: appears whole or not at all.
            dtype: of the weights; auto: that of `base`.

        Raises:
            CheckpointError: a weight is not finite, or beyond `dtype`.
            OutputError: `output` cannot be written.
        """
        options = OutputOptions(dtype=base.dtype if dtype == "auto" else dtype)
        to_hugging_face(open_checkpoint(self._folder, base.config_dir), output, options)

    def write_adapter(self, base: Checkpoint, lora: Lora, output: Path) -> None:
        """Write the ranks' LoRA factors as peft's save_pretrained does; `output` appears whole or not at all."""
        with StagedDirectory(output, replace=False, marker=CONFIG) as staged:
            ranks = [StoredArrays(self._file(rank)) for rank in range(self._tp)]
            write_arrays(staged.path, ADAPTER_FILES[0], dict(peft_tensors(base.config, lora, ranks)))
            settings = peft_config(lora) | {"base_model_name_or_path": str(base.path)}
            write_file(staged.path / CONFIG, dump_json(settings))
            staged.commit()

    def _file(self, tp_rank: int) -> Path:
        return self._folder / f"rank_{tp_rank}" / f"checkpoint_{tp_rank}{SAFETENSORS.suffix}"
