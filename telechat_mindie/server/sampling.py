"""From the fields of a request to the engine's parameters, with MindIE's defaults between them."""

from __future__ import annotations

from dataclasses import fields, replace

from telechat_mindie.engine.params import GenerationParams
from telechat_mindie.model_dir.layout import ServingConfig
from telechat_mindie.server.fields import RequestBody

_LEAST_PENALTY, _MOST_PENALTY = 1e-30, 1e30
"""MindIE takes any float32. Within these, a logit times the penalty, over the smallest temperature, stays finite."""


def generation_params(
    body: RequestBody,
    defaults: ServingConfig,
    *,
    max_new_tokens: int | None,
    timeout: float,
    count: int = 1,
    logprobs: int | None = None,
    kept_tokens: tuple[str, ...] = (),
) -> GenerationParams:
    """What the engine is to do for a request.

    What the request leaves out is as the model directory has it (`GenerationParams.with_defaults`), and several
    sequences are always sampled.

    Args:
        body: the request, or its `parameters`; fields that a format does not have count as left out.
        defaults: of the model directory.
        max_new_tokens: None for as many as the server allows.
        timeout: seconds for the whole answer.
        count: sequences that are sampled.
        logprobs: how many of the most likely tokens are to be reported.
        kept_tokens: special tokens that stay in the text even where they are skipped.
    """
    given = {field.name: getattr(body, field.name, None) for field in fields(GenerationParams)}
    stop, stop_ids = given["stop"], given["stop_token_ids"]
    params = GenerationParams.with_defaults(
        defaults,
        **given
        | {
            "max_new_tokens": max_new_tokens,
            "do_sample": True if count > 1 else given["do_sample"],
            "stop": (stop,) if isinstance(stop, str) else tuple(stop or ()),
            "stop_token_ids": tuple(stop_ids or ()),
            # MindIE reads it only beside something to stop at (utils/infer_param.cpp, AssignIncludeStopStrInOutput).
            "include_stop_str_in_output": bool(given["include_stop_str_in_output"])
            and (stop is not None or stop_ids is not None),
            "skip_special_tokens": bool(given["skip_special_tokens"]),
            "logprobs": logprobs if logprobs is not None or count == 1 else 0,  # several answers are ranked by theirs
            "kept_tokens": kept_tokens,
            "timeout": timeout,
        },
    )
    return replace(params, repetition_penalty=min(max(params.repetition_penalty, _LEAST_PENALTY), _MOST_PENALTY))
