"""telechat2-nano: a real, tiny TeleChat2 checkpoint in the Hugging Face format, trained by tools/train_nano.py."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from telechat_mindie.staging import StagedDirectory

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json")


def write_checkpoint(directory: Path, *, replace: bool = False) -> None:
    """Write the checkpoint's files into `directory`, complete or not at all.

    Raises:
        OutputError: the directory exists or cannot be written.
    """
    with StagedDirectory(directory, replace=replace, marker="config.json") as staged:
        for name in FILES:
            (staged.path / name).write_bytes(resources.files(__name__).joinpath(name).read_bytes())
        staged.commit()
