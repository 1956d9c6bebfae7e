"""What MindIE calls things from outside: the variables that name its home, and the ports that it takes by default."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

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

MS_WRAPPER = "modeling/model_wrapper/ms"
"""The folder of the package mindie_llm that knows backendType ms. A MindIE without it passes backendType ms in its C++
checks and then falls back to another backend without a word."""

SERVER_PORTS = {"port": 1025, "managementPort": 1026, "metricsPort": 1027}
"""Business, management and metrics port: MindIE-LLM v3.0.0.beta.2 src/server/conf/config.json."""

SCHEDULER_HOST = "127.0.0.1"

RANK_PORTS = {"MS_SCHED_PORT": 8090, "LCAL_IF_PORT": 8129}
"""Ports of the ranks' MindSpore scheduler and of their exchange: MindIE-LLM v3.0.0.beta.2 docs/zh/user_guide/
user_manual/offline_inference.md:292-295, mindspore docs r2.6.0 usage/mindie_deployment.md. MindSpore itself has no
default; that of mindformers r1.5.0 scripts/run_mindie.sh, 8119, holds for whoever starts MindIE by that script."""


def exported_home(environment: Mapping[str, str]) -> Path | None:
    """MindIE's home as its set_env.sh exports it; None in a shell without it."""
    return next((Path(environment[name]) for name in HOME_VARIABLES if environment.get(name)), None)


def version_in(text: str) -> str | None:
    """The version in a version.info that MindIE's installer leaves (MindIE-LLM v3.0.0.beta.2
    scripts/build_version_info.sh): `Ascend-mindie : MindIE 1.0.0`, `Version=2.0.RC1`, `MindIE-LLM Version : 3.0.0`."""
    match = re.search(r"(?im)^\s*(?:(?:Ascend-)?mindie\S*|version)[^:=\n]*[:=]\s*(?:mindie\s+)?(\d\S*)", text)
    return match[1] if match else None
