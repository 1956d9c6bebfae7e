"""`telechat-mindie export`."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from telechat_mindie.commands.completion import names_in
from telechat_mindie.commands.options import AsJson, Overwrite, Variant


def export(
    model_path: Path = typer.Argument(None, help="A model directory; or name a released size with --variant."),
    variant: Variant = None,
    tp: int = typer.Option(None, "--tp", help="Tensor parallel size; default: the directory's, or 1."),
    dtype: str = typer.Option(
        None,
        "--dtype",
        help="float16 or bfloat16; default: the directory's, or as published.",
        autocompletion=names_in("dtypes", "WEIGHT_DTYPES"),
    ),
    output: Path = typer.Option(Path(), "-o", "--output", help="Directory for the files."),
    block_size: int = typer.Option(None, "--block-size", help="Tokens of a block; default: the directory's, or 128."),
    external_cache: bool = typer.Option(False, "--external-cache", help="Caches as arguments (npuMemSize -1)."),
    layer_form: str = typer.Option(
        None,
        "--layer-form",
        help="flat or split; default: the directory's, or flat.",
        autocompletion=names_in("model_dir.serving", "LAYER_FORMS"),
    ),
    force: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a model's graphs for Ascend as MINDIR files, without weights, and report what is in them.

    Examples:
        telechat-mindie export model -o graphs
        telechat-mindie export --variant 7b --tp 2 -o graphs
    """
    from telechat_mindie import variants
    from telechat_mindie.checkpoint.stream import choose_dtype, known_dtype
    from telechat_mindie.commands.output import print_json
    from telechat_mindie.errors import InputError
    from telechat_mindie.model.rope import RotaryTable
    from telechat_mindie.model_dir.layout import ModelDir
    from telechat_mindie.model_dir.serving import LAYER_FORMS

    if (model_path is None) == (variant is None):
        raise InputError("name one of the two", where="MODEL_PATH, --variant")
    if variant is not None:
        config = variants.named(variant)
        tp = tp or 1
        dtype = choose_dtype(dtype or "auto", "float32", config)
        rotary, block_size = RotaryTable.of(config), block_size or 128
        max_seq_len, layer_form = config.training_seqlen, layer_form or LAYER_FORMS[0]
    else:
        directory = ModelDir.open(model_path)
        config = directory.config
        serving = directory.serving
        tp = tp or directory.tp
        dtype = known_dtype(dtype) if dtype else serving.dtype
        rotary = RotaryTable.of(config, serving.extend_method, serving.rotary_dtype, serving.scaling_factor)
        block_size = block_size or serving.block_size
        max_seq_len, layer_form = serving.max_seq_len, layer_form or serving.layer_form
    if layer_form not in LAYER_FORMS:
        raise InputError("is unknown", where="--layer-form", expected=" or ".join(LAYER_FORMS), found=layer_form)
    os.environ.setdefault("GLOG_v", "3")  # MindSpore warns of every shape check that it evaluates again
    from telechat_mindie.model.export import export as run

    report = run(
        config,
        tp,
        output,
        dtype,
        f"telechat2_{variant or variants.label_for(config)}",
        block_size=block_size,
        external_cache=external_cache,
        rotary=rotary,
        max_seq_len=max_seq_len,
        layer_form=layer_form,
        force=force,
    )
    if as_json:
        print_json(report.as_dict())
    else:
        print(report.table())
