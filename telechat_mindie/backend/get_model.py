"""What MindIE's ms backend imports from `mindformers` beside the runner."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from telechat_mindie.errors import ModelDirError
from telechat_mindie.text.input_builder import InputBuilder
from telechat_mindie.text.tokenizer import TelechatTokenizer


def get_model(
    model_name_or_path: str | PathLike[str], *_: object, **__: object
) -> tuple[TelechatTokenizer, InputBuilder]:
    """A directory's tokenizer, and what builds prompts with it.

    Args:
        model_name_or_path: a built model directory. Everything else that mindformers' function takes is ignored.

    Raises:
        ModelDirError: not a directory.
        TokenizerError: no usable tokenizer in it.
    """
    directory = Path(model_name_or_path)
    if not directory.is_dir():
        raise ModelDirError(
            "is not a model directory",
            where=directory,
            found="a file" if directory.exists() else "nothing",
            advice="Set modelWeightPath to a directory that `telechat-mindie build` made.",
        )
    tokenizer = TelechatTokenizer.from_pretrained(directory)
    return tokenizer, InputBuilder(tokenizer)
