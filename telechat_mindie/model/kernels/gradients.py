"""Parts of a decoder with gradients written out: fewer passes over memory than automatic differentiation makes of them.

Each is a Cell whose `bprop` takes its inputs, its outputs and their gradients; what it needs is among the outputs.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from telechat_mindie.model.parallel import TensorParallel


class Rounding(nn.Cell):
    """What enters and leaves a matrix product: as it is in float32, or rounded to bfloat16.

    Args:
        dtype: "float32" or "bfloat16".
        emulated: on a CPU, which has no products in bfloat16: operands are rounded and the product is float32's.
    """

    def __init__(self, dtype: str, emulated: bool) -> None:
        super().__init__(auto_prefix=False)
        self.narrow = dtype == "bfloat16"
        self.emulated = emulated
        self.cast = ops.Cast()

    def enter(self, x: Tensor) -> Tensor:
        if not self.narrow:
            return x
        x = self.cast(x, ms.bfloat16)
        return self.cast(x, ms.float32) if self.emulated else x

    def leave(self, x: Tensor) -> Tensor:
        """In float32."""
        if not self.narrow:
            return x
        return self.cast(self.cast(x, ms.bfloat16), ms.float32)


class RmsNorm(nn.Cell):
    """x [T, h] / root of its mean square * weight [h]."""

    def __init__(self, eps: float) -> None:
        super().__init__(auto_prefix=False)
        self.eps = eps
        self.rsqrt = ops.Rsqrt()
        self.mean = ops.ReduceMean(keep_dims=True)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * self.rsqrt(self.mean(x * x, -1) + self.eps) * weight

    def bprop(self, x: Tensor, weight: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.rsqrt(self.mean(x * x, -1) + self.eps)
        normed = x * scale
        weighed = dout * weight
        return scale * (weighed - normed * self.mean(weighed * normed, -1)), (dout * normed).sum(0)


class Swiglu(nn.Cell):
    """silu(gate) * up of [T, 2f]."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.sigmoid = ops.Sigmoid()
        self.concat = ops.Concat(-1)

    def construct(self, both: Tensor) -> Tensor:
        half = both.shape[-1] // 2
        gate = both[:, :half]
        return gate * self.sigmoid(gate) * both[:, half:]

    def bprop(self, both: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        half = both.shape[-1] // 2
        gate = both[:, :half]
        sigmoid = self.sigmoid(gate)
        silu = gate * sigmoid
        dgate = dout * both[:, half:] * (sigmoid + silu * (1.0 - sigmoid))
        return (self.concat((dgate, dout * silu)),)


class CrossEntropy(nn.Cell):
    """The cross entropy of logits of which each tensor parallel rank has a range of the vocabulary.

    Args:
        parallel: the ranks.
        columns: of this rank's logits.
    """

    def __init__(self, parallel: TensorParallel, columns: int) -> None:
        super().__init__(auto_prefix=False)
        self.parallel = parallel
        self.columns = columns
        self.first = parallel.rank * columns
        place = np.zeros((parallel.size, 1, 1), np.float32)
        place[parallel.rank] = 1
        self.own_place = Tensor(place)

    def construct(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T] of logits [T, columns] and targets [T] int32; exponentials [T, columns], and their sums [T]."""
        highest = logits.max(-1, True)
        if self.parallel.size > 1:  # a CPU's collectives only add: each rank puts its own into its place of zeros
            highest = self.parallel.sum(self.own_place * highest.expand_dims(0)).max(0)
        exponentials = ops.exp(logits - highest)
        places, inside = self.places(targets)
        picked = ((ops.gather_elements(logits, 1, places) - highest) * inside).reshape(-1)
        total = exponentials.sum(-1)
        if self.parallel.size > 1:  # one sum, for two that do not wait for each other could meet in any order
            both = self.parallel.sum(ops.stack((picked, total)))
            picked, total = both[0], both[1]
        return ops.log(total) - picked, exponentials, total

    def bprop(self, logits: Tensor, targets: Tensor, out: Any, dout: Any) -> tuple[Tensor, Tensor]:
        # As autodiff of a sum over ranks has it: the gradient of every rank's copy of the loss.
        d = dout[0] * float(self.parallel.size)
        places, inside = self.places(targets)
        share = out[1] * (d / out[2]).expand_dims(-1)
        return ops.tensor_scatter_elements(share, places, -d.expand_dims(-1) * inside, 1, "add"), ops.zeros_like(
            targets
        )

    def places(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The targets' columns here, and 1 where they are here; [T, 1]."""
        places = targets.expand_dims(-1) - self.first
        inside = ops.logical_and(places >= 0, places < self.columns)
        return places * ops.cast(inside, ms.int32), ops.cast(inside, ms.float32)


class CausalAttention(nn.Cell):
    """Rotary embedding and softmax attention of whole rows, a stretch of queries at a time over the keys up to it.

    Args:
        heads, kv_heads: of this rank.
        head_dim: elements of one.
        rounding: of the products.
    """

    def __init__(self, heads: int, kv_heads: int, head_dim: int, rounding: Rounding) -> None:
        super().__init__(auto_prefix=False)
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.group = heads // kv_heads
        self.turned = heads + kv_heads  # heads that are rotated
        self.scale = head_dim**-0.5
        self.rounding = rounding
        self.matmul = ops.BatchMatMul()
        self.matmul_bt = ops.BatchMatMul(transpose_b=True)
        self.matmul_at = ops.BatchMatMul(transpose_a=True)
        self.softmax = ops.Softmax(-1)
        self.concat = ops.Concat(-1)
        self.concat_queries = ops.Concat(3)
        self.concat_keys = ops.Concat(2)

    def construct(self, qkv: Tensor, cos: Tensor, sin: Tensor, masks: Any) -> Any:
        """Output [T, heads * D], the operands of the products, and the attention weights of each stretch.

        Args:
            qkv: [T, (heads + 2 kv heads) * D].
            cos, sin: [T, 1, D / 2].
            masks: of each stretch [rows, 1, 1, queries, keys], added to scores; together all queries.
        """
        split = self.turned * self.head_dim
        turned = self.rotate(qkv[:, :split].reshape(-1, self.turned, self.head_dim), cos, sin)
        rows, length = masks[0].shape[0], masks[-1].shape[4]
        # Query heads of one kv head lie side by side: [rows, kv, group, L, D].
        q = (turned[:, : self.heads] * self.scale).reshape(rows, length, self.kv_heads, self.group, self.head_dim)
        q = self.rounding.enter(q.transpose(0, 2, 3, 1, 4))
        k = turned[:, self.heads :].reshape(rows, length, self.kv_heads, self.head_dim)
        k = self.rounding.enter(k.transpose(0, 2, 1, 3))  # [rows, kv, L, D]
        v = qkv[:, split:].reshape(rows, length, self.kv_heads, self.head_dim)
        v = self.rounding.enter(v.transpose(0, 2, 1, 3))
        outs: tuple[Tensor, ...] = ()
        saved: tuple[Tensor, ...] = ()
        begin = 0
        for mask in masks:
            size, seen = mask.shape[3], mask.shape[4]
            flat = (rows, self.kv_heads, self.group * size, -1)
            queries = q[:, :, :, begin : begin + size].reshape(flat)
            scores = self.rounding.leave(self.matmul_bt(queries, k[:, :, :seen]))
            weights = self.softmax(scores.reshape(rows, self.kv_heads, self.group, size, seen) + mask)
            weights = self.rounding.enter(weights)
            out = self.rounding.leave(self.matmul(weights.reshape(flat), v[:, :, :seen]))
            outs = (*outs, out.reshape(rows, self.kv_heads, self.group, size, self.head_dim))
            saved = (*saved, weights)
            begin += size
        whole = self.concat_queries(outs) if len(outs) > 1 else outs[0]
        return self.as_tokens(whole, self.heads), (q, k, v), saved

    def bprop(self, qkv: Tensor, cos: Tensor, sin: Tensor, masks: Any, out: Any, dout: Any) -> Any:
        rounding = self.rounding
        (q, k, v), saved = out[1], out[2]
        rows, length = masks[0].shape[0], masks[-1].shape[4]
        shape = (rows, length, self.kv_heads, self.group, self.head_dim)
        d = dout[0].reshape(shape).transpose(0, 2, 3, 1, 4)
        # Of each query: the sum over keys of weight * gradient of the weight.
        common = (d * out[0].reshape(shape).transpose(0, 2, 3, 1, 4)).sum(-1, keepdims=True)
        d = rounding.enter(d)
        dqs: tuple[Tensor, ...] = ()
        dks: tuple[Tensor, ...] = ()
        dvs: tuple[Tensor, ...] = ()
        begin = 0
        for index in range(len(masks)):
            size, seen = masks[index].shape[3], masks[index].shape[4]
            flat = (rows, self.kv_heads, self.group * size, -1)
            queries = q[:, :, :, begin : begin + size].reshape(flat)
            douts = d[:, :, :, begin : begin + size].reshape(flat)
            weights = saved[index]
            dvs = (*dvs, self.lengthened(rounding.leave(self.matmul_at(weights.reshape(flat), douts)), length - seen))
            dweights = rounding.leave(self.matmul_bt(douts, v[:, :, :seen])).reshape(weights.shape)
            dscores = weights * (dweights - common[:, :, :, begin : begin + size])
            dscores = rounding.enter(dscores).reshape(flat)
            dq = rounding.leave(self.matmul(dscores, k[:, :, :seen]))
            dqs = (*dqs, dq.reshape(rows, self.kv_heads, self.group, size, self.head_dim))
            dks = (*dks, self.lengthened(rounding.leave(self.matmul_at(dscores, queries)), length - seen))
            begin += size
        dq = self.concat_queries(dqs) if len(dqs) > 1 else dqs[0]
        dk, dv = dks[0], dvs[0]
        for index in range(1, len(masks)):
            dk, dv = dk + dks[index], dv + dvs[index]
        dturned = self.concat((self.as_tokens(dq * self.scale, self.heads), self.as_tokens(dk, self.kv_heads)))
        dturned = self.rotate(dturned.reshape(-1, self.turned, self.head_dim), cos, -sin)
        dqkv = self.concat((dturned.reshape(-1, self.turned * self.head_dim), self.as_tokens(dv, self.kv_heads)))
        dmasks: tuple[Tensor, ...] = ()
        for mask in masks:
            dmasks = (*dmasks, ops.zeros_like(mask))
        return dqkv, ops.zeros_like(cos), ops.zeros_like(sin), dmasks

    def as_tokens(self, x: Tensor, heads: int) -> Tensor:
        """[T, heads * D] of [rows, ..., L, D], whose axes in the middle are the heads."""
        rows, length = x.shape[0], x.shape[-2]
        x = x.reshape(rows, heads, length, self.head_dim).transpose(0, 2, 1, 3)
        return x.reshape(rows * length, heads * self.head_dim)

    def lengthened(self, x: Tensor, more: int) -> Tensor:
        """[rows, kv, keys, D] with so many keys of zeros behind."""
        if more == 0:
            return x
        return self.concat_keys((x, ops.zeros((x.shape[0], x.shape[1], more, x.shape[3]), x.dtype)))

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary embedding in the half layout: the pairs are (i, i + D / 2)."""
        half = self.head_dim // 2
        first, second = x[:, :, :half], x[:, :, half:]
        return self.concat((first * cos - second * sin, second * cos + first * sin))
