"""Train telechat2-nano from scratch: tokenizer and weights, on the CPU, reproducibly.

    python tools/train_nano.py OUT_DIR [--epochs 60] [--seed 0]

reads tools/nano_corpus.jsonl and writes a checkpoint in the Hugging Face format of the published TeleChat2 models. The
decoder is the package's own; only attention is replaced, since training needs neither a cache nor blocks.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import sentencepiece
from mindspore import Parameter, Tensor, mutable, nn, ops
from safetensors.numpy import save_file

from telechat_mindie.checkpoint.mapping import mindformers_targets
from telechat_mindie.config import TelechatConfig
from telechat_mindie.dtypes import DTYPES
from telechat_mindie.model.decoder import TelechatForCausalLM
from telechat_mindie.model.kernels.cpu import BLOCKED, CpuKernels
from telechat_mindie.model.kv_cache import KVCache
from telechat_mindie.model.parallel import TensorParallel
from telechat_mindie.model.rope import RotaryTable
from telechat_mindie.staging import StagedDirectory, dump_json
from telechat_mindie.text.tokenizer import TelechatTokenizer

CORPUS = Path(__file__).with_name("nano_corpus.jsonl")
DTYPE = "bfloat16"

CONFIG = {
    "architectures": ["TelechatForCausalLM"],
    "model_type": "telechat",
    "vocab_size": 2400,
    "hidden_size": 192,
    "n_layer": 4,
    "n_head": 6,
    "num_key_value_heads": 2,
    "ffn_hidden_size": 512,
    "layer_norm_epsilon": 1e-5,
    "seq_length": 1024,
    "training_seqlen": 1024,
    "base_seqlen": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "unk_token_id": 0,
    "apply_residual_connection_post_layernorm": False,
    "tie_word_embeddings": False,
    "torch_dtype": DTYPE,
}
GENERATION = {
    "max_new_tokens": 256,
    "do_sample": False,
    "temperature": 0.3,
    "top_k": 5,
    "top_p": 0.85,
    "repetition_penalty": 1.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "user_token_id": 4,
    "bot_token_id": 5,
}
CONTROL = ["<_start>", "<_end>", "<_pad>", "<_user>", "<_bot>", "<_system>", "<_observation>", "<_sep>"]
CONTROL += [f"<_control{number}>" for number in range(1, 10)]
USER_DEFINED = [*"0123456789", "_", "\n", "\t", "__", "___", "____"]

OTHER_SYSTEMS = ["You are a helpful assistant.", "你是一个有用的助手。", "你是TeleChat。"]
LENGTHS = (96, 128, 160, 256)
TOKENS_PER_STEP = 2048

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Ids [B, S], targets [B * S] and their weights [B * S]."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    options = parser.parse_args()
    entries = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    with StagedDirectory(options.out_dir, replace=True, marker="config.json") as staged:
        (staged.path / "tokenizer.model").write_bytes(train_tokenizer(entries))
        (staged.path / "tokenizer_config.json").write_bytes(dump_json({"tokenizer_class": "TelechatTokenizer"}))
        (staged.path / "config.json").write_bytes(dump_json(CONFIG))
        (staged.path / "generation_config.json").write_bytes(dump_json(GENERATION))
        tokenizer = TelechatTokenizer.from_pretrained(staged.path)
        trained = train(entries, tokenizer, options.epochs, options.learning_rate, options.seed)
        weights = to_hugging_face(trained, TelechatConfig.from_dict(CONFIG))
        save_file(weights, staged.path / "model.safetensors", metadata={"format": "pt"})
        staged.commit()


def train_tokenizer(entries: list[dict[str, Any]]) -> bytes:
    """A sentencepiece model with the id layout and settings of TeleChat2's, on the corpus's text."""
    texts = [text for entry in entries for system, turns in conversations(entry) for pair in turns for text in pair]
    texts += OTHER_SYSTEMS * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=CONFIG["vocab_size"],
        unk_id=0,
        unk_piece="<_unk>",
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        control_symbols=CONTROL,
        user_defined_symbols=USER_DEFINED,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def conversations(entry: dict[str, Any]) -> Iterator[tuple[str | None, list[tuple[str, str]]]]:
    """Every (system text, turns) that an entry stands for: one for each wording of its question."""
    system = entry.get("system")
    if "turns" in entry:
        yield system, [(question, answer) for question, answer in entry["turns"]]
    for question in entry.get("questions", ()):
        yield system, [(question, entry["answer"])]


def epoch(
    entries: list[dict[str, Any]], tokenizer: TelechatTokenizer, rng: random.Random
) -> list[tuple[list[int], list[bool]]]:
    """One wording of every entry, as (ids, which of them the loss counts): the answers and their `<_end>`."""
    samples = []
    for entry in entries:
        system, turns = rng.choice(list(conversations(entry)))
        messages = []
        kind = rng.random()
        if system is None and kind < 0.1:
            system = rng.choice(OTHER_SYSTEMS)
        if system is not None:
            messages.append({"role": "system", "content": system})
        for question, answer in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(messages)
        if messages[0]["role"] != "system" and kind > 0.85:
            ids = [1, *ids[ids.index(4) :]]  # <_start><_user>..., as the published README prompts
        answering, counted = False, []
        for token in ids:
            counted.append(answering)
            answering = token == 5 or (answering and token != 2)
        samples.append((ids[: LENGTHS[-1]], counted[: LENGTHS[-1]]))
    return samples


def batches(samples: list[tuple[list[int], list[bool]]], rng: random.Random) -> list[Batch]:
    """An epoch in batches of few shapes, since each shape is a graph to compile."""
    found: list[Batch] = []
    for shortest, length in zip((0, *LENGTHS), LENGTHS, strict=False):
        fitting = [sample for sample in samples if shortest < len(sample[0]) <= length]
        rng.shuffle(fitting)
        size = TOKENS_PER_STEP // length
        for begin in range(0, len(fitting), size):
            ids = np.full((size, length + 1), 3, np.int32)
            counted = np.zeros((size, length + 1), np.float32)
            for row, (tokens, flags) in enumerate(fitting[begin : begin + size]):
                ids[row, : len(tokens)] = tokens
                counted[row, : len(tokens)] = flags
            found.append((ids[:, :-1], ids[:, 1:].reshape(-1), counted[:, 1:].reshape(-1)))
    rng.shuffle(found)
    return found


class TrainingKernels(CpuKernels):
    """Attention over whole sequences, without a cache, so that gradients flow."""

    def attention(self, qkv: Tensor, key_cache: Tensor, value_cache: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        q, k, v = self.rotated(qkv, inputs[0], inputs[1])
        return self.attend(q, k, v, inputs[2])


class Loss(nn.Cell):
    """Mean cross entropy of the weighted targets."""

    def __init__(self, model: TelechatForCausalLM) -> None:
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(
        self, ids: Tensor, rows: Tensor, targets: Tensor, weights: Tensor, inputs: tuple[Tensor, ...]
    ) -> Tensor:
        logits = self.model(ids, rows, inputs)
        losses = ops.cross_entropy(logits, targets, reduction="none")
        return (losses * weights).sum() / weights.sum()


class Step(nn.Cell):
    """Loss, gradients clipped to norm 1, AdamW."""

    def __init__(self, loss: Loss, optimizer: nn.Optimizer) -> None:
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.value_and_grad = ops.value_and_grad(loss, None, optimizer.parameters)

    def construct(
        self, ids: Tensor, rows: Tensor, targets: Tensor, weights: Tensor, inputs: tuple[Tensor, ...]
    ) -> Tensor:
        loss, gradients = self.value_and_grad(ids, rows, targets, weights, inputs)
        self.optimizer(ops.clip_by_global_norm(gradients, 1.0))
        return loss


def train(
    entries: list[dict[str, Any]], tokenizer: TelechatTokenizer, epochs: int, learning_rate: float, seed: int
) -> dict[str, np.ndarray]:
    """The trained parameters by mindformers name, float32."""
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    config = TelechatConfig.from_dict(CONFIG)
    rng, numpy_rng = random.Random(seed), np.random.default_rng(seed)

    def take(name: str, shape: tuple[int, ...]) -> Parameter:
        if len(shape) == 1:
            values = np.zeros(shape) if name.endswith("bias") else np.ones(shape)
        else:
            scale = 0.02 / (2 * config.num_layers) ** 0.5 if name.endswith(("wo.weight", "w2.weight")) else 0.02
            values = numpy_rng.standard_normal(shape) * scale
        return Parameter(Tensor(values.astype(np.float32)))

    cache = KVCache(config.num_layers, 0, 1, config.kv_size, np.dtype(np.float32))
    rotary = RotaryTable(config.head_dim, config.training_seqlen, config.base_seqlen)
    kernels = TrainingKernels(config, 1, cache, rotary)
    model = TelechatForCausalLM(config, take, kernels, TensorParallel(), cache)
    plan = [batches(epoch(entries, tokenizer, rng), rng) for _ in range(epochs)]
    steps = sum(len(found) for found in plan)
    warm_up = min(50, steps // 10)
    rates = [learning_rate * min(1.0, (i + 1) / warm_up, 0.02 + 0.98 * (1 - i / steps)) for i in range(steps)]
    parameters = [parameter for parameter in model.get_parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in parameters if len(parameter.shape) > 1]
    others = [parameter for parameter in parameters if len(parameter.shape) == 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    step = Step(Loss(model), nn.AdamWeightDecay(groups, learning_rate=rates, beta2=0.98))
    step.set_train()
    begin = time.monotonic()
    for number, found in enumerate(plan):
        losses = [float(step(*model_inputs(rotary, *batch)).asnumpy()) for batch in found]
        print(f"epoch {number + 1}/{epochs}  loss {np.mean(losses):.4f}  {time.monotonic() - begin:.0f} s", flush=True)
    return {parameter.name: parameter.asnumpy() for parameter in parameters}


def model_inputs(rotary: RotaryTable, ids: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> tuple[Any, ...]:
    size, length = ids.shape
    positions = np.tile(np.arange(length), size)
    cos, sin = rotary.tables(positions, np.full(len(positions), length))
    mask = np.where(np.tri(length, dtype=bool), 0, BLOCKED).astype(np.float32)
    mask = np.broadcast_to(mask, (size, 1, 1, length, length))
    inputs = mutable((Tensor(cos[:, None]), Tensor(sin[:, None]), Tensor(np.ascontiguousarray(mask))))
    rows = Tensor(np.arange(size * length, dtype=np.int32))
    return Tensor(ids.reshape(-1)), rows, Tensor(targets), Tensor(weights), inputs


def to_hugging_face(trained: dict[str, np.ndarray], config: TelechatConfig) -> dict[str, np.ndarray]:
    """The weights under their published names: the packed projections cut apart, keys and values side by side again."""
    found: dict[str, np.ndarray] = {}
    for target in mindformers_targets(config, qkv_concat=True, transposed_experts=False):
        begin = 0
        for part in target.parts:
            rows = trained[target.name][begin : begin + part.rows]
            begin += part.rows
            if part.pick == "all":
                found[part.source] = rows
                continue
            pairs = found.setdefault(part.source, np.empty(part.shape, np.float32))
            side = ("keys", "values").index(part.pick)
            pairs.reshape(-1, 2, config.head_dim, part.shape[1])[:, side] = rows.reshape(
                -1, config.head_dim, part.shape[1]
            )
    return {name: array.astype(DTYPES[DTYPE].numpy) for name, array in found.items()}


if __name__ == "__main__":
    main()
