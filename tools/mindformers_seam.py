"""Asks telechat2-nano a question through the real mindformers' ModelRunner and get_model, as MindIE does.

python tools/mindformers_seam.py MODEL_PATH        (see tools/mindformers_seam.sh for the environment)
"""

from __future__ import annotations

import sys

import mindformers
import mindspore
import numpy as np
from mindformers import ModelRunner, get_model

BLOCK = 128
QUESTION = "生抽与老抽的区别？"


def main(model_path: str) -> None:
    runner = ModelRunner(
        model_path=model_path,
        npu_mem_size=1,
        cpu_mem_size=0,
        block_size=BLOCK,
        rank_id=0,
        world_size=1,
        npu_device_ids=[0],
        plugin_params=None,
    )
    tokenizer, input_builder = get_model(model_path)
    prompt = tokenizer([QUESTION], return_tensors="np")["input_ids"][0].tolist()
    chat = input_builder.make_context(0, [{"role": "user", "content": QUESTION}], chat_template_kwargs={})
    if prompt != chat:
        raise SystemExit("a bare prompt and a chat message gave different prompts")
    answer = generate(runner, prompt, runner.model_config.eos_token_id)
    print(f"mindformers {mindformers.__version__}, MindSpore {mindspore.__version__}")
    print(f"runner     {type(runner).__module__}.{type(runner).__name__}")
    print(f"tokenizer  {type(tokenizer).__module__}.{type(tokenizer).__name__}")
    print(f"builder    {type(input_builder).__module__}.{type(input_builder).__name__}")
    print(tokenizer.decode(np.array(answer), skip_special_tokens=True))


def generate(runner: ModelRunner, prompt: list[int], eos: int) -> list[int]:
    """A greedy answer, one sequence over two blocks."""
    blocks = np.array([[3, 1]], np.int32)
    tokens, done = np.array(prompt), 0
    answer: list[int] = []
    while len(answer) < 2 * BLOCK - len(prompt):
        positions = np.arange(done, done + len(tokens), dtype=np.int32)
        done += len(tokens)
        logits = runner.forward(
            input_ids=tokens,
            valid_length_each_example=np.array([done], np.int32),
            block_tables=blocks,
            slot_mapping=(blocks[0][positions // BLOCK] * BLOCK + positions % BLOCK).astype(np.int32),
            prefill=not answer,
            position_ids=positions,
            adapter_ids=[None],
            prefill_head_indices=None if answer else np.array([done - 1]),
            key_cache=None,
            value_cache=None,
            spec_mask=None,
            q_seq_lens=None,
        )
        answer.append(int(logits.asnumpy()[0].argmax()))
        if answer[-1] == eos:
            break
        tokens = np.array(answer[-1:])
    return answer


if __name__ == "__main__":
    main(sys.argv[1])
