"""tools/compare_graphs: what counts as a difference, and what the reviewed list makes of it."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import yaml
from helpers import ROOT

from telechat_mindie.model.mindir import OperatorNode, Value


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("compare_graphs", ROOT / "tools" / "compare_graphs.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses looks for it
    spec.loader.exec_module(module)
    return module


def node(operator, *arguments):
    return OperatorNode(operator, arguments, None)


def graphs(*nodes):
    return {"prefill": [], "decode": list(nodes)}


def matmul(dtype="float16", *axes):
    return node("MatMul", Value("x", dtype, axes or (None, 64)), False)


def test_names_and_leading_axes_do_not_count(tool):
    theirs = graphs(matmul(), node("Cast"))
    ours = graphs(node("MatMul", Value("y", "float16", (1, None, 64)), False))
    assert list(tool.differences("dense", "flat", theirs, ours)) == []


def test_dtypes_axes_constants_and_numbers_of_calls_do(tool):
    def found(*nodes):
        return [one.argument for one in tool.differences("dense", "flat", graphs(matmul()), graphs(*nodes))]

    assert found(matmul("float32")) == found(matmul("float16", None, 32)) == [0]
    assert found(node("MatMul", Value("x", "float16", (None, 64)), True)) == [1]
    assert found(node("MatMul", Value("x", "float16", (None, 64)))) == ["arguments"]
    assert found() == found(matmul(), matmul()) == ["calls"]


def test_only_reviewed_differences_pass_and_no_entry_may_be_stale(tool):
    found = list(tool.differences("dense", "flat", graphs(matmul()), graphs(matmul("float32"))))
    entry = {"operator": "MatMul", "argument": 0, "why": "meant"}
    assert tool.judge(found, [entry]) == []
    assert tool.judge(found, [entry | {"graph": "decode", "model": "dense", "form": "flat"}]) == []
    assert [line.split()[0] for line in tool.judge(found, [])] == ["DIFFERENT"]
    for other in ({"argument": 1}, {"operator": "RmsNorm"}, {"graph": "prefill"}, {"form": "split"}, {"model": "moe"}):
        assert [line.split()[0] for line in tool.judge(found, [entry | other])] == ["DIFFERENT", "STALE"]
    assert [line.split()[0] for line in tool.judge([], [entry])] == ["STALE"]


def test_every_reviewed_entry_says_why(tool):
    entries = yaml.safe_load(tool.REVIEWED.read_text(encoding="utf-8"))
    assert entries and all(entry["operator"] in tool.COMPARED and entry["why"] for entry in entries)
