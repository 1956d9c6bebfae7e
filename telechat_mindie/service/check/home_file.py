"""What the daemon reads of its home's own conf/config.json, whatever file it was started with: `READ_FROM_HOME`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from telechat_mindie.errors import ConfigError
from telechat_mindie.findings import Finding, error, warning
from telechat_mindie.mindie import GENERATIONS
from telechat_mindie.service import schema
from telechat_mindie.service.check.options import CheckOptions
from telechat_mindie.service.schema.settings import READ_FROM_HOME
from telechat_mindie.service.schema.violations import json_path, value_at

CONFIG = Path("conf/config.json")


def check_home_file(config: Mapping[str, Any], where: Path, options: CheckOptions) -> Iterator[Finding]:
    """Settings of a config that have no effect, since another file is read for them, and the fault of that file that
    ends the daemon. Of closed generations neither is known."""
    if options.home is None or not GENERATIONS[options.generation].is_public:
        return
    own = options.home / CONFIG
    if os.path.realpath(own) == os.path.realpath(where):
        return
    shipped = schema.default_config(options.generation)
    for location in READ_FROM_HOME:
        value = value_at(config, location)
        if value is not None and value != value_at(shipped, location):
            yield warning(
                "other-file",
                f"{where}: {json_path(location)}",
                f"has no effect: MindIE reads it from {own} alone",
                "Set it there, also while the daemon runs. MINDIE_LOG_LEVEL sets a level for the whole run.",
            )
    try:
        log = value_at(schema.load(own), ("LogConfig",))
    except ConfigError:
        return  # MindIE passes over a file that it cannot read
    keys = shipped["LogConfig"].keys()
    if isinstance(log, dict) and (missing := sorted(keys - log.keys())):
        yield error(
            "home-log-config",
            f"{own}: {json_path(('LogConfig',))}",
            f"lacks {', '.join(missing)}, and MindIE aborts on that, whatever file it is started with",
            "Add what is missing, or remove LogConfig: the daemon then writes its own.",
        )
