"""The scalar types of conf/config.json, and the base of the models of its objects.

In the comments of this package a bare `file.cpp:line` is under src/config_manager of the public MindIE-LLM repository
at v3.0.0.beta.2, another path is from that repository's root, and `doc:line` is its
docs/zh/user_guide/user_manual/service_parameter_configuration.md.

Numbers are strict because MindIE is: a JSON string, a boolean or a float where an integer belongs is refused
(param_checker.cpp:290-317).
"""

from __future__ import annotations

import ipaddress
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, StrictStr
from pydantic_core import PydanticCustomError

from telechat_mindie.model_dir.modes import path_fault
from telechat_mindie.service.ports import HIGHEST, LOWEST
from telechat_mindie.units import INT32_MAX, UINT32_MAX

MAX_INPUT_TOKENS = 4 * 1024 * 1024  # schedule_config.cpp:22, model_deploy_config.cpp:31


class MindieObject(BaseModel):
    """One JSON object. Field names are MindIE's own.

    MindIE ignores keys that it does not know. Here they are forbidden, so that pydantic lists them and an editor with
    the JSON Schema underlines them; `validate` reports them as warnings, and nothing removes them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)


class Forgiven:
    """Metadata of a field whose bad value MindIE replaces by its own and starts: a violation is only a warning."""


FORGIVEN = Forgiven()


def is_address(value: str) -> bool:
    """Whether MindIE takes a text for an IP address: src/utils/common_util.cpp:699-765.

    A colon makes it IPv6, where square brackets may enclose it; the rest is left to inet_pton, which knows no scope.
    """
    bare = value[1:-1] if value.startswith("[") and value.endswith("]") and ":" in value else value
    try:
        ipaddress.IPv6Address(bare) if ":" in bare else ipaddress.IPv4Address(bare)
    except ValueError:
        return False
    return "%" not in bare


def _check_address(value: str) -> str:
    if not is_address(value):
        raise PydanticCustomError("ip-address", "an IPv4 or IPv6 address in digits")
    return value


def _check_model_path(value: str) -> str:
    if fault := path_fault(value):
        raise PydanticCustomError("path", fault)
    return value


Address = Annotated[StrictStr, AfterValidator(_check_address)]
ModelPath = Annotated[StrictStr, AfterValidator(_check_model_path)]
Port = Annotated[StrictInt, Field(ge=LOWEST, le=HIGHEST)]
Int32 = Annotated[StrictInt, Field(ge=-INT32_MAX - 1, le=INT32_MAX)]
UInt32 = Annotated[StrictInt, Field(ge=0, le=UINT32_MAX)]
Policy = Annotated[
    StrictInt, Field(ge=0, le=3, description="0 FCFS, 1 STATE, 2 PRIORITY, 3 MLFQ")
]  # param_checker.cpp:356-364
FileNames = Annotated[list[StrictStr], Field(description="1 to 3 file names")]

MODEL_NAME = r"^[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,254}[a-zA-Z0-9])?$"  # model_deploy_config.cpp:438-448
ModelName = Annotated[StrictStr, Field(pattern=MODEL_NAME)]
