"""How the native kernels' library is built, kept and chosen. A tiny source stands in for the kernels' own."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from telechat_mindie.errors import InputError
from telechat_mindie.model.kernels import native_build, selection
from telechat_mindie.model.kernels.native_build import INSTRUCTION_SETS, InstructionSet, NativeUnavailable

SET = InstructionSet("tiny", frozenset(), ())


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Sources of one function, a self-test that accepts them, and a cache folder that does not exist yet."""
    try:
        native_build.compiler()
    except NativeUnavailable as reason:
        pytest.skip(str(reason))
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "tiny.cpp").write_text('extern "C" void telechat_set_threads(int) {}\n')
    monkeypatch.setattr(native_build, "SOURCES", sources)
    monkeypatch.setattr(native_build, "SELF_TEST", ["-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])"])
    yield tmp_path / "cache"


def test_built_once_and_kept_private(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = native_build.build(SET, tiny).path
    assert stat.S_IMODE(tiny.stat().st_mode) == 0o700 and stat.S_IMODE(path.stat().st_mode) == 0o700
    assert sorted(file.name for file in tiny.iterdir()) == ["build.lock", path.name]
    monkeypatch.setattr(native_build, "SELF_TEST", ["-c", "raise SystemExit('built again')"])
    assert native_build.build(SET, tiny).path == path


def test_a_compilation_is_said_once_and_before_it(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, native_build.__name__):
        native_build.build(SET, tiny)
        native_build.build(SET, tiny)
    assert caplog.messages == ["compiling kernels for tiny, once on this machine: about 20 s"]


def test_another_source_or_flag_is_another_library(tiny: Path) -> None:
    first = native_build.build(SET, tiny).path
    assert native_build.build(InstructionSet("tiny", frozenset(), ("-DX=1",)), tiny).path != first
    (native_build.SOURCES / "tiny.cpp").write_text('extern "C" void telechat_set_threads(int) {} // changed\n')
    assert native_build.build(SET, tiny).path != first


def test_failed_self_test_leaves_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build, "SELF_TEST", ["-c", "import os; os.abort()"])
    with pytest.raises(NativeUnavailable, match="exit code -6"):
        native_build.build(SET, tiny)
    assert [file.name for file in tiny.iterdir()] == ["build.lock"]


def test_failed_compilation_names_the_error(tiny: Path) -> None:
    (native_build.SOURCES / "tiny.cpp").write_text("#error this CPU is not known\n")
    with pytest.raises(NativeUnavailable, match="this CPU is not known"):
        native_build.build(SET, tiny)


@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_cache_that_others_can_write_is_not_used(tiny: Path, mode: int) -> None:
    tiny.mkdir()
    tiny.chmod(mode)
    with pytest.raises(NativeUnavailable, match="written by others"):
        native_build.build(SET, tiny)


def test_cache_of_somebody_else_is_not_used(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: tiny.stat().st_uid + 1)
    with pytest.raises(NativeUnavailable, match="somebody else"):
        native_build.build(SET, tiny)


def test_library_that_others_can_write_is_not_loaded(tiny: Path) -> None:
    native_build.build(SET, tiny).path.chmod(0o722)
    with pytest.raises(NativeUnavailable, match="written by others"):
        native_build.build(SET, tiny)


def test_cache_that_is_no_directory(tiny: Path) -> None:
    tiny.write_text("")
    with pytest.raises(NativeUnavailable, match="cache"):
        native_build.build(SET, tiny)


def test_several_processes_build_once(tiny: Path) -> None:
    log = tiny.parent / "tests.log"
    script = (
        "import sys; from pathlib import Path; from telechat_mindie.model.kernels import native_build as b\n"
        "b.SOURCES = Path(sys.argv[1])\n"
        "b.SELF_TEST = ['-c', 'import sys; print(1, file=open(' + repr(sys.argv[3]) + ', \"a\"))']\n"
        "print(b.build(b.InstructionSet('tiny', frozenset(), ()), Path(sys.argv[2])).path)\n"
    )
    command = [sys.executable, "-c", script, str(native_build.SOURCES), str(tiny), str(log)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = {process.communicate()[0] for process in running}
    assert all(process.returncode == 0 for process in running)
    assert len(outputs) == 1 and Path(outputs.pop().strip()).exists()
    assert log.read_text().split() == ["1"]


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native_build.cache_folder() == tmp_path / "telechat-mindie"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert native_build.cache_folder() == tmp_path / "home" / ".cache" / "telechat-mindie"


def test_cache_folder_that_mindspore_cannot_load_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a:b"))
    with pytest.raises(NativeUnavailable, match="colon"):
        native_build.cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("MS_CUSTOM_AOT_WHITE_LIST", str(tmp_path))
    assert native_build.cache_folder() == tmp_path / "telechat-mindie"
    monkeypatch.setenv("MS_CUSTOM_AOT_WHITE_LIST", str(tmp_path / "elsewhere"))
    with pytest.raises(NativeUnavailable, match="does not allow"):
        native_build.cache_folder()


def test_no_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(NativeUnavailable, match="XDG_CACHE_HOME"):
        native_build.cache_folder()


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TELECHAT_CPU_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert [native_build.thread_count(ranks) for ranks in (1, 2, 4, 8)] == [6, 3, 1, 1]
    monkeypatch.setenv("TELECHAT_CPU_THREADS", "3")
    assert native_build.thread_count(2) == 3
    for wrong in ("0", "-1", "two", "", "1025", "²"):
        monkeypatch.setenv("TELECHAT_CPU_THREADS", wrong)
        with pytest.raises(InputError, match="TELECHAT_CPU_THREADS"):
            native_build.thread_count()


def test_every_cpu_has_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build, "cpu_flags", lambda: frozenset())
    assert native_build.usable_instruction_sets() == [INSTRUCTION_SETS[-1]]
    monkeypatch.setattr(native_build, "cpu_flags", lambda: frozenset({"avx2", "fma", "f16c", "avx512f"}))
    assert [found.name for found in native_build.usable_instruction_sets()] == ["AVX2", "portable"]


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine where nothing can be compiled."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.delenv("TELECHAT_CPU_KERNELS", raising=False)
    for cached in (native_build.library, selection._native_available):
        cached.cache_clear()
    yield
    for cached in (native_build.library, selection._native_available):
        cached.cache_clear()


def test_without_a_compiler_mindspore_takes_over_with_one_warning(
    no_compiler: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        chosen = [selection.select_cpu_kernels().__name__ for _ in range(3)]
    assert chosen == ["CpuKernels"] * 3
    assert len(caplog.messages) == 1 and "no C++ compiler was found" in caplog.messages[0]
    assert selection.describe_cpu_kernels("bfloat16") == "MindSpore (float32 weights)"


def test_forced_native_without_a_compiler_is_an_error(no_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TELECHAT_CPU_KERNELS", "native")
    with pytest.raises(NativeUnavailable, match="no C\\+\\+ compiler was found"):
        selection.select_cpu_kernels()


def test_mindspore_can_be_forced(no_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TELECHAT_CPU_KERNELS", "mindspore")
    assert selection.select_cpu_kernels().__name__ == "CpuKernels"


@pytest.mark.parametrize("wrong", ["", "Native", "torch"])
def test_unknown_choice_is_refused(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv("TELECHAT_CPU_KERNELS", wrong)
    with pytest.raises(InputError, match="native or mindspore"):
        selection.select_cpu_kernels()


def test_describe_names_path_dtype_and_threads(monkeypatch):
    monkeypatch.delenv("TELECHAT_CPU_KERNELS", raising=False)
    monkeypatch.setenv("TELECHAT_CPU_THREADS", "1")
    name = native_build.library().instruction_set.name
    assert selection.describe_cpu_kernels("bfloat16") == f"native {name} (bfloat16 weights), 1 thread"
