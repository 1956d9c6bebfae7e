"""Shapes and dtypes checked while a graph is traced: the Ascend operators' own inference lets wrong ones through."""

from __future__ import annotations

from mindspore import ops

from telechat_mindie.errors import InputError

Shape = tuple[int | None, ...]
"""Sizes of a tensor's axes; None where a size is only known when the graph runs, or where any size will do."""


def check_tensor(
    where: str, shape: Shape, dtype: object, expected: Shape, dtypes: tuple[str, ...], only_last: bool = False
) -> None:
    """Compare a tensor of a graph with what an operator documents; nothing of it is left in the graph.

    Args:
        where: operator and argument, as `PagedAttention: key_cache`.
        shape: the tensor's.
        dtype: the tensor's, as MindSpore gives it.
        expected: the shape that the operator asks for.
        dtypes: the names of the dtypes that it takes.
        only_last: any axes may come before those of `expected`.

    Raises:
        InputError: another rank, a known size that differs, or a dtype that is not among `dtypes`.
    """
    sizes = shape[-len(expected) :] if only_last else shape
    fits = len(sizes) == len(expected) and all(
        found is None or wanted is None or found == wanted for found, wanted in zip(sizes, expected, strict=True)
    )
    if not fits:
        raise InputError("has the wrong shape", where=where, expected=_sizes(expected), found=_sizes(shape))
    name = str(dtype).lower()
    if name not in dtypes:
        raise InputError("has the wrong dtype", where=where, expected=" or ".join(dtypes), found=name)


def _sizes(shape: Shape) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"


traced_check = ops.constexpr(check_tensor)
"""`check_tensor` as a Cell's construct calls it: MindSpore runs it at compile time, its error comes out unchanged."""
