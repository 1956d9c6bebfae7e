"""What goes wrong on the way to a service and back."""

from __future__ import annotations

from typing import Any

from telechat_mindie.errors import TelechatMindieError


class ServiceError(TelechatMindieError):
    """A service that cannot be reached, refuses a request, or breaks an answer off.

    Attributes:
        kind: the fault in a word or two, the same for all faults of a sort, so that they can be counted.
        status: of the HTTP answer, where there was one other than 200.
    """

    def __init__(self, what: str, *, kind: str, status: int | None = None, **facts: Any) -> None:
        super().__init__(what, **facts)
        self.kind = kind
        self.status = status
