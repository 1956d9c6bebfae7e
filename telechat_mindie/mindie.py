"""What MindIE is from outside: its generations, the variables that name its home, and the ports that it takes."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from telechat_mindie.errors import InputError

MS, ATB = "ms", "atb"
"""The backendTypes that TeleChat2 is served by: MindSpore, and MindIE's own atb_llm."""

BACKENDS = (MS, ATB)

BACKEND_WORDS = {MS: "ms: MindSpore, by MindIE up to 3.0.0.beta.2", ATB: "atb: MindIE 3.0 and later"}

HOME_VARIABLES = ("MIES_INSTALL_PATH", "MINDIE_LLM_HOME_PATH")
"""What names the folder with bin/ and conf/; the first that is set does.

Up to 2.x two set_env.sh are sourced: that of mindie-service exports MIES_INSTALL_PATH, and that of mindie-llm beside it
MINDIE_LLM_HOME_PATH, a folder without a daemon (mindspore docs r2.6.0 usage/mindie_deployment.md, mindformers r1.5.0
scripts/run_mindie.sh). 3.0.0.beta exports MINDIE_LLM_HOME_PATH alone (MindIE-LLM v3.0.0.beta.2
src/server/scripts/set_env.sh). So where both are set, the first one is the service.
"""

DEFAULT_HOME = "/usr/local/Ascend/mindie/latest/mindie-service"
"""Where MindIE's installer and its public images put the service."""

DAEMON, SERVER = "mindieservice_daemon", "mindie_llm_server"
"""The daemon itself, and the console script of the mindie_llm wheel that sets its paths and becomes it."""

HOME_FOLDERS = ("", "mindie-service", "mindie-llm", "latest", "latest/mindie-service", "latest/mindie-llm")
"""Where the home is, from a folder that somebody names: there, or below."""

WRAPPERS = {MS: "modeling/model_wrapper/ms", ATB: "modeling/model_wrapper/atb"}
MS_WRAPPER = WRAPPERS[MS]
"""The folder of the package mindie_llm that knows backendType ms. A MindIE without it passes backendType ms in its C++
checks, and then its workers end with NotImplementedError (v3.0.0 mindie_llm/modeling/model_wrapper/__init__.py)."""

ATB_VARIABLES = ("ATB_HOME_PATH", "ATB_SPEED_HOME_PATH")
"""What atb's own set_env.sh and that of atb-models export; without them atb_llm finds no libraries (MindIE-LLM v3.0.0
docs/zh/user_guide/user_manual/environment_variable.md, examples/atb_models/atb_llm/utils/initial.py:77)."""

ATB_UNKNOWN = "is not known to load TeleChat2 by its backend atb, since its code is not public"
"""What there is to say of the generations with a closed source."""

SOURCE_ATB = "source /usr/local/Ascend/nnal/atb/set_env.sh and /usr/local/Ascend/atb-models/set_env.sh"
"""Where MindIE's images have them (v3.0.0 docs/zh/user_guide/user_manual/offline_inference.md:43-45)."""

SERVER_PORTS = {"port": 1025, "managementPort": 1026, "metricsPort": 1027}
"""Business, management and metrics port: MindIE-LLM v3.0.0.beta.2 src/server/conf/config.json."""

BACKEND_VARIABLE = "MINDIE_LLM_FRAMEWORK_BACKEND"
"""Tensor backend and plugin manager follow it, samplers and wrappers backendType: the two must agree."""

SCHEDULER_HOST = "127.0.0.1"

RANK_PORTS = {"MS_SCHED_PORT": 8090, "LCAL_IF_PORT": 8129}
"""Ports of the ranks' MindSpore scheduler and of their exchange: MindIE-LLM v3.0.0.beta.2 docs/zh/user_guide/
user_manual/offline_inference.md:292-295, mindspore docs r2.6.0 usage/mindie_deployment.md. MindSpore itself has no
default; that of mindformers r1.5.0 scripts/run_mindie.sh, 8119, holds for whoever starts MindIE by that script."""


@dataclass(frozen=True, slots=True)
class Generation:
    """Releases of MindIE that read the same conf/config.json.

    Attributes:
        pattern: a regular expression for the versions that it stands for, tried oldest generation first.
        releases: the same in words.
        shipped: the generation whose shipped file is rendered over. The files of 2.1 and 2.2 are not known: they take
            that of 2.3, since a release passes over a key that it does not know, and may end on one that it misses.
        known: the generation whose fields it has for certain, where that is not the one of `shipped`.
        is_public: its C++ can be read. Of the others, what no document or public file says is a warning at most.
        ms_backend: its workers know backendType ms.
    """

    pattern: str
    releases: str
    shipped: str
    known: str | None = None
    is_public: bool = False
    ms_backend: bool = True


GENERATIONS: dict[str, Generation] = {
    "1.0": Generation(r"1\.0", "1.0.RC3, 1.0.0", "1.0"),
    "2.0": Generation(r"2\.0", "2.0.RC1, 2.0.RC2", "2.0"),
    "2.1": Generation(r"2\.1", "2.1", "2.3", known="2.0"),
    "2.2": Generation(r"2\.2", "2.2", "2.3", known="2.0"),
    "2.3": Generation(r"2\.", "2.3", "2.3"),
    "3.0.0.beta": Generation(
        r"3\.0\.0[.-]?b(eta)?[.-]?[12]$", "3.0.0.beta.1, 3.0.0.beta.2", "3.0.0.beta", is_public=True
    ),
    "3.0": Generation(r"([3-9]|[1-9]\d+)\.", "3.0.0.beta.3, 3.0.0 and later", "3.0", is_public=True, ms_backend=False),
}
"""By the name that `--mindie` takes, oldest first."""

GENERATION_NAMES = ", ".join(list(GENERATIONS)[:-1]) + f" or {list(GENERATIONS)[-1]}"


def generation_named(name: str) -> Generation:
    """The generation of a name.

    Raises:
        InputError: there is none.
    """
    try:
        return GENERATIONS[name]
    except KeyError:
        raise InputError(
            "is not a generation of MindIE that is known here",
            where=name,
            expected=GENERATION_NAMES,
            advice="Take the one nearest to the installed MindIE.",
        ) from None


def backend_named(name: str) -> str:
    """One of BACKENDS. Raises InputError for another name."""
    if name not in BACKENDS:
        raise InputError("unknown choice", where="--backend", expected=" or ".join(BACKENDS), found=name)
    return name


def generation_of(version: str | None) -> str | None:
    """The name of the generation that an installed version belongs to; None for one that is not known."""
    matching = (name for name, row in GENERATIONS.items() if version and re.match(row.pattern, version, re.IGNORECASE))
    return next(matching, None)


def is_since(generation: str, first: str) -> bool:
    """Whether a generation is `first` or a later one."""
    names = list(GENERATIONS)
    return names.index(generation) >= names.index(first)


def exported_homes(environment: Mapping[str, str]) -> list[Path]:
    """MindIE's home as its set_env.sh exports it, the likeliest first; none in a shell without it."""
    return [Path(environment[name]) for name in HOME_VARIABLES if environment.get(name)]


def find_home(environment: Mapping[str, str], named: Path | None = None, root: Path = Path("/")) -> Path | None:
    """MindIE's home: the first folder with the daemon in its bin/.

    Args:
        environment: of whoever starts MindIE. Where it exports no home with a daemon, the usual place is looked at.
        named: the only folder to look at: the home, or one above.
        root: stands for `/`.
    """
    for start in [named] if named else [*exported_homes(environment), Path(DEFAULT_HOME).parent]:
        for below in HOME_FOLDERS:
            home = Path(root, str(start.absolute()).lstrip("/"), below)
            if shutil.which(str(home / "bin" / DAEMON)):
                return home
    return None


def certificate_home(environment: Mapping[str, str], named: Path | None) -> Path | None:
    """The folder that the TLS files of a config are relative to: MindIE's home, else what is named or exported."""
    return find_home(environment, named) or named or next(iter(exported_homes(environment)), None)


def rank_environment(ports: Mapping[str, int] = RANK_PORTS) -> dict[str, str]:
    """What the workers of a daemon with backendType ms must find in their environment."""
    return {
        BACKEND_VARIABLE: "MS",
        "MS_SCHED_HOST": SCHEDULER_HOST,
        **{name: str(ports[name]) for name in RANK_PORTS},
    }


def recorded_version(home: Path) -> str | None:
    """The version that MindIE's installer wrote into its home, or beside it."""
    for folder in (home, home.parent):
        with contextlib.suppress(OSError):
            if version := version_in((folder / "version.info").read_text(encoding="utf-8", errors="replace")):
                return version
    return None


def version_in(text: str) -> str | None:
    """The version in a version.info that MindIE's installer leaves (MindIE-LLM v3.0.0.beta.2
    scripts/build_version_info.sh): `Ascend-mindie : MindIE 1.0.0`, `Version=2.0.RC1`, `MindIE-LLM Version : 3.0.0`."""
    match = re.search(r"(?im)^\s*(?:(?:Ascend-)?mindie\S*|version)[^:=\n]*[:=]\s*(?:mindie\s+)?(\d\S*)", text)
    return match[1] if match else None
