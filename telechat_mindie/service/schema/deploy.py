"""ModelDeployConfig: how long a request may be, and the models that are served.

A bare `:line` is in model_deploy_config.cpp.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, StrictBool, StrictInt, StrictStr, WithJsonSchema
from pydantic_core import PydanticCustomError

from telechat_mindie.service.schema import model
from telechat_mindie.service.schema.base import FORGIVEN, MAX_INPUT_TOKENS, MindieObject, ModelName, ModelPath, UInt32
from telechat_mindie.units import UINT32_MAX

TRUNCATIONS = (False, True, -1, 0, 1)


def _check_truncation(value: Any) -> Any:
    if not isinstance(value, int) or value not in TRUNCATIONS:
        raise PydanticCustomError("choice", "true, false, -1, 0 or 1")
    return value


Truncation = Annotated[
    Any,
    AfterValidator(_check_truncation),
    WithJsonSchema({"enum": list(TRUNCATIONS)}),
    FORGIVEN,
    Field(description="-1 or true: longer prompts are cut at their end; 1: at their begin; 0 or false: refused"),
]  # v3.0.0 param_checker.cpp:215-230, and its service_parameter_configuration.md:116


class LoraModule(MindieObject):
    """One adapter of LoraModules (:271-274, :494-507)."""

    name: ModelName
    path: ModelPath
    baseModelName: StrictStr = Field(description="the modelName of the entry it adapts")


class _Deployment(MindieObject):
    maxSeqLen: StrictInt = Field(ge=1, le=UINT32_MAX, description="tokens of prompt and answer together")  # :460
    maxInputTokenLen: StrictInt = Field(ge=1, le=MAX_INPUT_TOKENS, description="tokens of a prompt")  # :464
    truncation: StrictBool = Field(default=False, description="true: longer prompts are cut; false: refused")  # :401
    maxLoras: UInt32 = 0  # :406
    maxLoraRank: UInt32 = 0  # :413
    # A bad value is replaced by 0 (param_checker.cpp:197-217).
    speculationGamma: Annotated[UInt32, FORGIVEN] = Field(default=0, description="KV slots kept for guessed tokens")
    LoraModules: list[LoraModule] = Field(default=[])  # :345, :357


class ModelDeployConfig(_Deployment):
    """ModelDeployConfig of 2.x and 3.0.0.beta."""

    ModelConfig: list[model.ModelConfig]  # :390


class ModelDeployConfig30(ModelDeployConfig):
    """ModelDeployConfig of 3.0."""

    truncation: Truncation = 0


class ModelDeployConfig10(_Deployment):
    """ModelDeployConfig of 1.0."""

    ModelConfig: list[model.ModelConfig10]
