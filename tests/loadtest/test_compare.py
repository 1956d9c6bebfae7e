"""Pictures of load tests, and two of them side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from helpers.fake_mindie import FakeMindie
from typer.testing import CliRunner

from telechat_mindie.cli import app
from telechat_mindie.errors import ConfigError, InputError, OutputError
from telechat_mindie.loadtest import plot
from telechat_mindie.loadtest.compare import Measure, compare
from telechat_mindie.loadtest.record import Record
from telechat_mindie.loadtest.report import Report

BEGINNINGS = {"png": b"\x89PNG\r\n", "svg": b"<?xml", "pdf": b"%PDF-"}


def records(slower=1.0):
    return [
        Record(
            1.0,
            1 + slower,
            [1 + 0.2 * slower, 1 + 0.4 * slower, 1 + 0.8 * slower],
            prompt_tokens=10,
            generated_tokens=4,
        ),
        Record(1.5, 1.5 + slower, [1.5 + slower], prompt_tokens=20, generated_tokens=1),
        Record(2.0, 2.5, [2.1], error="HTTP 503", message="busy"),
    ]


def write_report(path, slower=1.0, **settings):
    report = Report.of(records(slower)).as_dict()
    path.write_text(json.dumps({"settings": {"url": "u", "seed": 0, **settings}, **report}))
    return path


@pytest.fixture
def figures(monkeypatch):
    """The figures that would have been saved."""
    saved = []
    monkeypatch.setattr(plot, "_save", lambda figure, _: saved.append(figure))
    return saved


def labels(axes):
    legend = axes.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def bench(*arguments):
    command = [sys.executable, "-m", "telechat_mindie", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf", "SVG"])
def test_the_ending_is_the_format(tmp_path, ending):
    file = tmp_path / f"plot.{ending}"
    plot.check_target(file)
    plot.write_plot(file, records(), "title")
    assert file.read_bytes().startswith(BEGINNINGS[ending.lower()])
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_what_cannot_be_drawn_is_refused_before_the_test(tmp_path):
    with pytest.raises(InputError, match=r"expected \.png or \.svg or \.pdf or .*found \.doc"):
        plot.check_target(tmp_path / "plot.doc")
    with pytest.raises(InputError, match="found none"):
        plot.check_target(tmp_path / "plot")
    with pytest.raises(OutputError, match="mkdir -p"):
        plot.check_target(tmp_path / "no" / "plot.png")
    (tmp_path / "x.png").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        plot.check_target(tmp_path / "x.png")
    with FakeMindie() as fake:
        for option, name in (
            ("--plot", "x.doc"),
            ("--plot", "no/x.svg"),
            ("--output", "no/x.json"),
            ("--output", "x.png"),
        ):
            done = bench("serve", "--url", fake.url, option, tmp_path / name)
            assert done.returncode == 2 and done.stderr.count("\n") == 1 and name in done.stderr
        assert not fake.requests  # nothing was sent


def test_every_line_of_the_picture_is_in_a_legend(figures):
    plot.write_plot("x.png", records(), "title")
    (figure,) = figures
    first, between, latency, timeline, running = figure.axes
    assert figure.get_suptitle() == "title, 1 failed"
    assert labels(first) == ["2 requests, max 1,000.0 ms", "p50 600.0 ms", "p99 992.0 ms"]
    assert labels(between)[0] == "2 waits, max 400.0 ms" and labels(latency)[0].startswith("2 requests")
    assert labels(running) == ["output tokens/s", "requests that run"] and labels(timeline) == []
    for axes in (first, between, latency):
        assert len(axes.lines) == len(labels(axes))


def test_the_picture_of_a_comparison(figures, tmp_path):
    comparison = compare(write_report(tmp_path / "before.json"), write_report(tmp_path / "after.json", 2.0))
    plot.write_comparison("x.png", comparison)
    (figure,) = figures
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["TTFT", "TPOT", "ITL", "e2e"]
    assert all(labels(axes) == ["before", "after"] for axes in figure.axes)
    before, after = ([bar.get_height() for bar in bars] for bars in figure.axes[3].containers)
    assert before == pytest.approx([1000] * 4) and after == pytest.approx([2000] * 4)
    assert figure.get_suptitle() == "before: 3.3, after: 2.0 output tokens/s"


def test_files_of_one_name_are_told_apart_in_a_picture(figures, tmp_path):
    paths = [tmp_path / folder / "report.json" for folder in ("old", "new")]
    for path in paths:
        path.parent.mkdir()
        write_report(path)
    plot.write_comparison("x.png", compare(*paths))
    assert labels(figures[0].axes[0]) == [str(path) for path in paths]


def test_a_report_that_could_not_be_written_is_refused_before_the_test(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with FakeMindie() as fake:
        arguments = ["bench", "serve", "--url", fake.url, "--output", str(tmp_path / "x.json")]
        refused = CliRunner().invoke(app, arguments).exception
        assert isinstance(refused, OutputError) and "x.json: cannot be written" in str(refused) and not fake.requests


def test_a_comparison(tmp_path):
    first = write_report(tmp_path / "a.json", concurrency=8)
    second = write_report(tmp_path / "b.json", 2.0, concurrency=16, rate=None)
    found = compare(first, second)
    assert found.differing == {"concurrency": (8, 16)}
    by_name = {measure.name: measure for measure in found.measures}
    latency = by_name["e2e p50, ms"]
    assert (latency.before, latency.after, latency.better) == (pytest.approx(1000), pytest.approx(2000), False)
    assert latency.change == pytest.approx(1.0) and latency.row()[3:] == ("+100.0%", "worse")
    assert by_name["output tokens/s"].better is False and by_name["output tokens/s"].change < 0
    assert by_name["failed, %"].row() == ("failed, %", "33.33", "33.33", "+0.0%", "")
    assert compare(second, first).measures[0].better is True
    assert all(measure.better is None for measure in compare(first, first).measures)


def test_a_measure_that_was_nothing():
    measure = Measure.of("failed, %", 0, 5, more_is_better=False)
    assert measure.row() == ("failed, %", "0.00", "5.00", "", "worse")


@pytest.mark.parametrize(
    "damage", [{"settings": 1}, {"requests": 0}, {"ttft_ms": {"p50": 1}}, {"failed": {"x": "y"}}, {"e2e_ms": 1}]
)
def test_another_file_is_no_report(tmp_path, damage):
    path = write_report(tmp_path / "a.json")
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **damage}))
    with pytest.raises(ConfigError, match=r"a\.json: is no report of a load test"):
        compare(path, path)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="is no report"):
        compare(path, path)


def test_from_test_to_comparison(tmp_path):
    """As a user does it: two tests, their reports in files, one table."""
    with FakeMindie(pieces=["字"] * 4) as fake:
        for name, concurrency in (("a", 1), ("b", 2)):
            options = ("--url", fake.url, "--requests", 4, "--warm-up", 0, "--concurrency", concurrency, "--json")
            done = bench("serve", *options, "--output", tmp_path / f"{name}.json")
            assert json.loads(done.stdout) == json.loads((tmp_path / f"{name}.json").read_text())
    done = bench("compare", tmp_path / "a.json", tmp_path / "b.json", "--plot", tmp_path / "c.svg")
    assert done.returncode == 0 and "TTFT p99, ms" in done.stdout and "output tokens/s" in done.stdout
    assert done.stderr == "note: other concurrency: 1 before, 2 after\n"
    assert (tmp_path / "c.svg").read_bytes().startswith(b"<?xml")
