"""What holds in an NPU's process before it computes anything, and in which order it is made to."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import mindspore as ms
import pytest

from telechat_mindie.backend import ascend_process, device
from telechat_mindie.backend.ascend_process import JIT_CONFIG, bind_to_share, prepare_process, rank_environment
from telechat_mindie.errors import InputError

VARIABLE = "MS_INTERNAL_DISABLE_CUSTOM_KERNEL_LIST"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The calls that reach MindSpore, with the environment's variable of that moment."""
    seen: list[tuple[str, Any]] = []
    monkeypatch.setattr(os, "environ", {"ASCEND_HOME_PATH": "/cann"})
    monkeypatch.setattr(ms, "set_context", lambda **given: seen.append(("context", given | variables())))
    monkeypatch.setattr(ms, "set_device", lambda *given: seen.append(("device", given)))
    monkeypatch.setattr(ascend_process, "check_chip", lambda: seen.append(("chip", None)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda *given: seen.append(("bound", given)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    return seen


def variables() -> dict[str, str]:
    return {name: os.environ[name] for name in (VARIABLE, "MS_ALLOC_CONF", "RUN_MODE")}


def test_everything_is_set_before_device_and_group(
    steps: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TELECHAT_DEVICE", "ascend")
    monkeypatch.setattr(device, "join_ranks", lambda *given: steps.append(("group", given)))
    monkeypatch.setattr(device, "AscendModel", lambda rank: steps.append(("model", None)))
    device.open_device_model(device.Rank(None, 1, 2, 5, 8, 0, 16))  # type: ignore[arg-type]
    assert [name for name, _ in steps] == ["bound", "context", "device", "chip", "group", "model"]
    context = dict(steps)["context"]
    assert context["jit_config"] == JIT_CONFIG == {"jit_level": "O0", "infer_boost": "on"}
    assert context["mode"] == ms.GRAPH_MODE
    assert (context[VARIABLE], context["RUN_MODE"]) == ("PagedAttention", "predict")
    assert context["MS_ALLOC_CONF"] == "enable_vmm:False"
    assert dict(steps)["device"] == ("Ascend", 5)
    assert dict(steps)["bound"] == (0, list(range(8, 16)))


def test_mindspore_takes_the_context() -> None:
    """In a process of its own: a context cannot be set back to none."""
    script = (
        f"import mindspore as ms; ms.set_context(mode=0, jit_config={JIT_CONFIG}); print(ms.get_context('jit_config'))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.strip() == str(JIT_CONFIG)


def test_what_the_user_has_set_is_kept() -> None:
    assert rank_environment({"MS_ALLOC_CONF": "enable_vmm:True"}).keys() == {VARIABLE, "RUN_MODE", "CPU_AFFINITY"}
    assert rank_environment({VARIABLE: "MatMul"})[VARIABLE] == "MatMul,PagedAttention"
    assert rank_environment({VARIABLE: "PagedAttention,MatMul"})[VARIABLE] == "PagedAttention,MatMul"


def test_without_cann(steps: list[tuple[str, Any]]) -> None:
    del os.environ["ASCEND_HOME_PATH"]
    with pytest.raises(InputError, match=r"ASCEND_HOME_PATH: is not set.*set_env\.sh"):
        prepare_process(0, 1, 0)
    assert not steps


def test_a_chip_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Context:
        version = "ascend310p"

        def get_ascend_soc_version(self) -> str:
            return self.version

    monkeypatch.setattr("mindspore._c_expression.MSContext.get_instance", Context)
    with pytest.raises(InputError, match=r"NPU: Atlas 300I.*found ascend310p.*800I A2"):
        ascend_process.check_chip()
    monkeypatch.setattr(Context, "version", "ascend910b")
    ascend_process.check_chip()


def test_a_process_that_is_bound_already_stays(steps: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    os.environ["CPU_AFFINITY"] = "True"
    bind_to_share(0, 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    bind_to_share(1, 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    os.environ["CPU_AFFINITY"] = "False"
    bind_to_share(1, 4)
    assert not steps
