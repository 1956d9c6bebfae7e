"""The host side of MindSpore's internal Ascend kernels, run on a CPU.

The wheel carries the kernels (`ms_kernels_internal`) with their headers. What they do before a launch, their tables of
dtypes, Init, UpdateShape and Tiling, needs no NPU: `tests/ascend_host/host_kernels.cpp` calls it, linked against those
libraries, with CANN's own stood in for by `cann_stand_in.c` and by functions that return 0. A call that passes was
accepted by the kernel's own code; nothing is said of the numbers that a device would compute.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "ascend_host"
SOC = "Ascend910B2"
SYSTEM = ("libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libgcc_s.so.1", "libstdc++.so.6")


class Unavailable(Exception):
    """What is missing here, as a reason to skip."""


@dataclass(frozen=True)
class HostKernels:
    """The built program; `home` stands in for CANN's ASCEND_HOME_PATH."""

    program: Path
    home: Path
    libraries: tuple[Path, ...]

    def outcomes(self, calls: Sequence[str], environment: Mapping[str, str]) -> list[str]:
        """For each call "ok" or "ok on asdops", or the step that refused it and the kernel's own reason; "ended" where
        the library ends the process.

        Args:
            calls: lines as host_kernels.cpp reads them.
            environment: of the process, beside what finds the libraries; ASCEND_HOME_PATH where it is to be found.
        """
        libraries = os.pathsep.join(map(str, self.libraries))
        found = subprocess.run(
            [self.program],
            input="".join(f"{call}\n" for call in calls),
            env={"LD_LIBRARY_PATH": libraries, "PATH": os.defpath, **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        lines = found.stdout.splitlines()
        # The kernels log to standard output, before the answer that the message belongs to.
        outcomes: list[str] = []
        messages: list[str] = []
        for line in lines:
            if line.startswith("= "):
                reasons = [] if line.startswith("= ok") else messages[-1:]
                outcomes.append(" ".join([line[2:], *reasons]))
                messages = []
            elif line:
                messages.append(line.rpartition("] ")[2])
        return outcomes + [" ".join(["ended", *messages[-1:]])] * (len(calls) - len(outcomes))


def build(folder: Path) -> HostKernels:
    """Compile and link into `folder`; takes a few seconds.

    Raises:
        Unavailable: no C++ compiler, or a wheel without the kernels' headers.
    """
    compiler, nm, objdump = (shutil.which(tool) for tool in ("g++", "nm", "objdump"))
    if not (compiler and nm and objdump):
        raise Unavailable("building against the kernels' libraries wants g++, nm and objdump")
    spec = importlib.util.find_spec("mindspore")
    root = Path(spec.submodule_search_locations[0]) / "lib/plugin/ascend/ms_kernels_internal"
    kernel, folders = root / "internal_kernel", (root / "internal_kernel/lib", root / "asdops/lib")
    if not (kernel / "include/internal.h").exists():
        raise Unavailable("this MindSpore wheel carries no headers of the internal Ascend kernels")
    libraries = [path for lib in folders for path in sorted(lib.glob("*.so"))]

    stand_ins = folder / "lib"
    stand_ins.mkdir(parents=True)
    undefined = folder / "undefined.c"
    # Weak, so that cann_stand_in.c's own come first.
    undefined.write_text(
        "".join(
            f"__attribute__((weak)) long f{index}(void) __asm__({name!r}); long f{index}(void) {{ return 0; }}\n"
            for index, name in enumerate(sorted(_undefined(nm, libraries)))
        ).replace("'", '"')
    )
    shared = stand_ins / "libcann_stand_in.so"
    _run("gcc", "-w", "-O1", "-shared", "-fPIC", SOURCES / "cann_stand_in.c", undefined, "-o", shared)
    own = {library.name for library in libraries}
    for library in _needed(objdump, libraries) - own:
        (stand_ins / library).symlink_to(shared)

    home = folder / "home"
    for platform in ("runtime", "x86_64-linux", "aarch64-linux"):
        config = home / platform / "data/platform_config"
        config.mkdir(parents=True)
        shutil.copy(SOURCES / f"{SOC}.ini", config)
    (home / "lib64").mkdir()
    for library in ("libruntime.so", "libascendcl.so"):
        (home / "lib64" / library).symlink_to(shared)

    program = folder / "host_kernels"
    _run(
        *(compiler, "-std=c++17", "-O1", "-w", "-D_GLIBCXX_USE_CXX11_ABI=0", f"-I{kernel}", f"-I{kernel / 'include'}"),
        *(SOURCES / "host_kernels.cpp", "-o", program, kernel / "lib/libms_kernels_internal.so", shared),
        "-Wl,--unresolved-symbols=ignore-in-shared-libs",
    )
    return HostKernels(program, home, (stand_ins, *folders))


def _undefined(nm: str, libraries: Sequence[Path]) -> set[str]:
    """Names that neither these libraries nor the system's have: CANN's."""
    wanted: set[str] = set()
    given: set[str] = set()
    for line in _run(nm, "-D", *libraries).splitlines():
        *_, kind, name = ["", "", *line.split()]
        if kind == "U":
            wanted.add(name)
        else:
            given.add(name.partition("@")[0])
    system = [ctypes.CDLL(name) for name in SYSTEM]
    # A name with a version ("memcpy@GLIBC_2.14") is the system's in any case.
    return {name for name in wanted - given if "@" not in name and not any(hasattr(lib, name) for lib in system)}


def _needed(objdump: str, libraries: Sequence[Path]) -> set[str]:
    """The libraries that these ask the loader for, the system's left out."""
    headers = (line.split() for line in _run(objdump, "-p", *libraries).splitlines())
    names = {words[1] for words in headers if words[:1] == ["NEEDED"]}
    return {name for name in names if name not in SYSTEM and not name.startswith("ld-linux")}


def _run(*command: object) -> str:
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout
