"""From the fields of a request to the engine's parameters, with MindIE's defaults between them."""

from __future__ import annotations

from typing import Any

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
) -> GenerationParams:
    """What the engine is to do for a request.

    As in MindIE's worker (mindie_llm/text_generator/utils/batch_context.py:440-510): a request that names temperature,
    top_k or top_p but not do_sample wants to sample; what it leaves out is as the model directory has it; a temperature
    of 0 means greedy whatever do_sample says; and several sequences are always sampled.

    Args:
        body: the request, or its `parameters`; fields that a format does not have count as left out.
        defaults: of the model directory.
        max_new_tokens: None for as many as the server allows.
        timeout: seconds for the whole answer.
        count: sequences that are sampled.
        logprobs: how many of the most likely tokens are to be reported.
    """

    def given(name: str) -> Any:
        return getattr(body, name, None)

    def wanted(name: str, otherwise: Any) -> Any:
        return otherwise if given(name) is None else given(name)

    draws = any(given(name) is not None for name in ("temperature", "top_k", "top_p"))
    stop = given("stop")
    stop_ids = given("stop_token_ids")
    return GenerationParams(
        max_new_tokens=max_new_tokens,
        do_sample=count > 1 or wanted("do_sample", draws or defaults.do_sample),
        temperature=wanted("temperature", defaults.temperature),
        top_k=max(0, wanted("top_k", defaults.top_k)),  # -1 stands for all
        top_p=wanted("top_p", defaults.top_p),
        typical_p=wanted("typical_p", 1.0),
        repetition_penalty=min(
            max(wanted("repetition_penalty", defaults.repetition_penalty), _LEAST_PENALTY), _MOST_PENALTY
        ),
        presence_penalty=wanted("presence_penalty", 0.0),
        frequency_penalty=wanted("frequency_penalty", 0.0),
        seed=given("seed"),
        stop=() if stop is None else (stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(stop_ids or ()),
        ignore_eos=wanted("ignore_eos", False),
        # MindIE reads it only beside something to stop at (utils/infer_param.cpp, AssignIncludeStopStrInOutput).
        include_stop_str_in_output=wanted("include_stop_str_in_output", False)
        and (stop is not None or stop_ids is not None),
        skip_special_tokens=wanted("skip_special_tokens", False),
        logprobs=logprobs if logprobs is not None or count == 1 else 0,  # several answers are ranked by theirs
        priority=wanted("priority", 5),
        timeout=timeout,
    )
