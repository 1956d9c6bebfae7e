"""loss.csv and loss.png: a line a step, those that a resumed run repeats taken away."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from telechat_mindie.errors import OutputError
from telechat_mindie.training.curve import COLUMNS, CSV, PICTURE, Curve, Point, draw, read_points

POINT = Point(1, 2.3333333333333335, None, 1e-05, 0.1, 1024, 0.25)
POINTS = [POINT, replace(POINT, step=2, eval_loss=2.5), replace(POINT, step=3)]


def test_a_line_a_step_that_reads_back_as_it_was(tmp_path):
    curve = Curve(tmp_path)
    for point in POINTS:
        curve.add(point)
    head, first, *_ = (tmp_path / CSV).read_text().splitlines()
    assert head == "step,loss,eval_loss,learning_rate,grad_norm,tokens,seconds" == ",".join(COLUMNS)
    assert first == "1,2.3333333333333335,,1e-05,0.1,1024,0.25"
    assert read_points(tmp_path / CSV) == POINTS


def test_a_resumed_run_keeps_the_lines_before_it(tmp_path):
    curve = Curve(tmp_path)
    for point in POINTS:
        curve.add(point)
    with (tmp_path / CSV).open("a") as file:
        file.write("4,2.3")  # a kill in the middle of a line
    resumed = Curve(tmp_path, after=2)
    assert resumed.points == POINTS[:2] == read_points(tmp_path / CSV)
    resumed.add(POINTS[2])
    assert read_points(tmp_path / CSV) == POINTS
    assert Curve(tmp_path).points == []


def test_another_file_of_that_name_is_refused(tmp_path):
    (tmp_path / CSV).write_text("a,b\n1,2\n")
    with pytest.raises(OutputError, match=r"loss.csv: is not the course of a run"):
        Curve(tmp_path, after=2)


def test_the_picture_is_a_png(tmp_path):
    assert draw(tmp_path, POINTS, "nano")
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == [PICTURE]


def test_without_matplotlib_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not draw(tmp_path, POINTS, "nano") and not list(tmp_path.iterdir())
