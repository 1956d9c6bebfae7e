"""The native kernels' library: compiled at first use, tested once, kept in a cache that several processes share."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from telechat_mindie.errors import InputError, TelechatMindieError

_log = logging.getLogger(__name__)

SOURCES = Path(__file__).resolve().parent / "native"

_COMMON_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-Wl,-z,nodelete")
SELF_TEST = ["-m", "telechat_mindie.model.kernels.native_selftest"]
"""What Python runs to test a library, whose path is added."""

_WHITE_LIST = "MS_CUSTOM_AOT_WHITE_LIST"  # MindSpore's variable: the folder that operators may be loaded from
_TIMEOUT = 600  # seconds; the compiler takes about 20 on an idle core


class NativeUnavailable(TelechatMindieError):
    """The native kernels cannot be used on this machine, and why."""


@dataclass(frozen=True)
class InstructionSet:
    """A path through the sources: what the CPU must offer, in /proc/cpuinfo's names, and what the compiler is told."""

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")

INSTRUCTION_SETS = (
    InstructionSet("AVX-512", frozenset(_AVX512 + _AVX2), tuple(f"-m{flag}" for flag in _AVX512 + _AVX2)),
    InstructionSet("AVX2", frozenset(_AVX2), tuple(f"-m{flag}" for flag in _AVX2)),
    InstructionSet("portable", frozenset(), ()),
)
"""The fastest first. The last is plain C++ and vectors of the compiler, for any little-endian CPU."""


@dataclass(frozen=True)
class Library:
    """A compiled library that passed its self-test."""

    path: Path
    instruction_set: InstructionSet


def cpu_flags() -> frozenset[str]:
    """What the CPU and the kernel offer, as /proc/cpuinfo says; empty where that is no x86's."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), frozenset())


def usable_instruction_sets() -> list[InstructionSet]:
    """The paths that this CPU can run, the fastest first."""
    offered = cpu_flags()
    return [found for found in INSTRUCTION_SETS if found.needs <= offered]


def thread_count(ranks: int = 1) -> int:
    """Threads of one of `ranks` processes on this machine: TELECHAT_CPU_THREADS, or a share of the affinity mask.

    Raises:
        InputError: TELECHAT_CPU_THREADS is not a number from 1 to 1024.
    """
    chosen = os.environ.get("TELECHAT_CPU_THREADS")
    if chosen is None:
        return max(1, len(os.sched_getaffinity(0)) // ranks)
    if not (chosen.isascii() and chosen.isdigit() and 1 <= int(chosen) <= 1024):
        raise InputError(
            "is not a number of threads", where="TELECHAT_CPU_THREADS", expected="1 to 1024", found=repr(chosen)
        )
    return int(chosen)


@lru_cache(maxsize=1)
def library() -> Library:
    """The library for this CPU, built where the cache does not hold it.

    Raises:
        NativeUnavailable: no compiler, no cache directory that is safe to use, a failed build or a failed self-test.
    """
    return build(usable_instruction_sets()[0])


def build(instruction_set: InstructionSet, cache: Path | None = None) -> Library:
    """The library for one path, from `cache` (by default the user's) or compiled into it.

    The file's name holds a hash of sources, compiler version and flags. It is put there by a rename after it has passed
    its self-test, so what has the name is whole and tested; a lock keeps other processes from building the same.

    Raises:
        NativeUnavailable: as `library` says.
    """
    command = compiler()
    flags = _COMMON_FLAGS + instruction_set.flags
    folder = cache_folder() if cache is None else cache
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(folder)
        target = folder / f"kernels-{_fingerprint(command, flags)}.so"
        if target.exists():
            _check_private(target)
            return Library(target, instruction_set)
        with _locked(folder / "build.lock"):
            if not target.exists():
                _log.info("compiling kernels for %s, once on this machine: about 20 s", instruction_set.name)
                _compile(command, flags, target)
                _log.debug("compiled kernels: %s", target)
    except OSError as error:
        raise NativeUnavailable(f"cannot be used as a cache: {error.strerror}", where=folder) from None
    return Library(target, instruction_set)


def load(library: Library, threads: int) -> ctypes.CDLL:
    """The library in this process; MindSpore, which opens the same file, shares its thread pool."""
    loaded = ctypes.CDLL(str(library.path))
    loaded.telechat_set_threads(threads)
    return loaded


def cache_folder() -> Path:
    """Where libraries are kept: below XDG_CACHE_HOME, by default ~/.cache.

    Raises:
        NativeUnavailable: there is no home directory, or MindSpore would not load a library from there.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The XDG base directory specification: a relative path is to be ignored.
        parent = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        raise NativeUnavailable("no home directory", advice="Set XDG_CACHE_HOME.") from None
    folder = (parent / "telechat-mindie").resolve()
    allowed = os.environ.get(_WHITE_LIST)
    if allowed is not None and not folder.is_relative_to(Path(allowed).resolve()):
        raise NativeUnavailable("does not allow the cache", where=_WHITE_LIST, expected=folder, found=allowed)
    if ":" in str(folder):
        raise NativeUnavailable("holds a colon, which parts path and function for MindSpore", where=folder)
    return folder


def _check_private(path: Path) -> None:
    """What is loaded into this process must not be another user's to write."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode) or found.st_uid != os.geteuid():
        raise NativeUnavailable("belongs to somebody else, or is a link", where=path)
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NativeUnavailable(
            "can be written by others", where=path, found=f"mode {found.st_mode & 0o777:o}", advice="chmod go-w it."
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def compiler() -> str:
    """The compiler that CXX names, or the system's.

    Raises:
        NativeUnavailable: there is none.
    """
    wanted = os.environ.get("CXX")
    names = (wanted,) if wanted else ("c++", "g++", "clang++")
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        raise NativeUnavailable("no C++ compiler was found", expected=" or ".join(names))
    return found


def _fingerprint(compiler: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256("\0".join((_run([compiler, "--version"]), *flags)).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:24]


def _compile(compiler: str, flags: tuple[str, ...], target: Path) -> None:
    descriptor, name = tempfile.mkstemp(suffix=".so", prefix="building-", dir=target.parent)
    os.close(descriptor)
    fresh = Path(name)
    try:
        _run([compiler, *flags, *map(str, sorted(SOURCES.glob("*.cpp"))), "-o", name])
        # In a process of its own: a library that the CPU cannot run kills it.
        _run([sys.executable, *SELF_TEST, name])
        fresh.chmod(0o700)
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    """The standard output of a command that must succeed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"could not be run: {error}", where=Path(command[0]).name) from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        reason = next((line for line in said if "error" in line.lower()), said[-1] if said else "it said nothing")
        raise NativeUnavailable(
            "failed", where=" ".join(command[:3])[:120], found=f"exit code {done.returncode}: {reason[:300]}"
        )
    return done.stdout
