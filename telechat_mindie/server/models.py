"""What the server says of its model: OpenAI's /v1/models, Triton's /v2, TGI's /info, MindIE's /v1/config
(single_req_infer_interface/parse_protocol.cpp, http_wrapper/http_handler.cpp:1390-1530), and /v1/tokenizer."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from telechat_mindie import __version__
from telechat_mindie.errors import InputError
from telechat_mindie.server.fields import RequestBody, validate
from telechat_mindie.server.formats.logprobs import TokenTexts
from telechat_mindie.server.http.body import parse
from telechat_mindie.server.http.errors import ApiError, dump, invalid
from telechat_mindie.server.http.openapi import accepts
from telechat_mindie.server.service import Service

OWNER = "MindIE Server"


class TokenizerRequest(RequestBody):
    """POST /v1/tokenizer."""

    inputs: str = Field(min_length=1, examples=["生抽与老抽的区别？"])
    do_decode: bool = Field(default=True, description="false: only count")


def check_model(service: Service, name: str) -> None:
    """Raises:
    ApiError: 404, the model in a path is not the one that is served.
    """
    if name != service.settings.model_name:
        raise ApiError(404, f"Model {name} not found.")


def model_routes(service: Service) -> APIRouter:
    """Of the business plane."""
    router = APIRouter(tags=["models"])
    settings, engine = service.settings, service.engine.config

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        root = service.host.directory.path.resolve().name
        entry = {"id": settings.model_name, "object": "model", "root": root, "owned_by": OWNER, "parent": "null"}
        # `created` is in MindIE's answer for one model only; OpenAI's clients want it here too.
        return {"object": "list", "data": [entry | {"created": service.started}]}

    @router.get("/v1/models/{model}")
    async def model_card(model: str) -> dict[str, Any]:
        check_model(service, model)
        return {"id": model, "object": "model", "created": service.started, "owned_by": OWNER}

    @router.get("/v2")
    async def server_metadata() -> dict[str, Any]:
        extensions = {
            "max_iter_times": engine.max_iter_times,
            "prefill_policy_type": settings.prefill_policy,
            "decode_policy_type": settings.decode_policy,
            "max_prefill_batch_size": engine.max_prefill_batch_size,
            "max_prefill_tokens": engine.max_prefill_tokens,
        }
        return {"name": OWNER, "version": __version__, "extensions": extensions}

    @router.get("/v2/models/{model}")
    async def model_metadata(model: str) -> dict[str, Any]:
        check_model(service, model)
        return {
            "name": model,
            "platform": OWNER,
            "inputs": [{"name": "input0", "shape": [-1], "datatype": "UINT32"}],
            "outputs": [{"name": "output0", "shape": [-1], "datatype": "UINT32"}],
        }

    @router.get("/v2/models/{model}/config")
    async def model_config(model: str) -> dict[str, Any]:
        check_model(service, model)
        return {
            "model_name": model,
            "input_datatype": "UINT32",
            "output_datatype": "UINT32",
            "max_seq_len": engine.max_seq_len,
            "npu_mem_size": settings.npu_mem_size,
            "cpu_mem_size": settings.host_cache_gb,
            "world_size": service.host.directory.tp,
            "model_weight_path": service.host.directory.path.resolve().name,
            "model_instance_type": "Standard",
        }

    @router.post("/v1/tokenizer", openapi_extra=accepts(TokenizerRequest))
    async def tokenizer(request: Request) -> Response:
        raw = await service.bodies.read(request)
        return Response(dump(await service.in_thread(_tokenize, service, raw)), media_type="application/json")

    return router


def info(service: Service) -> dict[str, Any]:
    """GET /info of the management plane, in TGI's form."""
    settings, engine = service.settings, service.engine.config
    model = {
        "model_device_type": "cpu",
        "model_dtype": service.defaults.dtype,
        "model_id": settings.model_name,
        "model_pipeline_tag": "text-generation",
        "model_sha": None,
        "max_total_tokens": engine.max_seq_len,
    }
    return {
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


def _tokenize(service: Service, raw: bytes) -> dict[str, Any]:
    body = validate(TokenizerRequest, parse(raw))
    try:
        ids = service.encode(body.inputs, "inputs").tolist()
    except InputError as error:
        raise invalid(str(error)) from None
    texts = TokenTexts(service.tokenizer)
    pieces = (
        [texts.of(token, ids[max(0, place - 3) : place]) for place, token in enumerate(ids)] if body.do_decode else []
    )
    return {"token_number": len(ids), "tokens": [piece for piece in pieces if piece]}
