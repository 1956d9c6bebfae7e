"""The folder of a run: nobody else's, one process's at a time, and without what a killed run left."""

from __future__ import annotations

import numpy as np
import pytest

from telechat_mindie.errors import OutputError
from telechat_mindie.training.folder import MARKER, RunFolder


def test_a_run_that_is_there_is_kept_unless_told(tmp_path):
    with RunFolder(tmp_path / "run", 2) as folder:
        folder.checkpoints.save_rank(4, 0, {"a": np.zeros(2)})
        folder.checkpoints.commit(4, (0, 4), 1, {})
        (folder.scratch / "rows").touch()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", MARKER]
    with (
        pytest.raises(OutputError, match=r"holds a run \(found step 4 is saved\). .*--resume.*--force"),
        RunFolder(tmp_path / "run", 2),
    ):
        pass
    with RunFolder(tmp_path / "run", 2, resume=True) as folder:
        assert folder.checkpoints.steps() == [4]
    with RunFolder(tmp_path / "run", 2, force=True) as folder:
        assert folder.saved() == [] and folder.checkpoints.steps() == [4]  # until all that can be refused was looked at
        folder.begin()
        assert folder.checkpoints.steps() == []


@pytest.mark.parametrize("result", ["model", "adapter"])
def test_a_result_is_kept_whose_checkpoints_were_removed(tmp_path, result):
    with RunFolder(tmp_path / "run", 2):
        (tmp_path / "run" / result).mkdir()
    with pytest.raises(OutputError, match=rf"holds a run \(found {result}\)"), RunFolder(tmp_path / "run", 2):
        pass
    with RunFolder(tmp_path / "run", 2, resume=True) as folder:
        folder.begin()
        assert (tmp_path / "run" / result).exists()
    with RunFolder(tmp_path / "run", 2, force=True) as folder:
        folder.begin()
        assert not (tmp_path / "run" / result).exists()


def test_a_run_that_saved_nothing_is_begun_anew(tmp_path):
    for _ in range(2):
        with RunFolder(tmp_path / "run", 2) as folder:
            (folder.path / "loss.csv").touch()
    with RunFolder(tmp_path / "run", 2) as folder:
        folder.begin()
        assert not (folder.path / "loss.csv").exists()


def test_resume_where_nothing_is_begins(tmp_path):
    with RunFolder(tmp_path / "run", 2, resume=True) as folder:
        assert folder.checkpoints.steps() == [] and folder.scratch.is_dir()


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"force": True}])
def test_what_is_no_run_is_left_alone(tmp_path, flags):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(OutputError, match="holds something else than a run"), RunFolder(tmp_path, 2, **flags):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_two_processes_do_not_work_in_one(tmp_path):
    with (
        RunFolder(tmp_path / "run", 2),
        pytest.raises(OutputError, match="another run works here"),
        RunFolder(tmp_path / "run", 2, resume=True),
    ):
        pass


def test_what_a_killed_run_left_is_removed(tmp_path):
    with RunFolder(tmp_path / "run", 2):
        pass
    left = [
        tmp_path / "run" / name for name in (".scratch/stop", ".scratch/rows", "checkpoints/.step-00000004.partial/x")
    ]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("5")
    with RunFolder(tmp_path / "run", 2, resume=True):
        assert not any(path.exists() for path in left)


def test_a_missing_parent_is_named(tmp_path):
    with pytest.raises(OutputError, match="parent folder is missing"), RunFolder(tmp_path / "a" / "b", 2):
        pass
