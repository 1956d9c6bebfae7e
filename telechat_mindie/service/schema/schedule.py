"""ScheduleConfig: how requests are batched, and the size of a KV block.

A bare `:line` is in schedule_config.cpp; every field without a default is compulsory there (:23-52).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StrictBool, StrictInt
from pydantic_core import PydanticCustomError

from telechat_mindie.service.schema.base import MAX_INPUT_TOKENS, MindieObject, Policy, UInt32
from telechat_mindie.units import UINT32_MAX


def _check_mix_policy(value: int) -> int:
    if value not in (0, 4, 5, 6, 7):
        raise PydanticCustomError("choice", "0, 4, 5, 6 or 7")
    return value


MixPolicy = Annotated[
    StrictInt,
    AfterValidator(_check_mix_policy),
    Field(description="with Mix: 0 FCFS, 4 SJF, 5 LJF, 6 Skip-Join MLFQ, 7 SJF-MLFQ"),
]  # param_checker.cpp:366-373
ExpectedTime = Annotated[StrictInt, Field(ge=1, le=10_000, description="ms, with stageSelectPolicy 2")]
SelectTime = Annotated[StrictInt, Field(ge=0, le=1000, description="ms; with supportSelectBatch")]


class LayerwiseSchedule(MindieObject):
    """ScheduleConfig.layerwiseDisaggregated (:54)."""

    nextPHeadPrior: StrictBool = False


class ScheduleConfig10(MindieObject):
    """ScheduleConfig of 1.0, which the later generations extend."""

    templateType: Literal["Standard", "Mix"] = Field(description="Mix: SplitFuse, prefill and decode together")  # :287
    templateName: Literal["Standard_LLM"]  # :291
    cacheBlockSize: StrictInt = Field(ge=1, le=128, description="tokens of a KV block; a multiple of 16")  # :253

    maxPrefillBatchSize: UInt32 = Field(description="requests of a prefill batch; 0: maxBatchSize")  # :80, :268
    maxPrefillTokens: StrictInt = Field(ge=1, le=MAX_INPUT_TOKENS, description="tokens of a prefill batch")  # :266
    prefillTimeMsPerReq: SelectTime  # :278
    prefillPolicyType: Policy  # :275

    decodeTimeMsPerReq: SelectTime  # :257
    decodePolicyType: Policy  # :255

    maxBatchSize: StrictInt = Field(ge=1, le=5000, description="requests of a decode batch")  # :259
    # config_manager_impl.cpp:347 refuses only 0; doc:152 asks for at most maxSeqLen, which a rule warns about.
    maxIterTimes: StrictInt = Field(ge=1, le=UINT32_MAX, description="new tokens that an answer may have")
    maxPreemptCount: UInt32 = Field(description="requests preempted at once; above 0 needs cpuMemSize")  # :261
    supportSelectBatch: StrictBool = Field(description="weigh prefill against decode in each round")  # :86
    maxQueueDelayMicroseconds: StrictInt = Field(ge=500, le=1_000_000, description="us that a batch may wait")  # :271

    policyType: MixPolicy = 0  # :277
    enableSplit: StrictBool = False  # :142
    splitType: StrictBool = False  # :148
    splitStartType: StrictBool = False  # :152
    splitChunkTokens: UInt32 = Field(default=512, description="tokens of a chunk with SplitFuse")  # :156
    splitStartBatchSize: UInt32 = 16  # :160
    enablePrefixCache: StrictBool = False  # :186


class ScheduleConfig(ScheduleConfig10):
    """ScheduleConfig of 2.x and 3.0.0.beta."""

    maxFirstTokenWaitTime: StrictInt = Field(default=2500, ge=0, le=3_600_000, description="ms in the queue")  # :273
    # :232
    stageSelectPolicy: StrictInt = Field(default=0, ge=0, le=2, description="0 prefill first, 1 throughput, 2 latency")
    dynamicBatchSizeEnable: StrictBool = False  # :217
    prefillExpectedTime: ExpectedTime = 1500  # :237
    decodeExpectedTime: ExpectedTime = 50  # :242
    bufferResponseEnabled: StrictBool = False  # :195
    distributedEnable: StrictBool = False  # :204
    enablChunkedPrefill: StrictBool = False  # :41, MindIE's spelling; nothing reads it

    prefillChunkSize: UInt32 = Field(default=0, description="tokens; 0: cut by load")  # :167
    maxNumPartialPrefills: StrictInt = Field(default=64, ge=1, le=64)  # :280
    maxLongPartialPrefills: StrictInt = Field(default=8, ge=1, le=64)  # :282, at most maxNumPartialPrefills
    longPrefillTokenThreshold: StrictInt = Field(default=1024, ge=1, le=8192, description="tokens")  # :285

    layerwiseDisaggregated: LayerwiseSchedule = LayerwiseSchedule()  # :93-108


class ScheduleConfig30(ScheduleConfig):
    """ScheduleConfig of 3.0 (v3.0.0 src/config_manager/schedule_config.cpp)."""

    maxBatchSize: StrictInt = Field(ge=1, le=819_200, description="requests of a decode batch")
    maxN: StrictInt = Field(
        default=128, ge=1, le=8192, description="answers of a request; absent: at most maxBatchSize"
    )
