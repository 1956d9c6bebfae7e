"""What a run takes of each rank's memory, before anything is allocated."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from telechat_mindie.checkpoint.mapping import EMBEDDINGS, HEAD, weights
from telechat_mindie.config import TelechatConfig
from telechat_mindie.model.kernels.training_shapes import capacity, stretches
from telechat_mindie.training.lora import modules_of, trained_modules
from telechat_mindie.training.settings import Computation, Lora
from telechat_mindie.training.weights import decoder_targets

FLOAT = 4

RUNTIME_BYTES = 530 << 20
"""The interpreter, MindSpore's libraries and compiled graphs, measured with a model of a few kilobytes."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its highest, while the gradients of a batch are computed.

    Attributes:
        weights: those that are frozen, in the dtype of computing; and what bfloat16 rounds of any.
        masters: what is trained, float32.
        gradients: what is added up, and a batch's.
        moments: AdamW's two.
        activations: what the layers compute, and its gradients.
        logits: of a batch, their exponentials and gradients.
        runtime: of a process that has nothing to train.
    """

    weights: int
    masters: int
    gradients: int
    moments: int
    activations: int
    logits: int
    runtime: int = RUNTIME_BYTES

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Bytes by name."""
        return asdict(self)


def estimate(
    config: TelechatConfig, rows: int, length: int, computation: Computation | None = None, lora: Lora | None = None
) -> Memory:
    """The memory of a rank of a run on a CPU, as `Trainer` takes it.

    Args:
        rows: of a batch, over all data parallel ranks.
        length: tokens of a row.

    Raises:
        ConfigError: the model cannot be divided over so many ranks.
        InputError: LoRA targets that the model does not have.
    """
    computation = computation or Computation()
    config.check_tp(computation.tp)
    tp = computation.tp
    sizes = {target.name: math.prod(target.rank_shape(tp)) for target in decoder_targets(config)}
    if config.tie_word_embeddings:
        del sizes[HEAD]
    matrices = {name: size for name, size in sizes.items() if size > config.hidden_size}
    embeddings = weights(config)[EMBEDDINGS].target
    if lora is None:
        frozen, trained = 0, sum(sizes.values())
    else:
        narrow = sum(size for name, size in matrices.items() if name != embeddings)
        frozen = narrow * computation.itemsize + (sum(sizes.values()) - narrow) * FLOAT
        trained = _factor_elements(config, lora, tp)
    if computation.dtype == "bfloat16":
        # Rounded for each product and kept for its gradients.
        frozen += FLOAT * sum(size for name, size in matrices.items() if name != embeddings)
    tokens = rows // computation.dp * length
    return Memory(
        weights=frozen,
        masters=trained * FLOAT,
        gradients=2 * trained * FLOAT,
        moments=2 * trained * FLOAT,
        activations=_activations(config, rows // computation.dp, length, computation) * FLOAT,
        logits=LOGITS * tokens * config.vocab_size // tp * FLOAT,
    )


LOGITS = 14
"""Arrays as large as the logits that a step makes, as measured."""

WIDTHS = {"hidden": 54, "keys": 30, "ffn": 18, "scores": 6}
ROUTED, EXPERT_WIDTHS = 55, {"hidden": 8, "ffn": 11}
"""Arrays that a layer makes in a step, forwards and backwards: of a token's hidden size, of its keys, of its
feed-forward, and of attention's weights; for experts as many more of a token's hidden size in place of the
feed-forward, and of the hidden size and the feed-forward of what experts are given. MindSpore's graphs on a CPU give no
memory back before they end, so all of them count, and recomputing takes memory instead of saving it; the counts are of
the operators, less those that the compiler removes, set to what was measured."""


def _factor_elements(config: TelechatConfig, lora: Lora, tp: int) -> int:
    chosen = {module.name for module in trained_modules(config, lora)}
    total = 0
    for target in decoder_targets(config):
        for module in modules_of(target, config):
            if module.name in chosen:
                columns = module.columns(0, tp)
                total += lora.rank * (columns.stop - columns.start + len(module.rows(0, tp)))
    return total


def _activations(config: TelechatConfig, rows: int, length: int, computation: Computation) -> int:
    """Elements of the layers' arrays."""
    tokens, tp = rows * length, computation.tp
    seen = sum((end - begin) * end for begin, end in stretches(length))
    ffn = config.ffn_size // tp
    a_token = WIDTHS["hidden"] * config.hidden_size + WIDTHS["keys"] * config.kv_size // tp
    layer = tokens * a_token + WIDTHS["scores"] * rows * config.num_heads // tp * seen
    if config.is_moe:
        chosen, experts = config.experts_per_token, config.num_experts
        slots = experts * capacity(tokens, chosen, experts, computation.capacity_factor)
        layer += slots * (EXPERT_WIDTHS["hidden"] * config.hidden_size + EXPERT_WIDTHS["ffn"] * ffn)
        layer += ROUTED * tokens * config.hidden_size
    else:
        layer += WIDTHS["ffn"] * tokens * ffn
    return config.num_layers * (layer * 3 // 2 if computation.recompute else layer)
