"""LogConfig, which changed its meaning between the generations."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StrictInt, StrictStr
from pydantic_core import PydanticCustomError

from telechat_mindie.service.schema.base import FORGIVEN, MindieObject


def _check_level(value: str) -> str:
    if value.lower() not in ("", "critical", "error", "warn", "info", "debug"):  # doc:163
        raise PydanticCustomError("choice", "critical, error, warn, info or debug, or empty")
    return value


Level = Annotated[StrictStr, AfterValidator(_check_level), FORGIVEN]
Hours = Annotated[StrictInt, Field(ge=1, le=168, description="hours"), FORGIVEN]
Since = Annotated[
    StrictStr,
    Field(pattern=r"^(\d{4}-\d{2}-\d{2} \d{2}:\d{2}:\d{2})?$", description="since when; the daemon fills it in"),
    FORGIVEN,
]


class LogConfig(MindieObject):
    """LogConfig of 3.0.0.beta: a level for some hours, changed while the daemon runs.

    Other levels come from the environment (MINDIE_LOG_*). A bad value is rewritten in the file by the daemon
    (src/utils/log/log_level_dynamic_handler.cpp:263-296); a missing key is read all the same, through a const
    reference, which nlohmann::json leaves undefined (:217-235).
    """

    dynamicLogLevel: Level
    dynamicLogLevelValidHours: Hours
    dynamicLogLevelValidTime: Since


class LogConfig10(MindieObject):
    """LogConfig of 1.0: level and files of the server's log.

    Levels as gpustack/gpustack offers them (gpustack/worker/backends/ascend_mindie.py); ranges as the parameter
    reference of MindIE 1.0 gives them, quoted in CSDN article 146423199.
    """

    logLevel: Literal["Verbose", "Debug", "Info", "Warning", "Warn", "Error"] = "Info"
    logFileSize: StrictInt = Field(default=20, ge=0, le=500, description="MB")
    logFileNum: StrictInt = Field(default=20, ge=0, le=64)
    logPath: StrictStr = "logs/mindservice.log"


class LogConfig20(LogConfig10):
    """LogConfig of 2.x: absent from 2.0, and in later releases the three keys of 3.0.0.beta."""

    dynamicLogLevel: Level = ""
    dynamicLogLevelValidHours: Hours = 2
    dynamicLogLevelValidTime: Since = ""
