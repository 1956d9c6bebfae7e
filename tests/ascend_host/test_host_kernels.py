"""Every operator call that a decoder on an NPU makes, put to the host code of the kernels that would run it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pytest
from helpers import ascend_host
from helpers.ascend_cases import BATCHES, TRAINED, batch, decoder, sizes
from helpers.ascend_host import HostKernels
from helpers.kernel_calls import kernel_lines
from helpers.operator_trace import Recorder

from telechat_mindie.backend.ascend_process import DISABLED_KERNELS_VARIABLE, rank_environment
from telechat_mindie.dtypes import HALF_DTYPES
from telechat_mindie.errors import ConfigError
from telechat_mindie.model.batch import RaggedBatch
from telechat_mindie.model.decoder import TelechatForCausalLM
from telechat_mindie.model.kernels.ascend import AscendKernels
from telechat_mindie.model.kernels.ascend_graphs import FLAT, AscendGraphs
from telechat_mindie.soc import CANN_HOME_VARIABLE

TILED_BY_CANN = ("Add", "Sub", "Mul", "Swish", "Gather", "Transpose")
"""Kernels whose tiling is in CANN's libraries, which are stood in for: their dtypes and shapes are looked at alone."""

OTHER_BACKENDS = ("Split", "Less", "Sub int32", "ReduceSum float32", "MatMul float32", "Cast bool")
"""Kernels, or those of one dtype, that the library has for other dtypes only: MindSpore takes CANN's operator."""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    try:
        return ascend_host.build(tmp_path_factory.mktemp("kernels") / "build")
    except ascend_host.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def environment(kernels: HostKernels) -> dict[str, str]:
    """A rank's, as the runner sets it before it makes the first kernel."""
    return {CANN_HOME_VARIABLE: str(kernels.home), **rank_environment({})}


def lines(models: Iterable[TelechatForCausalLM], batches: Sequence[RaggedBatch]) -> list[str]:
    """The calls of internal kernels that one layer of each model and its head make for each of `batches`, once each."""
    calls = []
    for model in models:
        graphs = AscendGraphs(model, model.kernels.call_shape())
        calls += [(graphs, call) for one in batches for call in model.kernels.calls(one)]
    with Recorder() as recorder:
        return sorted({line for graphs, call in calls for line in kernel_lines(recorder.trace(graphs, call))})


def refusals(kernels: HostKernels, calls: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The calls that a kernel refuses, with its reason, or that another takes than in mindformers' processes."""
    refused = {}
    for call, outcome in zip(calls, kernels.outcomes(calls, environment), strict=True):
        kernel, kind = call.partition(" ")[0], call.partition("< ")[2].partition("[")[0]
        if kernel == "PagedAttention" and "mask_mode=0" in call and outcome == "ok":
            refused[call] = "the custom kernel takes it"  # only it knows the trapezoid, and mindformers turns it off
        elif not (
            outcome.startswith("ok")
            or (outcome == "dtypes" and {kernel, f"{kernel} {kind}"} & {*OTHER_BACKENDS})
            or (kernel in TILED_BY_CANN and outcome.startswith("Tiling") and outcome.endswith("Init failed."))
        ):
            refused[call] = outcome
    return refused


@pytest.fixture(scope="module")
def every_call() -> list[str]:
    """Of each size, rank count and dtype, with each kind of batch; layers are alike, so one layer's."""
    models = [decoder(*size) for size in sizes()]
    for dtype in HALF_DTYPES:  # rotary tables of 16 bits; those that a call's scales stretch are cast in the graph
        models += [decoder("7b", 1, dtype, FLAT, longest=most, rotary_dtype=dtype) for most in (TRAINED, 4 * TRAINED)]
    return lines(models, list(BATCHES.values()))


def test_the_kernels_take_every_call(kernels: HostKernels, environment: dict[str, str], every_call: list[str]) -> None:
    refused = refusals(kernels, every_call, environment)
    assert not refused, f"{len(refused)} of {len(every_call)}, first {next(iter(refused.items()))}"
    counted = Counter(call.partition(" ")[0] for call in every_call)
    assert {"PagedAttention", "FlashAttentionScore", "ReshapeAndCache", "ApplyRotaryPosEmb", "MatMul"} <= counted.keys()
    assert len(every_call) > 1000


def test_without_the_variable_paged_attention_is_refused(
    kernels: HostKernels, environment: dict[str, str], every_call: list[str]
) -> None:
    del environment[DISABLED_KERNELS_VARIABLE]
    refused = refusals(kernels, every_call, environment)
    assert {call.partition(" ")[0] for call in refused} == {"PagedAttention"}


def test_without_canns_home_nothing_runs(
    kernels: HostKernels, environment: dict[str, str], every_call: list[str]
) -> None:
    del environment[CANN_HOME_VARIABLE]
    refused = refusals(kernels, every_call, environment)
    assert {"MatMul", "FlashAttentionScore"} <= {call.partition(" ")[0] for call in refused}


@pytest.mark.parametrize("wide", ["slots", "block_tables", "context_lens"])
def test_64_bit_indices_are_refused(
    kernels: HostKernels, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, wide: str
) -> None:
    monkeypatch.setattr(AscendKernels, "check_attention", lambda *_: None)  # which says so first
    model = decoder("7b", 1, "float16", FLAT)
    right = batch([1, 1], [9, 300])
    wrong = dataclasses.replace(right, **{wide: getattr(right, wide).astype(np.int64)})
    assert not refusals(kernels, lines([model], [right]), environment)
    assert "dtypes" in refusals(kernels, lines([model], [wrong]), environment).values()


@pytest.mark.parametrize("block", range(16, 145, 16))
def test_the_block_sizes_that_are_let_through(kernels: HostKernels, environment: dict[str, str], block: int) -> None:
    batches = [batch([1, 1], [9, 300], block=block), batch([64], [300], block=block)]
    try:
        model = decoder("7b", 1, "float16", FLAT, block=block)
    except ConfigError as error:
        assert "cacheBlockSize" in str(error)
        assert block not in (16, 32, 64, 128)
    else:
        assert not refusals(kernels, lines([model], batches), environment)
