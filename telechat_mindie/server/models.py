"""What the business plane says of its model: OpenAI's /v1/models, Triton's /v2 and MindIE's /v1/tokenizer
(single_req_infer_interface/parse_protocol.cpp, http_wrapper/http_handler.cpp:1390-1530)."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BeforeValidator, Field

from telechat_mindie import __version__
from telechat_mindie.errors import InputError
from telechat_mindie.server.fields import RequestBody, validate
from telechat_mindie.server.http.body import parse
from telechat_mindie.server.http.errors import invalid, json_response
from telechat_mindie.server.http.openapi import accepts
from telechat_mindie.server.service import Service

OWNER = "MindIE Server"


class TokenizerRequest(RequestBody):
    """POST /v1/tokenizer."""

    inputs: str = Field(min_length=1, examples=["生抽与老抽的区别？"])
    do_decode: Annotated[bool, BeforeValidator(lambda value: value is not False)] = Field(
        default=True, description="false: only count; MindIE takes all else for true"
    )


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
        service.check_model(model)
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
        service.check_model(model)
        return {
            "name": model,
            "platform": OWNER,
            "inputs": [{"name": "input0", "shape": [-1], "datatype": "UINT32"}],
            "outputs": [{"name": "output0", "shape": [-1], "datatype": "UINT32"}],
        }

    @router.get("/v2/models/{model}/config")
    async def model_config(model: str) -> dict[str, Any]:
        service.check_model(model)
        return {
            "model_name": model,
            "input_datatype": "INT64",
            "output_datatype": "INT64",
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
        return json_response(await service.in_thread(_tokenize, service, raw))

    return router


def _tokenize(service: Service, raw: bytes) -> dict[str, Any]:
    body = validate(TokenizerRequest, parse(raw))
    try:
        ids = service.encode(body.inputs, "inputs").tolist()
    except InputError as error:
        raise invalid(str(error)) from None
    # Special tokens have no text, as in MindIE (TokenizerProcessPool::TikToken, infer_tokenizer.cpp:735).
    places = enumerate(ids) if body.do_decode else ()
    texts = [service.token_text(token, ids, place, skip_special_tokens=True) for place, token in places]
    return {"token_number": len(ids), "tokens": texts}
