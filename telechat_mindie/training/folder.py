"""The folder of a run: whose it is, who works in it, and what a killed run left there."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import telechat_mindie
from telechat_mindie.errors import OutputError
from telechat_mindie.staging import DIR_MODE, dump_json, reporting_os_errors, write_file
from telechat_mindie.training.checkpoints import Checkpoints
from telechat_mindie.training.curve import CSV, PICTURE

MARKER = "finetune.json"

_CHECKPOINTS, _SCRATCH = "checkpoints", ".scratch"
_RESULTS = ("model", "adapter")


class RunFolder:
    """A run's folder, this process's alone until the context ends.

    Args:
        path: made if it is not there.
        keep: how many of the newest checkpoints stay.
        resume: go on with the run that is there, if there is one.
        force: begin anew in place of a run that is there, which stays until `begin`.

    Raises:
        OutputError: a run or something else is there, another process works in it, or it cannot be written.
    """

    def __init__(self, path: Path, keep: int, *, resume: bool = False, force: bool = False) -> None:
        self.path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow a link
        self.checkpoints = Checkpoints(self.path / _CHECKPOINTS, keep)
        self.scratch = self.path / _SCRATCH
        self.resume = resume
        self._force = force

    def __enter__(self) -> RunFolder:
        self._check()
        with reporting_os_errors(self.path):
            self.path.mkdir(mode=DIR_MODE, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock)
                raise OutputError("another run works here", where=self.path, advice="Wait for it to end.") from None
            write_file(self.path / MARKER, dump_json({"made_by": f"telechat-mindie {telechat_mindie.__version__}"}))
            self._clean()
            self.checkpoints.clean()
            self.scratch.mkdir(mode=DIR_MODE)
        return self

    def __exit__(self, *_: object) -> None:
        self._clean()
        os.close(self._lock)

    def begin(self) -> None:
        """Take away the run that was there before, unless this one goes on with it. Comes behind every check."""
        if self.resume:
            return
        with reporting_os_errors(self.path):
            for name in (CSV, PICTURE):
                (self.path / name).unlink(missing_ok=True)
            for name in (_CHECKPOINTS, *_RESULTS):
                if (self.path / name).exists():
                    shutil.rmtree(self.path / name)
        self.checkpoints.clean()

    def saved(self) -> list[int]:
        """Steps of the run that this one goes on with, ascending."""
        return self.checkpoints.steps() if self.resume else []

    def result(self, *, lora: bool) -> Path:
        """Where the result of a run comes to stand."""
        return self.path / _RESULTS[lora]

    def _check(self) -> None:
        if not self.path.parent.is_dir():
            raise OutputError("parent folder is missing", where=self.path, advice=f"mkdir -p {self.path.parent}")
        if self.path.exists() and not self.path.is_dir():
            raise OutputError("exists and is not a directory", where=self.path)
        with reporting_os_errors(self.path):
            if not self.path.exists() or not any(self.path.iterdir()):
                return
        if not (self.path / MARKER).is_file():
            raise OutputError(
                f"holds something else than a run (no {MARKER})", where=self.path, advice="Choose another folder."
            )
        kept = [f"step {step} is saved" for step in self.checkpoints.steps()[-1:]]
        kept += [name for name in _RESULTS if (self.path / name).exists()]
        if kept and not self.resume and not self._force:  # what saved nothing is lost by nobody
            raise OutputError(
                "holds a run",
                where=self.path,
                found=kept[0],
                advice="Go on with it by --resume, or begin anew in its place with --force.",
            )

    def _clean(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)
