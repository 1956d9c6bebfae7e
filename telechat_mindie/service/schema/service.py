"""The whole file: the top object of each generation, and the table of generations."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool

from telechat_mindie.mindie import generation_named
from telechat_mindie.service.schema import backend, log, server
from telechat_mindie.service.schema.base import FORGIVEN, MindieObject


class ServiceConfig(MindieObject):
    """conf/config.json of 3.0.0.beta."""

    Version: Annotated[Literal["1.0.0"], FORGIVEN] = "1.0.0"  # doc:12; no code reads it
    ServerConfig: server.ServerConfig
    BackendConfig: backend.BackendConfig
    LogConfig: log.LogConfig = Field(
        default=log.LogConfig(dynamicLogLevel="", dynamicLogLevelValidHours=2, dynamicLogLevelValidTime=""),
        description="absent: the daemon adds it to the file",  # log_level_dynamic_handler.cpp:400-427
    )
    # src/server/endpoint/endpoint.cpp:70-87; anything but a boolean counts as false.
    EnableDynamicAdjustTimeoutConfig: Annotated[StrictBool, FORGIVEN] = Field(
        default=False, description="true: tokenTimeout and e2eTimeout rise to their maxima while the daemon runs"
    )


class ServiceConfig30(ServiceConfig):
    """conf/config.json of 3.0."""

    ServerConfig: server.ServerConfig30
    BackendConfig: backend.BackendConfig30


class ServiceConfig20(MindieObject):
    """conf/config.json of 2.x."""

    Version: Annotated[Literal["1.0.0"], FORGIVEN] = "1.0.0"
    ServerConfig: server.ServerConfig20
    BackendConfig: backend.BackendConfig20
    LogConfig: log.LogConfig20 = log.LogConfig20()
    EnableDynamicAdjustTimeoutConfig: Annotated[StrictBool, FORGIVEN] = False


class ServiceConfig10(MindieObject):
    """conf/config.json of 1.0."""

    Version: Annotated[Literal["1.0.0"], FORGIVEN] = "1.0.0"
    LogConfig: log.LogConfig10 = log.LogConfig10()
    ServerConfig: server.ServerConfig10
    BackendConfig: backend.BackendConfig10


MODELS: dict[str, type[MindieObject]] = {
    "1.0": ServiceConfig10,
    **dict.fromkeys(("2.0", "2.1", "2.2", "2.3"), ServiceConfig20),
    "3.0.0.beta": ServiceConfig,
    "3.0": ServiceConfig30,
}
"""The top object of each of `GENERATIONS`."""


def model_of(generation: str) -> type[MindieObject]:
    """The top object of a generation.

    Raises:
        InputError: the generation is not one of GENERATIONS.
    """
    generation_named(generation)
    return MODELS[generation]
