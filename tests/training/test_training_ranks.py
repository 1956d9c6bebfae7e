"""Data and tensor parallel runs over processes of their own, against the same run in one."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
from helpers.training import TinyRun, tiny_config

from telechat_mindie.backend.multi_rank import RankError
from telechat_mindie.errors import InputError
from telechat_mindie.training.ranks import run_ranks
from telechat_mindie.training.settings import Computation
from telechat_mindie.training.weights import decoder_targets, hugging_face_weights


@pytest.fixture(scope="module")
def alone():
    return TinyRun()(0)


@pytest.mark.slow
@pytest.mark.parametrize(("dp", "tp"), [(2, 1), (1, 2), (2, 2)])
def test_ranks_train_as_one_process(dp, tp, alone):
    found = run_ranks(TinyRun(Computation(dp=dp, tp=tp)), dp * tp)
    steps, weights = alone
    for results, _ in found:
        for result, expected in zip(results, steps, strict=True):
            assert result.tokens == expected.tokens
            assert result.loss == pytest.approx(expected.loss, abs=1e-4)
            assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    for replica in range(dp):
        parts = [trained for _, trained in found[replica * tp : (replica + 1) * tp]]
        assert_same_weights(parts, weights)


def assert_same_weights(parts, weights):
    targets = decoder_targets(tiny_config())
    whole = dict(hugging_face_weights(targets, [weights]))
    found = dict(hugging_face_weights(targets, parts))
    assert found.keys() == whole.keys()
    for name, array in found.items():
        np.testing.assert_allclose(array, whole[name], atol=1e-4, err_msg=name)


def blocked_signals(rank):
    return signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.slow
def test_ranks_may_be_done_at_once_and_ctrl_c_is_never_for_them():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert run_ranks(blocked_signals, 2) == [before | {signal.SIGINT}] * 2
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def refuse(rank):
    if rank == 1:
        raise InputError("is wrong", where="rows")
    signal.pause()


def fail(rank):
    if rank == 0:
        raise ZeroDivisionError("by\nnothing")
    signal.pause()


def die(rank):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


@pytest.mark.slow
def test_one_rank_ends_all():
    with pytest.raises(InputError, match="rows: is wrong"):
        run_ranks(refuse, 2)
    with pytest.raises(RankError, match=r"rank 0 of 2: ZeroDivisionError: by nothing$"):
        run_ranks(fail, 2)
    with pytest.raises(RankError, match="rank 1 of 2: ended unexpectedly with code -9"):
        run_ranks(die, 2)


def test_one_rank_runs_here():
    assert run_ranks(lambda rank: (rank, os.getpid()), 1) == [(0, os.getpid())]
