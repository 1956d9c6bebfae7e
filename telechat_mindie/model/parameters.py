"""Parameters over memory that is there already."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mindspore import Parameter, Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator


def parameter_over(tensor: Tensor, name: str | None = None) -> Parameter:
    """A parameter, without a gradient, that is the tensor's own memory, on the host or on a device.

    Parameter(tensor) copies it through host memory, unless it counts four references to the tensor: what it counts up
    to Python 3.10 for one that nothing else refers to, and never for such a one from 3.11 on (mindspore/common/
    parameter.py, _get_parameter_new_args; mindformers r1.6.0 parallel_core/inference/utils.py replaces it as well).
    """
    with _without_copy():
        return Parameter(tensor, name=name, requires_grad=False)


@contextmanager
def _without_copy() -> Iterator[None]:
    def arguments(data: Tensor, *_: Any) -> tuple[type[Tensor], Tensor]:
        return Tensor, data

    original = Parameter.__dict__["_get_parameter_new_args"]
    Parameter._get_parameter_new_args = staticmethod(arguments)
    try:
        yield
    finally:
        Parameter._get_parameter_new_args = original
