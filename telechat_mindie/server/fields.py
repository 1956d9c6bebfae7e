"""What the bodies of all request formats have in common: how fields are typed, and what is said of a wrong one."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from telechat_mindie.server.http.errors import dump, invalid
from telechat_mindie.units import INT32_MAX

MAX_STOP_STRINGS = 1024  # MindIE's for TGI; ours for the other formats: each is looked for behind each token
MAX_STOP_LENGTH = 1024  # of each in a list, in UTF-16 units, as all of MindIE's lengths of texts
MAX_STOP_TOTAL = 32 * 1024  # of all together, and of one that stands alone
MAX_STOP_TOKENS = 1024  # distinct ones; ours: each is compared with each token
MAX_SEQUENCES = 128  # best_of and n
MAX_PROMPT_TOKENS = 1024 * 1024
MAX_TIMEOUT = 65535  # seconds
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
FLOAT32_MAX = 3.4028234663852886e38


class RequestBody(BaseModel):
    """Strict as MindIE's parser is: no number from a string, no integer from 1.0 or true; a float may be written as an
    integer. Unknown keys are ignored, and null counts as absent (single_req_infer_interface/parse_protocol.cpp)."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """So that defaults hold."""
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


def by_kind(expected: str, **tags: type) -> Discriminator:
    """Tells the members of a union apart by the JSON type of the value.

    Args:
        expected: what the field must be, for a value of another type.
        tags: the member's tag, between `<` and `>` so that it cannot be taken for a field's name, by type.
    """
    kinds = {kind: f"<{tag}>" for tag, kind in tags.items()}
    return Discriminator(
        lambda value: kinds.get(type(value)), custom_error_type="kind", custom_error_message=f"must be {expected}"
    )


def utf16_length(text: str) -> int:
    """Length as MindIE counts it."""
    return len(text) + sum(character > "\uffff" for character in text)


def _check_stop(value: Any) -> str | list[str]:
    """AssignStopStrings (utils/infer_param.cpp:278-347); a text that stands alone may be as long as a whole list."""
    if isinstance(value, str):
        if not 1 <= utf16_length(value) <= MAX_STOP_TOTAL:
            raise PydanticCustomError("stop", f"must have 1 to {MAX_STOP_TOTAL} characters")
        return value
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise PydanticCustomError("stop", "must be a text or a list of texts")
    lengths = [utf16_length(text) for text in value]
    if len(lengths) > MAX_STOP_STRINGS or not all(1 <= length <= MAX_STOP_LENGTH for length in lengths):
        raise PydanticCustomError(
            "stop", f"must be at most {MAX_STOP_STRINGS} texts of 1 to {MAX_STOP_LENGTH} characters"
        )
    if sum(lengths) > MAX_STOP_TOTAL:
        raise PydanticCustomError("stop", f"must have at most {MAX_STOP_TOTAL} characters together")
    return value


def _check_tgi_stop(value: str | list[str]) -> str | list[str]:
    if isinstance(value, str) and utf16_length(value) > MAX_STOP_LENGTH:
        raise PydanticCustomError("stop", f"must have 1 to {MAX_STOP_LENGTH} characters")
    return value


def _known_ids(value: list[int]) -> list[int]:
    """Ids that no vocabulary has are dropped, as MindIE does (utils/infer_param.cpp, AssignStopTokenIds)."""
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
AnyInteger = Annotated[int, Field(ge=INT64_MIN, le=INT64_MAX)]
AnyTokens = Annotated[list[AnyInteger], Field(min_length=1, max_length=MAX_PROMPT_TOKENS)]
_STOP_SCHEMA = {
    "anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "items": {"type": "string", "minLength": 1}}]
}
Stop = Annotated[str | list[str], PlainValidator(_check_stop), WithJsonSchema(_STOP_SCHEMA)]
TgiStop = Annotated[Stop, AfterValidator(_check_tgi_stop)]
StopTokens = Annotated[list[int], AfterValidator(_known_ids)]
Unread = Annotated[None, PlainValidator(lambda value: None), WithJsonSchema({})]
"""A field that a format does not look at."""
RequestId = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,256}$")]

Body = TypeVar("Body", bound=RequestBody)


def validate(model: type[Body], data: dict[str, Any]) -> Body:
    """The body as a model.

    Raises:
        ApiError: 422 with the first field that is wrong.
    """
    try:
        return model.model_validate(data)
    except ValidationError as failure:
        raise invalid(_sentence(failure.errors(include_url=False)[0])) from None


_FAULTS = {
    "missing": "is missing",
    "string_type": "must be a text",
    "bool_type": "must be true or false",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "string_too_short": "must have {min_length} or more characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
    "too_short": "must have {min_length} or more items",
    "too_long": "must have at most {max_length} items",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
}
"""Kinds of pydantic's errors in our words, which follow the field's name; our own errors are such words themselves."""

_SHOWN = 80  # characters of a wrong value


def _sentence(fault: ErrorDetails) -> str:
    """What is wrong with which field. The tag of a union's member (`by_kind`) says nothing to a client."""
    path = ".".join(str(step) for step in fault["loc"] if not str(step).startswith("<"))
    words = _FAULTS.get(fault["type"], "{said}").format(said=fault["msg"], **fault.get("ctx", {}))
    if fault["type"] == "missing":
        return f"Parameter {path} {words}."
    shown = dump(fault["input"]).decode()
    return f"Parameter {path} {words}, got {shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + '...'}."
