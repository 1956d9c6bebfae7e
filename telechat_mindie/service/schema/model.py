"""A ModelConfig entry: which model, on how many cards, with how much KV memory.

A bare `:line` is in model_deploy_config.cpp.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StrictBool, StrictInt, StrictStr
from pydantic_core import PydanticCustomError

from telechat_mindie.service.schema.base import FORGIVEN, MindieObject, ModelName, ModelPath, UInt32
from telechat_mindie.units import INT32_MAX

MAX_WORLD_SIZE = 1048576  # mindie_llm/text_generator/adapter/generator_backend.py:25, 65

_TRUST = "lets the worker import code from the model directory"


def _check_npu_memory(value: int) -> int:
    if value != -1 and not 0 < value <= INT32_MAX:
        raise PydanticCustomError("range", f"-1, or 1 to {INT32_MAX} GB")
    return value


NpuMemory = Annotated[StrictInt, AfterValidator(_check_npu_memory)]  # :476-482


class _WorkerKeys(MindieObject):
    """Keys of a ModelConfig entry that MindIE hands to the worker process as strings (:198-217).

    Strings go as they are; numbers and booleans are cast to int32 first, so that 0.7 arrives as "0"; of other JSON
    values only plugin_params and models arrive. Names are those that the workers look up (mindie_llm/utils/
    validation.py:90-113, mindie_llm/text_generator/adapter/generator_backend.py:41-88).
    """

    plugin_params: Any = Field(default="", description='a JSON object or its text: {"plugin_type": "prefix_cache"}')
    models: Any = Field(default=None, description="settings of single model families, ATB only")

    dp: Any = None
    sp: Any = None
    cp: Any = None
    tp: Any = None
    pp: Any = None
    moe_tp: Any = None
    moe_ep: Any = None

    load_tokenizer: Any = None
    max_position_embeddings: Any = None
    max_sequence_length: Any = None
    bos_token_id: Any = None
    eos_token_id: Any = None
    pad_token_id: Any = None
    temperature: Any = None
    top_k: Any = None
    top_p: Any = None
    typical_p: Any = None
    do_sample: Any = None
    seed: Any = None
    repetition_penalty: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    watermark: Any = None
    length_penalty: Any = None
    num_speculative_tokens: Any = None
    num_threads: Any = None
    tokenizer_sliding_window_size: Any = None
    ignore_eos: Any = None
    async_inference: Any = None
    enable_warmup_with_sampling: Any = None
    num_lccl_comm_shards: Any = None
    lccl_comm_shard_id: Any = None
    soc_version: Any = None
    kv_trans_timeout: Any = Field(default=10, description="seconds; prefill and decode apart only")  # doc:131
    kv_link_timeout: Any = Field(default=1080, description="seconds; prefill and decode apart only")  # doc:132
    # doc:130; the C++ hands it on unchecked, and a worker reads it under asynchronous scheduling only.
    async_scheduler_wait_time: Annotated[StrictInt, FORGIVEN] = Field(default=120, ge=1, le=3600, description="seconds")


class _Model(_WorkerKeys):
    """One ModelConfig entry, as far as the generations agree (:40-43)."""

    modelInstanceType: Literal["Standard", "StandardMock", "TargetModel", "AssistantModel"] = Field(
        default="Standard", description="StandardMock: a server without a model"
    )  # :45, :222-231
    modelName: ModelName = Field(description="the name that requests use")  # :458
    modelWeightPath: ModelPath = Field(description="the model directory; MindIE reads its config.json")  # :57, :483
    worldSize: StrictInt = Field(ge=1, le=MAX_WORLD_SIZE, description="cards of one instance")  # :468
    cpuMemSize: UInt32 = Field(description="GB of host memory for swapped KV blocks")  # config_manager_impl.cpp:351
    npuMemSize: NpuMemory = Field(description="GB of KV cache a card; -1: what is left")  # :476
    backendType: Literal["atb", "ms", "torch"] = Field(description="ms: MindSpore")  # :472
    pluginParams: StrictStr = Field(default="", description="read by nothing: plugin_params is the name")  # :43


class ModelConfig(_Model):
    """One ModelConfig entry of 2.x and 3.0.0.beta."""

    trustRemoteCode: StrictBool = Field(description=_TRUST)  # :43


class ModelConfig10(_Model):
    """One ModelConfig entry of 1.0, whose files have no trustRemoteCode yet (sources: server.ServerConfig10)."""

    trustRemoteCode: StrictBool = Field(default=False, description=_TRUST)
