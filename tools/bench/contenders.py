"""One engine of the decode benchmark in a process of its own, driven over its standard input and output.

`python contenders.py NAME FOLDER THREADS` loads FOLDER/weights.safetensors as NAME and answers each line of JSON
`{"batch": B, "prompt": P, "steps": S}` with a line `RESULT {"prefill": [s], "decode": [s, ...], "logits": [...]}`:
seconds of B prompts of P tokens, of each of S steps, and the first logits of the last step.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

BLOCK_SIZE = 128  # tokens, MindIE's default
MAX_SEQ_LEN = 512  # tokens
SHOWN_LOGITS = 64


class Engine(Protocol):
    """B sequences side by side, all of the same length."""

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """Forget everything, take in tokens [B, P], give the last logits of the first sequence."""

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Take in one more token of each sequence [B], give the first one's logits."""


class Ours:
    """The package's decoder, called with the arrays that MindIE passes, as ModelRunner.forward does."""

    def __init__(self, folder: Path, kernels: str) -> None:
        import mindspore as ms
        from safetensors.numpy import load_file

        from telechat_mindie.backend.inputs import BatchLimits
        from telechat_mindie.checkpoint.mapping import mindformers_targets
        from telechat_mindie.config import TelechatConfig
        from telechat_mindie.dtypes import DTYPES
        from telechat_mindie.model.decoder import TelechatForCausalLM
        from telechat_mindie.model.kernels.selection import select_cpu_kernels
        from telechat_mindie.model.kv_cache import KVCache
        from telechat_mindie.model.parallel import TensorParallel
        from telechat_mindie.model.rope import RotaryTable

        os.environ["TELECHAT_CPU_KERNELS"] = kernels
        ms.set_context(mode=ms.GRAPH_MODE)
        ms.set_device("CPU")
        config = TelechatConfig.from_directory(folder)
        stored = config.torch_dtype or "float32"
        # MindSpore registers a bfloat16 of its own with numpy; which of the two the file is read as is left to chance.
        weights = {
            name: array.view(DTYPES[stored].numpy) for name, array in load_file(folder / "weights.safetensors").items()
        }
        chosen = select_cpu_kernels()
        targets = {
            target.name: target for target in mindformers_targets(config, qkv_concat=True, transposed_experts=False)
        }

        def take(name: str, shape: tuple[int, ...]) -> ms.Parameter:
            parts = []
            for part in targets[name].parts:
                array = weights[part.source]
                if part.pick != "all":
                    pairs = array.reshape(-1, 2, config.head_dim, array.shape[1])
                    array = pairs[:, 0 if part.pick == "keys" else 1].reshape(-1, array.shape[1])
                parts.append(array)
            whole = np.ascontiguousarray(np.concatenate(parts), DTYPES[chosen.weight_dtype(stored)].numpy).reshape(
                shape
            )
            return ms.Parameter(ms.Tensor.from_numpy(whole), requires_grad=False)

        self._limits = BatchLimits(config.vocab_size, 8 * MAX_SEQ_LEN // BLOCK_SIZE, BLOCK_SIZE, MAX_SEQ_LEN)
        dtype = chosen.cache_dtype(stored)
        cache = KVCache(config.num_layers, self._limits.num_blocks, BLOCK_SIZE, config.kv_size, dtype)
        self._kernels = chosen(config, 1, cache, RotaryTable(config.head_dim))
        self._model = TelechatForCausalLM(config, take, self._kernels, TensorParallel(), cache)
        self._whole = self._kernels.single_rank_decoder(self._model)
        self._length = 0

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        self._length = 0
        return self._forward(tokens, prefill=True)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        return self._forward(tokens[:, None], prefill=False)

    def _forward(self, tokens: np.ndarray, prefill: bool) -> np.ndarray:
        from telechat_mindie.backend.inputs import ragged_batch

        count, new = tokens.shape
        blocks = np.arange(count * MAX_SEQ_LEN // BLOCK_SIZE, dtype=np.int32).reshape(count, -1)
        positions = np.tile(np.arange(self._length, self._length + new, dtype=np.int32), count)
        self._length += new
        batch = ragged_batch(
            self._limits,
            input_ids=tokens.ravel(),
            valid_length_each_example=np.full(count, self._length, np.int32),
            block_tables=blocks,
            slot_mapping=np.repeat(blocks[:, 0] * BLOCK_SIZE, new) + positions,
            prefill=prefill,
            position_ids=positions,
        )
        if self._whole is not None:
            whole: np.ndarray = self._whole.logits(batch)[0]
            return whole
        logits = np.empty((len(batch.logits_rows), self._limits.vocab_size), np.float32)
        for call in self._kernels.calls(batch):
            out = self._model(call.token_ids, call.logits_rows, call.inputs).asnumpy()
            logits[call.rows] = out[: len(call.rows)]
        first: np.ndarray = logits[0]
        return first


class Transformers:
    """A dense TeleChat2 is a Llama with attention_bias and mlp_bias, zero where TeleChat2 has none."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._torch: Any = importlib.import_module("torch")
        self._torch.set_num_threads(threads)
        transformers: Any = importlib.import_module("transformers")
        config = json.loads((folder / "config.json").read_text())
        shape = transformers.LlamaConfig(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["ffn_hidden_size"],
            num_hidden_layers=config["n_layer"],
            num_attention_heads=config["n_head"],
            num_key_value_heads=config["num_key_value_heads"],
            rms_norm_eps=config["layer_norm_epsilon"],
            max_position_embeddings=MAX_SEQ_LEN,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
        )
        self._model = transformers.LlamaForCausalLM(shape).eval()
        state = {name: self._torch.from_numpy(array) for name, array in llama_weights(folder, config).items()}
        missing, unexpected = self._model.load_state_dict(state, strict=False)
        if unexpected or any(not name.endswith("bias") for name in missing):
            raise SystemExit(f"the Llama's weights differ: missing {missing}, unknown {unexpected}")
        for name, parameter in self._model.named_parameters():
            if name in missing:
                parameter.data.zero_()
        self._model.to(getattr(self._torch, config["torch_dtype"]))
        self._cache: Any = None

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        self._cache = None
        return self._forward(tokens)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        return self._forward(tokens[:, None])

    def _forward(self, tokens: np.ndarray) -> np.ndarray:
        with self._torch.inference_mode():
            ids = self._torch.from_numpy(tokens.astype(np.int64))
            out = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._cache = out.past_key_values
            logits: np.ndarray = out.logits[0, -1].float().numpy()
            return logits


class LlamaCpp:
    """llama.cpp through llama-cpp-python's low-level interface, on a GGUF file written by the gguf package."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._lib: Any = importlib.import_module("llama_cpp")
        lib = self._lib
        config = json.loads((folder / "config.json").read_text())
        path = folder / "model.gguf"
        if not path.exists():
            write_gguf(path, folder, config)
        self._vocab_size = config["vocab_size"]
        self._log = lib.llama_log_callback(lambda *_: None)  # kept alive: C calls it
        lib.llama_log_set(self._log, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx = 8 * MAX_SEQ_LEN
        params.n_seq_max = 8
        params.n_batch = params.n_ubatch = 1024
        params.n_threads = params.n_threads_batch = threads
        self._context = lib.llama_init_from_model(self._model, params)
        self._batch = lib.llama_batch_init(1024, 0, 1)
        self._length = 0

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._length = 0
        return self._forward(tokens)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        return self._forward(tokens[:, None])

    def _forward(self, tokens: np.ndarray) -> np.ndarray:
        count, new = tokens.shape
        batch = self._batch
        batch.n_tokens = count * new
        for index, token in enumerate(tokens.ravel().tolist()):
            sequence, offset = divmod(index, new)
            batch.token[index] = token
            batch.pos[index] = self._length + offset
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = offset == new - 1
        self._length += new
        if self._lib.llama_decode(self._context, batch):
            raise SystemExit("llama_decode failed")
        # Reading the last sequence's logits waits for all of them.
        found = [self._lib.llama_get_logits_ith(self._context, row * new + new - 1) for row in (0, count - 1)]
        return np.ctypeslib.as_array(found[0], (self._vocab_size,)).copy()


def llama_weights(folder: Path, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The weights in float32 under a Hugging Face Llama's names; key_value holds each kv head's key, then its value."""
    importlib.import_module("ml_dtypes")  # teaches numpy bfloat16
    load_file = importlib.import_module("safetensors.numpy").load_file
    names = {
        "transformer.word_embeddings": "model.embed_tokens",
        "transformer.ln_f": "model.norm",
        "transformer.h.": "model.layers.",
        "self_attention.query": "self_attn.q_proj",
        "self_attention.dense": "self_attn.o_proj",
    }
    found = {}
    for name, stored in load_file(folder / "weights.safetensors").items():
        array = stored.astype(np.float32)
        for old, new in names.items():
            name = name.replace(old, new)
        if "self_attention.key_value" in name:
            pairs = array.reshape(config["num_key_value_heads"], 2, -1, array.shape[1])
            for side, letter in enumerate("kv"):
                key = name.replace("self_attention.key_value", f"self_attn.{letter}_proj")
                found[key] = np.ascontiguousarray(pairs[:, side].reshape(-1, array.shape[1]))
        else:
            found[name] = array
    return found


def write_gguf(path: Path, folder: Path, config: dict[str, Any]) -> None:
    """A Llama in GGUF: matrices in the stored dtype, the rest in float32, q and k permuted for interleaved rotation."""
    gguf: Any = importlib.import_module("gguf")
    writer = gguf.GGUFWriter(str(path), "llama")
    heads, kv_heads = config["n_head"], config["num_key_value_heads"]
    writer.add_context_length(MAX_SEQ_LEN)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["n_layer"])
    writer.add_feed_forward_length(config["ffn_hidden_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_layer_norm_rms_eps(config["layer_norm_epsilon"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["n_layer"])
    kind = getattr(gguf.GGMLQuantizationType, {"bfloat16": "BF16", "float16": "F16"}.get(config["torch_dtype"], "F32"))
    for name, array in llama_weights(folder, config).items():
        if "q_proj" in name or "k_proj" in name:
            count = heads if "q_proj" in name else kv_heads
            array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        stored = kind if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(target, gguf.quants.quantize(np.ascontiguousarray(array), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


ENGINES: dict[str, Callable[[Path, int], Engine]] = {
    "native": lambda folder, threads: Ours(folder, "native"),
    "mindspore": lambda folder, threads: Ours(folder, "mindspore"),
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
}


def measure(engine: Engine, batch: int, prompt: int, steps: int) -> dict[str, list[float]]:
    random = np.random.default_rng(0)
    tokens = random.integers(10, 1000, (batch, prompt + steps)).astype(np.int32)
    begin = time.perf_counter()
    logits = engine.prefill(tokens[:, :prompt])
    prefill = time.perf_counter() - begin
    decode = []
    for step in range(prompt, prompt + steps):
        begin = time.perf_counter()
        logits = engine.decode(tokens[:, step])
        decode.append(time.perf_counter() - begin)
    return {"prefill": [prefill], "decode": decode, "logits": logits[:SHOWN_LOGITS].astype(float).tolist()}


def main(name: str, folder: str, threads: str) -> None:
    engine = ENGINES[name](Path(folder), int(threads))
    print("RESULT {}", flush=True)
    for line in sys.stdin:
        print("RESULT", json.dumps(measure(engine, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
