"""What the bodies of all request formats have in common: how fields are typed, and what is said of a wrong one."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from telechat_mindie.server.http.errors import ApiError, invalid
from telechat_mindie.units import INT32_MAX

MAX_STOP_STRINGS = 1024
MAX_STOP_LENGTH = 1024  # UTF-16 units, as all of MindIE's lengths of texts
MAX_STOP_TOTAL = 32 * 1024
MAX_STOP_TOKENS = 1024  # distinct ones; ours: each is compared with each token
MAX_SEQUENCES = 128  # best_of and n
MAX_PROMPT_TOKENS = 1024 * 1024
MAX_TIMEOUT = 65535  # seconds
INT64_MAX = 2**63 - 1
FLOAT32_MAX = 3.4028234663852886e38


class RequestBody(BaseModel):
    """Strict as MindIE's parser is: no number from a string, no integer from 1.0 or true; a float may be written as an
    integer. Unknown keys are ignored, and null counts as absent (single_req_infer_interface/parse_protocol.cpp)."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


def utf16_length(text: str) -> int:
    """Length as MindIE counts it."""
    return len(text) + sum(character > "\uffff" for character in text)


def _check_stop(value: str | list[str] | None) -> str | list[str] | None:
    texts = [value] if isinstance(value, str) else value or []
    lengths = [utf16_length(text) for text in texts]
    if len(texts) > MAX_STOP_STRINGS or not all(1 <= length <= MAX_STOP_LENGTH for length in lengths):
        raise PydanticCustomError(
            "stop", f"must be at most {MAX_STOP_STRINGS} texts of 1 to {MAX_STOP_LENGTH} characters"
        )
    if sum(lengths) > MAX_STOP_TOTAL:
        raise PydanticCustomError("stop", f"must have at most {MAX_STOP_TOTAL} characters together")
    return value


def _known_ids(value: list[int] | None) -> list[int] | None:
    """Ids that no vocabulary has are dropped, as MindIE does (utils/infer_param.cpp, AssignStopTokenIds)."""
    if value is None:
        return None
    ids = sorted({index for index in value if 0 <= index <= INT32_MAX})
    if len(ids) > MAX_STOP_TOKENS:
        raise PydanticCustomError("stop_token_ids", f"must be at most {MAX_STOP_TOKENS} different tokens")
    return ids


Tokens = Annotated[int, Field(gt=0, le=INT32_MAX)]
Seed = Annotated[int, Field(ge=0, le=INT64_MAX)]
Sequences = Annotated[int, Field(ge=1, le=MAX_SEQUENCES)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[int, Field(ge=0, le=MAX_PROMPT_TOKENS)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_TOKENS)]
Positive = Annotated[float, Field(gt=0, le=FLOAT32_MAX)]
Temperature = Annotated[float, Field(ge=0, le=FLOAT32_MAX)]
Share = Annotated[float, Field(gt=0, le=1)]
OpenShare = Annotated[float, Field(gt=0, lt=1)]
Priority = Annotated[int, Field(ge=1, le=5)]
Seconds = Annotated[int, Field(ge=1, le=MAX_TIMEOUT)]
Stop = Annotated[str | list[str] | None, AfterValidator(_check_stop)]
StopTokens = Annotated[list[int] | None, AfterValidator(_known_ids)]
RequestId = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,256}$")]

Body = TypeVar("Body", bound=RequestBody)


def validate(model: type[Body], data: dict[str, Any]) -> Body:
    """The body as a model.

    Raises:
        ApiError: 422 with the first field that is wrong.
    """
    try:
        return model.model_validate(without_nulls(data))
    except ValidationError as failure:
        raise _first_fault(failure) from None


def without_nulls(data: dict[str, Any]) -> dict[str, Any]:
    """The same without keys that are null, so that defaults hold; in `parameters` as well."""
    return {
        key: without_nulls(value) if key == "parameters" and isinstance(value, dict) else value
        for key, value in data.items()
        if value is not None
    }


def _first_fault(failure: ValidationError) -> ApiError:
    fault = failure.errors(include_url=False)[0]
    # pydantic names the branch of a union (`str`, `list[str]`), which says nothing to a client.
    path = [str(step) for step in fault["loc"] if isinstance(step, int) or re.fullmatch(r"\w+", step)]
    text = fault["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if fault["type"] == "missing":
        return invalid(f"Parameter {'.'.join(path)} is missing.")
    shown = repr(fault["input"])
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    verb = "" if text.startswith("must ") else "must be "
    return invalid(f"Parameter {'.'.join(path)} {verb}{text}, got {shown}.")
