"""What this package answers, for the other engines to be compared with: `ours.py WORK [FIXTURES]`.

Makes checkpoints in WORK in every form that `convert` writes, and WORK/expected.json with ids, prompts and greedy
answers; WORK/NAME-DTYPE.npz has the logits behind prompts. FIXTURES holds folders NAME/ckpt of more checkpoints.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from telechat_mindie.checkpoint.convert import MindSporeForm, OutputOptions, to_hugging_face, to_llama, to_mindspore
from telechat_mindie.checkpoint.mapping import weights
from telechat_mindie.checkpoint.source import open_checkpoint
from telechat_mindie.config import TelechatConfig
from telechat_mindie.engine.local import open_local
from telechat_mindie.engine.params import GenerationParams
from telechat_mindie.kv_budget import RESERVED_BLOCKS
from telechat_mindie.model_dir.build import BuildOptions, build
from telechat_mindie.nano import write_checkpoint
from telechat_mindie.text.tokenizer import TelechatTokenizer

QUESTIONS = (
    *("生抽与老抽的区别？", "酱油是怎么做的？", "红烧肉怎么做？", "凉拌菜用生抽还是老抽？"),
    *("What is soy sauce?", "def add(a, b):"),  # which telechat2-nano has never seen
)
SIZES = {
    "architectures": ["TelechatForCausalLM"],
    "model_type": "telechat",
    "vocab_size": 2400,
    "hidden_size": 128,
    "n_layer": 3,
    "n_head": 4,
    "ffn_hidden_size": 192,
    "layer_norm_epsilon": 1e-5,
    "seq_length": 256,
    "training_seqlen": 64,
    "base_seqlen": 64,
}
MADE: dict[str, dict[str, Any]] = {
    "mha": {"training_seqlen": 256, "base_seqlen": 256},
    "theta": {
        **dict.fromkeys(("seq_length", "training_seqlen", "base_seqlen", "max_position_embeddings"), 1024),
        "num_key_value_heads": 2,
        **{"rope_theta": 1000000, "rope_scaling": {"factor": 1.0, "rope_type": "dynamic"}},  # as the 7B-32K says it
    },
    "ntk": {"base_seqlen": 16},
    "moe": {"num_local_experts": 8, "num_experts_per_tok": 3},
}
"""Models of random weights, by what of TeleChat2 they have."""

TOKENS = ("<_start>", "<_end>", "<_pad>", "<_user>", "<_bot>", "<_system>", "", "")  # ids from 1 on
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
ADDED = {str(index): {"content": name, "special": True} for index, name in enumerate(TOKENS + TAGS, 1) if name}
"""What the tokenizer_config.json of 3B and 7B adds, which `theta` has too."""

NEW_TOKENS = 48
LENGTHS = (1, 5, 12, 20, 31)  # of prompts of random ids: within every fixture's trained length
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": QUESTIONS[0]}]},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " hi\n"}]},
    {
        "messages": [
            {"role": "user", "content": "北京天气？"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": "北京"}}}],
            },
            {"role": "tool", "content": "晴，25 度"},
            {"role": "assistant", "content": "今天晴。"},
            {"role": "user", "content": "谢谢"},
        ],
        "tools": TOOLS,
    },
]


def main(work: Path, fixtures: Path | None) -> None:
    write_checkpoint(work / "nano")
    sources = {"nano": work / "nano"}
    for name, changes in MADE.items():
        sources[name] = make_checkpoint(work / name, work / "nano", SIZES | changes)
    if fixtures:
        sources |= {path.parent.name: path for path in sorted(fixtures.glob("*/ckpt"))}
    expected: dict[str, Any] = {"tokenizers": {}, "models": {}}
    for name, checkpoint in sources.items():
        source = open_checkpoint(checkpoint)
        to_hugging_face(source, work / f"{name}-hf", OutputOptions())
        if not source.config.is_moe:
            to_llama(source, work / f"{name}-llama", OutputOptions())
        dtypes = ("float32", "bfloat16") if name == "nano" else ("float32",)
        expected["models"][name] = {dtype: answers(work, name, checkpoint, dtype) for dtype in dtypes}
    # The same weights by way of a model directory of two ranks, and of one MindSpore file.
    build(work / "nano-tp2", work / "nano", BuildOptions(tp=2))
    to_hugging_face(open_checkpoint(work / "nano-tp2"), work / "nano-from-model-directory", OutputOptions())
    to_mindspore(open_checkpoint(work / "nano"), work / "nano.ckpt", MindSporeForm(container="ckpt"))
    to_hugging_face(open_checkpoint(work / "nano.ckpt", work / "nano"), work / "nano-from-ckpt", OutputOptions())
    for name in ("nano", "theta"):
        tokenizer = TelechatTokenizer.from_pretrained(work / name)
        chats = []
        for chat in CHATS:
            ids = tokenizer.apply_chat_template(chat["messages"], chat.get("tools"), add_generation_prompt=True)
            chats.append({**chat, "ids": ids})
        written = [{"text": text, "ids": tokenizer.encode(text)} for text in texts(tokenizer)]
        expected["tokenizers"][name] = {"texts": written, "chats": chats}
    (work / "expected.json").write_text(json.dumps(expected, ensure_ascii=False), encoding="utf-8")


def make_checkpoint(folder: Path, nano: Path, data: dict[str, Any]) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    arrays = {}
    for weight in weights(TelechatConfig.from_dict(data)).values():
        values = rng.standard_normal(weight.shape, dtype=np.float32) * 0.1
        arrays[weight.name] = values + (len(weight.shape) == 1)
    save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(data))
    shutil.copy(nano / "tokenizer.model", folder)
    if "rope_theta" in data:
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": ADDED}))
    return folder


def answers(work: Path, name: str, checkpoint: Path, dtype: str) -> list[dict[str, Any]]:
    """Greedy answers of the engine that `generate` runs, and in a .npz the logits behind each prompt."""
    build(work / f"{name}-{dtype}", checkpoint, BuildOptions(dtype=dtype))
    local = open_local(work / f"{name}-{dtype}")
    params = GenerationParams(max_new_tokens=NEW_TOKENS, logprobs=2)
    rng = np.random.default_rng(0)
    if name == "nano":
        turns = [[{"role": "user", "content": question}] for question in QUESTIONS]
        prompts = [local.tokenizer.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
    else:
        prompts = [rng.integers(400, local.directory.config.vocab_size, length).tolist() for length in LENGTHS]
    found, logits = [], {}
    for number, prompt in enumerate(prompts):
        outputs = list(local.engine.generate(prompt, params))
        tokens = [token for output in outputs for token in output.token_ids]
        places = [place for output in outputs for place in output.logprobs]
        # By how much each token was likelier than the next best.
        leads = [float(place.top[0][1] - place.top[1][1]) for place in places]
        text = "".join(output.text for output in outputs)
        found.append({"prompt": prompt, "answer": tokens, "leads": leads, "text": text})
        logits[str(number)] = last_logits(work / f"{name}-{dtype}", np.array(prompt))
    np.savez(work / f"{name}-{dtype}.npz", **logits)
    return found


def last_logits(model_path: Path, prompt: np.ndarray) -> np.ndarray:
    """[vocabulary] behind a prompt, from one prefill as MindIE calls it."""
    from telechat_mindie.backend.model_runner import ModelRunner

    block_size, length = 128, len(prompt)
    blocks = -(-length // block_size)
    runner = ModelRunner(str(model_path), 0, 0, block_size, num_blocks=blocks + RESERVED_BLOCKS)
    positions = np.arange(length, dtype=np.int32)
    result = runner.forward(
        input_ids=prompt,
        valid_length_each_example=np.array([length], np.int32),
        block_tables=np.arange(blocks, dtype=np.int32)[None],
        slot_mapping=positions,
        prefill=True,
        position_ids=positions,
        prefill_head_indices=np.array([length - 1]),
        key_cache=None,
        value_cache=None,
        adapter_ids=[None],
        spec_mask=None,
        q_seq_lens=None,
    )
    tensor = result[0] if isinstance(result, tuple) else result
    row: np.ndarray = np.asarray(tensor.asnumpy() if hasattr(tensor, "asnumpy") else tensor, np.float32)[0]
    return row


def texts(tokenizer: TelechatTokenizer) -> list[str]:
    """At least 400: words and characters of many kinds, and control and tool tokens among them."""
    draw = random.Random(0)
    pieces = [piece.replace("\u2581", " ") for piece in tokenizer.pieces()[0]]
    tokens = [*filter(None, TOKENS + TAGS)]
    written = [*QUESTIONS, "", " ", "  a  b ", "\n\t\r\n", "😀👍🏽 e\u0301", "x_1__2___3____4", "\u3000全角", "<0x0A>"]
    while len(written) < 500:
        kinds = (draw.choice(pieces), draw.choice(tokens), chr(draw.randrange(0x4E00, 0x9FA5)))
        others = (chr(draw.randrange(32, 0x250)), chr(draw.randrange(0x1F300, 0x1F650)), " " * draw.randrange(3))
        written.append("".join(draw.choice(kinds + others) for _ in range(draw.randrange(1, 20))) + draw.choice(pieces))
    return written


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
