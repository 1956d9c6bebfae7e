"""What a caller gives, what the model directory says, and which of them counts."""

from __future__ import annotations

from typing import Any

import pytest

from telechat_mindie.engine.params import GenerationParams
from telechat_mindie.errors import InputError
from telechat_mindie.model_dir.layout import ServingConfig


def directory(**changes: Any) -> ServingConfig:
    values: dict[str, Any] = {
        "dtype": "float16",
        "max_seq_len": 64,
        "block_size": 16,
        "extend_method": "NONE",
        "scaling_factor": 1.0,
        "rotary_dtype": "float16",
        "do_sample": False,
        "temperature": 0.6,
        "top_k": 7,
        "top_p": 0.8,
        "repetition_penalty": 1.1,
        "max_new_tokens": 30,
    }
    return ServingConfig(**values | changes)


def test_what_is_not_given_is_as_the_directory_has_it() -> None:
    params = GenerationParams.with_defaults(directory(), top_p=None, seed=None)
    assert params == GenerationParams(
        do_sample=False, temperature=0.6, top_k=7, top_p=0.8, repetition_penalty=1.1, max_new_tokens=None
    )


@pytest.mark.parametrize("given", [{"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.2}], ids=str)
def test_naming_a_way_of_sampling_asks_for_it(given: dict[str, Any]) -> None:
    params = GenerationParams.with_defaults(directory(), **given)
    assert params.do_sample and {name: getattr(params, name) for name in given} == given
    assert not GenerationParams.with_defaults(directory(), do_sample=False, **given).do_sample


def test_the_directory_may_ask_for_sampling_and_for_all_tokens() -> None:
    params = GenerationParams.with_defaults(directory(do_sample=True, top_k=-1))
    assert (params.do_sample, params.top_k) == (True, 0)
    assert not GenerationParams.with_defaults(directory(do_sample=True), do_sample=False).do_sample
    assert GenerationParams.with_defaults(directory(), top_k=-1).top_k == 0


def test_what_is_given_wins_even_where_it_is_false_and_is_checked() -> None:
    params = GenerationParams.with_defaults(directory(), temperature=0.0, top_k=0, skip_special_tokens=False)
    assert (params.temperature, params.top_k, params.skip_special_tokens) == (0.0, 0, False)
    with pytest.raises(InputError, match="top_p"):
        GenerationParams.with_defaults(directory(), top_p=1.5)
