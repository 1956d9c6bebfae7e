"""`telechat-mindie verify`."""

from __future__ import annotations

from pathlib import Path

import typer

from telechat_mindie.commands.messages import logger
from telechat_mindie.commands.options import Adapter, AsJson, ConfigDir, ModelPath, PackedByRank, Source, Step, Strategy


def verify(
    model_path: ModelPath,
    against: Path = typer.Option(None, "--against", help="The checkpoint: derive every element again and compare."),
    adapter: Adapter = None,
    config: ConfigDir = None,
    strategy: Strategy = None,
    step: Step = None,
    source: Source = None,
    packed_by_rank: PackedByRank = False,
    as_json: AsJson = False,
) -> None:
    """Prove that a model directory is what was built: hashes, and with --against every weight.

    Exit codes: 0 nothing is wrong, 2 something is.

    Examples:
        telechat-mindie verify model
        telechat-mindie verify model --against TeleChat2-7B
    """
    from telechat_mindie.checkpoint.training_run import RunChoice
    from telechat_mindie.commands.output import byte_progress, print_json
    from telechat_mindie.errors import InputError, ModelDirError
    from telechat_mindie.model_dir.atb.rules import BUILD
    from telechat_mindie.model_dir.manifest import MANIFEST
    from telechat_mindie.model_dir.verify import check_against, check_files
    from telechat_mindie.service.facts import open_model

    choice = RunChoice(strategy, step, tuple(source or ()), packed_by_rank)
    if (adapter or config or choice) and against is None:
        where = "--adapter, --config, --strategy, --step, --source, --packed-by-rank"
        raise InputError("is for a comparison", where=where, advice="Name the checkpoint too: --against DIR.")

    directory = open_model(model_path)
    if not directory.manifest:
        raise ModelDirError(f"has no {MANIFEST} to prove it by", where=model_path, advice=BUILD)
    files = directory.files
    with byte_progress("hashing") as start:
        problems = check_files(directory, start(sum(entry.nbytes for entry in files.values())))
    if against is not None:
        with byte_progress("comparing") as start:
            problems += check_against(directory, against, start, adapter or (), config, choice, logger.info)
    if as_json:
        print_json({"model_path": str(model_path), "files": len(files), "problems": problems})
    else:
        for problem in problems:
            print(problem)
        if not problems:
            compared = f", weights equal to those of {against}" if against is not None else ""
            print(f"{model_path}: {len(files)} files as they were built{compared}")
    if problems:
        raise typer.Exit(2)
