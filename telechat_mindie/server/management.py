"""The management plane: health, status and stopping (http_wrapper/http_handler.cpp:506-1290)."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from telechat_mindie import __version__
from telechat_mindie.engine.output import FinishReason
from telechat_mindie.engine.params import GenerationParams
from telechat_mindie.errors import TelechatMindieError
from telechat_mindie.server.http.errors import STOPPED, ApiError, json_response
from telechat_mindie.server.metrics import CONTENT_TYPE
from telechat_mindie.server.service import Service

DEFAULT_PROBE_SECONDS, MAX_PROBE_SECONDS = 10, 600  # endpoint_def.h: SIMULATE_CV_WAIT_TIME, CV_WAIT_TIME


def management_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["management"])

    async def check_alive() -> None:
        service.refuse_if_stopping()
        if not service.engine.is_running:
            raise ApiError(500, "Service is abnormal: the engine ended.")

    alive = [Depends(check_alive)]

    @router.get("/health", dependencies=alive)
    async def health() -> Response:
        return Response()

    @router.get("/v2/health/live", dependencies=alive)
    async def live() -> Response:
        return json_response({"message": "Service is alive but busy"}) if _is_busy(service) else Response()

    @router.get("/v2/health/ready", dependencies=alive)
    async def ready() -> Response:
        message = {"message": "Service is alive but busy. Send fewer requests."}
        return json_response(message, 503) if _is_busy(service) else Response()

    @router.get("/v2/models/{model}/ready", dependencies=alive)
    async def model_ready(model: str) -> Response:
        service.check_model(model)
        return Response()

    @router.get("/health/timed")
    async def timed() -> Response:
        return await _probe(service, DEFAULT_PROBE_SECONDS)

    @router.get("/health/timed-{seconds}")
    async def timed_by(seconds: str) -> Response:
        number = int(seconds) if re.fullmatch(r"[0-9]{1,3}", seconds) else 0
        if not 1 <= number <= MAX_PROBE_SECONDS:
            raise ApiError(404, f"The time must be 1 to {MAX_PROBE_SECONDS} seconds.")
        return await _probe(service, number)

    @router.get("/info", dependencies=alive)
    async def get_info() -> dict[str, Any]:
        settings, engine = service.settings, service.engine.config
        model = {
            "model_device_type": "cpu",
            "model_dtype": service.defaults.dtype,
            "model_id": settings.model_name,
            "model_pipeline_tag": "text-generation",
            "model_sha": None,
            "max_total_tokens": engine.max_seq_len,
        }
        return {  # in TGI's form
            "docker_label": None,
            "max_batch_total_tokens": engine.max_prefill_tokens,
            "max_best_of": 1,
            "max_concurrent_requests": engine.max_batch_size,
            "max_stop_sequences": None,
            "max_waiting_tokens": None,
            "sha": None,
            "validation_workers": None,
            "version": __version__,
            "waiting_served_ratio": None,
            "models": [model],
            "max_input_length": engine.max_input_token_len,
        }

    @router.get("/v1/config")
    async def config() -> dict[str, Any]:
        engine, settings = service.engine.config, service.settings
        return {
            "modelName": settings.model_name,
            "maxSeqLen": engine.max_seq_len,
            "npuMemSize": settings.npu_mem_size,
            "cpuMemSize": settings.host_cache_gb,
            "worldSize": service.host.directory.tp,
            "maxOutputLen": engine.max_iter_times,
            "cacheBlockSize": engine.block_size,
        }

    @router.get("/v1/status", dependencies=alive)
    async def status() -> dict[str, Any]:
        return _status(_resources(service))

    @router.get("/v2/status", dependencies=alive)
    async def status_v2() -> dict[str, Any]:
        resources = _resources(service)
        blocks = resources["availBlockNum"]
        more = {
            "totalAvailNpuSlotsNum": resources["availSlotsNum"],
            "totalAvailNpuBlockNum": blocks,
            "dpInstMap": [[0, blocks]],
            "maxAvailNpuBlockNum": blocks,
        }
        return _status(resources | more)

    @router.get("/v2/models/{model}/getSlotCount", dependencies=alive)
    async def slot_count(model: str) -> dict[str, Any]:
        service.check_model(model)
        resources, engine = _resources(service), service.engine.config
        return {
            "total_slots": engine.max_batch_size,
            "free_slots": resources["availSlotsNum"],
            "available_tokens_length": resources["availBlockNum"] * engine.block_size,
        }

    @router.get("/metrics-json", dependencies=alive)
    async def metrics_json() -> dict[str, Any]:
        return _metrics_json(service)

    @router.get("/v1/engine-server/running-status")
    async def running_status() -> dict[str, Any]:
        # health_checker/health_checker.h: 1 is normal, 2 abnormal, 5 busy.
        return {"status": 2 if not service.engine.is_running else 5 if _is_busy(service) else 1, "errors": []}

    @router.get("/stopService")
    async def stop_service(request: Request) -> Response:
        if service.is_stopping:
            raise ApiError(500, STOPPED)
        service.is_stopping = True
        if request.query_params.get("mode") == "Force":
            service.is_forced = True
        else:
            while service.in_flight:
                await asyncio.sleep(0.05)
        service.stop_wanted.set()
        return Response()

    return router


def metrics_routes(service: Service) -> APIRouter:
    """Of the metrics plane."""
    router = APIRouter(tags=["metrics"])

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    return router


def _is_busy(service: Service) -> bool:
    """Whether a further request would have to wait."""
    stats = service.engine.stats()
    return stats.waiting > 0 or stats.running >= service.engine.config.max_batch_size


async def _probe(service: Service, seconds: int) -> Response:
    """Compute one token within the time. A server that is busy computes anyway, and counts as healthy."""
    if service.is_stopping:
        return json_response({"status": "healthy"})
    try:
        params = GenerationParams(max_new_tokens=1, priority=1, timeout=seconds)
        stream = service.engine.add_async([service.tokenizer.bos_token_id], params)
    except TelechatMindieError as error:
        raise ApiError(500, f"Service is abnormal: {error}") from None
    async for output in stream:
        if output.finish_reason in (FinishReason.ERROR, FinishReason.DEADLINE, FinishReason.CANCELLED):
            raise ApiError(500, f"Service is abnormal: {output.error or f'no token within {seconds} seconds'}")
    return json_response({"status": "healthy"})


def _resources(service: Service) -> dict[str, Any]:
    stats, engine = service.engine.stats(), service.engine.config
    free = stats.blocks_total - stats.blocks_used
    return {
        "availSlotsNum": max(0, engine.max_batch_size - stats.running - stats.waiting - stats.swapped),
        "availBlockNum": free,
        "waitingRequestNum": stats.waiting,
        "runningRequestNum": stats.running,
        "swappedRequestNum": stats.swapped,
        "freeNpuBlockNums": free,
        "freeCpuBlockNums": stats.host_blocks_total - stats.host_blocks_used,
        "totalNpuBlockNums": stats.blocks_total,
        "totalCpuBlockNums": stats.host_blocks_total,
    }


def _status(resources: dict[str, Any]) -> dict[str, Any]:
    role = {"roleStatus": "RoleReady", "currentRole": "none"}
    return {"service": role, "resource": resources, "linkStatus": {"peers": []}}


def _metrics_json(service: Service) -> dict[str, Any]:
    """Averages in milliseconds over the last requests, and counts, all as text."""
    metrics, resources = service.metrics, _resources(service)
    where = service.settings.management

    def average(values: Any) -> int:
        return int(1000 * sum(values) / len(values)) if values else 0

    values = {
        "TTFT": average(metrics.recent_first_tokens),
        "TBT": average(metrics.recent_token_times),
        "waitingInferRequestNum": resources["waitingRequestNum"],
        "processingInferRequestNum": resources["runningRequestNum"] + resources["swappedRequestNum"],
        "remainBlocks": resources["availBlockNum"],
    }
    labels = {"job": "node", "instance": f"{where.host}:{where.port}"}
    result = [{"metric": [{"__name__": name, **labels}], "value": str(value)} for name, value in values.items()]
    return {"resultType": "vector", "result": result}
