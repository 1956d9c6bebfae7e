"""Training steps of one process: gradients added up over batches, then AdamW."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import CheckpointError, InputError, name_some
from telechat_mindie.training.ranks import groups
from telechat_mindie.training.rows import Batch, documents, positions_within
from telechat_mindie.training.settings import Computation, Lora, Optimization, Place


@dataclass(frozen=True)
class StepResult:
    """What an update did. `loss` is the mean over `tokens` predictions, `grad_norm` that of its gradient, unclipped."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int


class Trainer:
    """Trains a decoder: `accumulate` batches, then `update`.

    With several ranks every process makes one, joined before (`training.ranks`), and calls it with the same batches:
    each computes its share of the rows, and what comes back is of them all.

    Args:
        config: the model's shape.
        weights: float32 arrays by the decoder's parameter names, of this rank's part; see `training.weights`. Each is
            asked for once.
        optimization: the optimizer's numbers.
        computation: dtypes and ranks.
        lora: what to train in place of all weights.
        pad_id: the token that rows are filled up with; by default the config's.
        rank: of this process, from 0.
        device: "cpu", or "ascend", which is unproven.

    Raises:
        CheckpointError: a weight is missing or has another shape.
        ConfigError: the model cannot be divided over so many ranks.
        InputError: LoRA targets that the model does not have.
    """

    def __init__(
        self,
        config: TelechatConfig,
        weights: Mapping[str, np.ndarray],
        optimization: Optimization,
        computation: Computation | None = None,
        lora: Lora | None = None,
        *,
        pad_id: int | None = None,
        rank: int = 0,
        device: str = "cpu",
    ) -> None:
        import mindspore as ms
        from mindspore import ParameterTuple

        from telechat_mindie.backend.ranks import use_device
        from telechat_mindie.model.decoder import TelechatForCausalLM
        from telechat_mindie.model.kernels.training import TrainingKernels
        from telechat_mindie.model.rope import RotaryTable
        from telechat_mindie.training.graphs import Accumulate, Evaluate, Loss, Update
        from telechat_mindie.training.parameters import Parameters, zeros_like

        computation = computation or Computation()
        config.check_tp(computation.tp)
        ms.set_context(mode=ms.GRAPH_MODE)
        use_device(device, rank)
        self.config, self.optimization, self.computation, self.lora = config, optimization, computation, lora
        self.step = 0
        self._place = Place.of(rank, computation)
        self._pad_id = config.pad_token_id if pad_id is None else pad_id
        self._rotary = RotaryTable.of(config)
        self._loss_sum, self._tokens = 0.0, 0

        take = Parameters(config, weights, computation, lora, self._place.tp_rank)
        kernels = TrainingKernels(
            config,
            computation.tp,
            computation.dtype,
            emulated=device == "cpu",
            lora_scale=lora.scale if lora else 1.0,
            capacity_factor=computation.capacity_factor,
        )
        no_cache: Any = None
        tensor, data, ranks = groups(computation, self._place)
        decoder = TelechatForCausalLM(config, take, kernels, tensor, no_cache)
        if computation.recompute:
            for layer in decoder.model.layers:
                layer.attention.recompute()
                layer.feed_forward.recompute()
        take.restore_names()
        self._parameters = take.trained
        self._totals = {name: zeros_like(p, f"total.{name}") for name, p in self._parameters.items()}
        self._first = {name: zeros_like(p, f"adam_m.{name}") for name, p in self._parameters.items()}
        self._second = {name: zeros_like(p, f"adam_v.{name}") for name, p in self._parameters.items()}
        parameters, totals = (ParameterTuple(list(side.values())) for side in (self._parameters, self._totals))
        decoder.set_train(True)
        self._accumulate = Accumulate(Loss(decoder, computation.balance_alpha), parameters, totals, data)
        self._evaluate = Evaluate(Loss(decoder), data)
        self._update = Update(
            list(parameters),
            list(totals),
            (list(self._first.values()), list(self._second.values())),
            [len(parameter.shape) > 1 and not name.endswith("bias") for name, parameter in self._parameters.items()],
            [name in take.cut for name in self._parameters],
            optimization.clip_norm,
            (ranks, data, tensor),
        )

    def accumulate(self, batch: Batch) -> tuple[float, int]:
        """Add the gradients of a batch's summed loss; that sum, and how many predictions it is over."""
        return self._run(self._accumulate, batch, adding=True)

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """The summed cross entropy of a batch and how many predictions it is over; nothing changes."""
        return self._run(self._evaluate, batch)

    def update(self) -> StepResult:
        """Take the step that the accumulated gradients ask for, and begin the next.

        Raises:
            InputError: no prediction of the step counts.
        """
        from mindspore import Tensor

        if not self._tokens:
            raise InputError(
                "has no label to learn from", where=f"step {self.step + 1}", advice="Leave rows without answers out."
            )
        chosen, step = self.optimization, self.step + 1
        rate = chosen.rate(step)
        # AdamW's bias correction, in the learning rate and epsilon of the operator, which has none:
        # rate * (m / c1) / (sqrt(v / c2) + epsilon) = rate * sqrt(c2) / c1 * m / (sqrt(v) + epsilon * sqrt(c2))
        first, root = 1 - chosen.beta1**step, math.sqrt(1 - chosen.beta2**step)
        scalars = (
            self._tokens,
            rate * root / first,
            chosen.beta1,
            chosen.beta2,
            chosen.epsilon * root,
            chosen.weight_decay * first / root,  # rate * decay, whatever the correction
        )
        norm = self._update(*(Tensor(np.float32(scalar)) for scalar in scalars))
        result = StepResult(step, self._loss_sum / self._tokens, float(norm.asnumpy()), rate, self._tokens)
        self.step = step
        self._loss_sum, self._tokens = 0.0, 0
        return result

    def trained(self, *, copied: bool = True) -> dict[str, np.ndarray]:
        """This rank's part of what was trained: weights by the decoder's names, or LoRA's factors by mindformers'.

        `weights.hugging_face_weights` and `lora.peft_tensors` put the ranks' parts together.

        Args:
            copied: else the arrays change with the next step, but on a CPU take no memory of their own.
        """
        return _arrays(self._parameters, "", copied)

    def state(self, *, copied: bool = True) -> dict[str, np.ndarray]:
        """What the next step depends on, between updates: masters, `adam_m.` and `adam_v.` of each, `global_step`.

        Args:
            copied: as for `trained`.
        """
        found: dict[str, np.ndarray] = {}
        for prefix, side in self._state_tensors():
            found |= _arrays(side, prefix, copied)
        return found | {"global_step": np.array([self.step], np.int64)}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on where `state` was taken; gradients that were added up are forgotten.

        Raises:
            CheckpointError: it is not of this model, these ranks or this kind of run.
        """
        from mindspore import Tensor

        expected = {prefix + name: p.shape for prefix, side in self._state_tensors() for name, p in side.items()}
        wrong = [name for name, shape in expected.items() if name not in state or state[name].shape != shape]
        if wrong or "global_step" not in state:
            raise CheckpointError(
                f"the saved state is that of another run: {name_some(wrong or ['global_step'])}",
                where="resume",
                advice="Resume with the model, LoRA and ranks that it was begun with.",
            )
        for prefix, side in self._state_tensors():
            for name, parameter in side.items():
                parameter.assign_value(Tensor(np.asarray(state[prefix + name], np.float32)))
        for total in self._totals.values():
            total.assign_value(Tensor(np.zeros(total.shape, np.float32)))
        self.step = int(np.asarray(state["global_step"]).reshape(-1)[0])
        self._loss_sum, self._tokens = 0.0, 0

    def _state_tensors(self) -> tuple[tuple[str, dict[str, Any]], ...]:
        return ("", self._parameters), ("adam_m.", self._first), ("adam_v.", self._second)

    def _run(self, graph: Any, batch: Batch, adding: bool = False) -> tuple[float, int]:
        tokens = batch.tokens(self._pad_id)
        share = batch.part(self._place.dp_rank, self.computation.dp)
        loss = float(graph(*self._graph_inputs(share)).asnumpy())
        if adding:
            self._loss_sum += loss
            self._tokens += tokens
        return loss, tokens

    def _graph_inputs(self, batch: Batch) -> tuple[Any, ...]:
        """See `graphs.Loss.construct`."""
        from mindspore import Tensor, mutable

        ids = batch.input_ids[:, :-1]
        counted = batch.counted(self._pad_id)
        numbers = documents(ids) if self.computation.document_mask else np.zeros(ids.shape, np.int32)
        positions, lengths = positions_within(numbers)
        cos, sin = self._rotary.tables(positions.reshape(-1), lengths.reshape(-1))
        seen = np.where(ids == self._pad_id, np.int32(-1), numbers)
        return (
            Tensor(np.ascontiguousarray(ids).reshape(-1)),
            Tensor(np.where(counted, batch.labels[:, 1:], 0).astype(np.int32).reshape(-1)),
            Tensor(counted.astype(np.float32).reshape(-1)),
            Tensor(np.float32(counted.sum())),
            mutable((Tensor(cos[:, None]), Tensor(sin[:, None]))),
            mutable((Tensor(numbers), Tensor(seen))),
        )


def _arrays(parameters: Mapping[str, Any], prefix: str, copied: bool) -> dict[str, np.ndarray]:
    arrays = {prefix + name: parameter.asnumpy() for name, parameter in parameters.items()}
    return {name: array.copy() for name, array in arrays.items()} if copied else arrays
