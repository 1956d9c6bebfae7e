"""The support table: one source for `doctor --matrix`, README.md and README_zh.md."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import ROOT

from telechat_mindie.service.doctor import software, support


@pytest.mark.parametrize(("file", "language"), [("README.md", "en"), ("README_zh.md", "zh")])
def test_the_readme_holds_the_matrix(file, language):
    text = (ROOT / file).read_text("utf-8")
    expected = support.markdown(language)
    assert expected in text, f"{file} should hold:\n{expected}"


def test_each_mindie_has_its_row():
    rows = support.matrix()
    assert len(rows) == len(support.mindie_releases()) == len({row.mindie for row in rows})
    for release, row in zip(support.mindie_releases(), rows, strict=True):
        assert release.source and all(support.cells(row))
        assert release.ms_backend is (release.mindformers is not None)
        assert release.ms_backend or row.telechat_mindie.startswith("not with ms, which is gone")
    assert [row.telechat_mindie for row in rows] != [row.telechat_mindie for row in support.matrix("zh")]


@pytest.mark.parametrize(
    ("version", "mindspore"),
    [
        ("1.0.RC3", "2.4.0"),
        ("2.0.RC2", "2.6.0"),
        ("2.1.RC1", "2.7.0"),
        ("2.2.RC1", "2.7.1"),
        ("2.3.0", "2.7.2"),
        ("3.0.0.beta.2", "2.7.2"),
        ("3.0.0b1", "2.7.2"),
        ("3.0.0", "-"),
        ("3.1.0", "-"),
    ],
)
def test_what_a_mindie_carries(version, mindspore):
    release = support.release_of(version)
    assert next(row for row in support.matrix() if row.mindie == release.versions).mindspore == mindspore


def test_the_table_and_the_requirement_agree():
    """What the table says no of, the range of setup.cfg refuses, and what it does not, the range lets in."""
    for stack in support.stacks():
        release = tuple(map(int, stack.mindspore.split(".")[:2]))
        allowed = software.OLDEST_MINDSPORE <= release < software.NEWEST_MINDSPORE
        assert allowed is stack.runs, stack


def test_only_a_plain_no_keeps_this_package_off():
    stack = support.stacks()[-1]
    assert replace(stack, telechat_mindie="not run on an NPU").runs
    assert not replace(stack, telechat_mindie="no: it lacks an operator").runs


def test_advice_names_only_releases_that_can_run():
    advice = support.working_releases()
    assert "2.0.RC1" in advice and "3.0.0.beta.2" in advice and "1.0" not in advice and "3.0.0 and" not in advice


USED = {
    "ApplyRotaryPosEmb",
    "GroupedMatmulV4",
    "MoeComputeExpertTokens",
    "MoeFinalizeRouting",
    "MoeGatingTopKSoftmax",
    "MoeInitRouting",
    "PagedAttention",
    "ReshapeAndCache",
    "RmsNorm",
    "SiLU",
    "SplitWithSize",
    "Swiglu",
}
"""Operators of the Ascend path that are classes of MindSpore's generated module, all of them in its 2.6."""


def test_the_operators_that_decide_are_those_of_the_code():
    """An operator that the kernels begin to use has to be looked up in the oldest MindSpore that is let in."""
    code = "".join(path.read_text("utf-8") for path in (ROOT / "telechat_mindie/model").rglob("*.py"))
    package = Path(next(iter(find_spec("mindspore").submodule_search_locations)))
    generated = (package / "ops/auto_generate/gen_ops_prim.py").read_text("utf-8")
    assert set(re.findall(r"\bfused\.([A-Z]\w+)\(", code)) | {"ApplyRotaryPosEmb", "RmsNorm"} == USED
    assert not [name for name in USED if f"class {name}(" not in generated]
