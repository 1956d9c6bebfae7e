"""The forms in vLLM, compared with what ours.py wrote: `in_vllm.py WORK TP`. Exits with 1 where they differ."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import vllm

NANO = ("nano-hf", "nano-from-model-directory", "nano-from-ckpt", "nano-llama")


def answers_of(folder: Path, dtype: str, tp: int, answers: list[dict[str, Any]], chats: list[dict[str, Any]]) -> int:
    """How many greedy answers and chat prompts differ."""
    engine = vllm.LLM(
        model=str(folder),
        trust_remote_code=not folder.name.endswith("llama"),
        dtype=dtype,
        tensor_parallel_size=tp,
        enforce_eager=True,
        max_num_seqs=2,
        generation_config="vllm",  # its own defaults, not the file's repetition penalty
    )
    prompts = [{"prompt_token_ids": answer["prompt"]} for answer in answers]
    sampling = [vllm.SamplingParams(temperature=0, max_tokens=len(answer["answer"])) for answer in answers]
    other = 0
    for answer, made in zip(answers, engine.generate(prompts, sampling, use_tqdm=False), strict=True):
        same = list(made.outputs[0].token_ids) == answer["answer"]
        other += not same
        if not same:
            print(f"  {made.outputs[0].text!r} instead of {answer['text']!r}")
    one = vllm.SamplingParams(temperature=0, max_tokens=1)
    prompted = 0
    for chat in chats:
        made = engine.chat(chat["messages"], one, tools=chat.get("tools"), use_tqdm=False)
        prompted += list(made[0].prompt_token_ids) != chat["ids"]
    print(
        f"{folder.name}, {dtype}, tp {tp}: of {len(answers)} answers {other} differ, of {len(chats)} chats {prompted}"
    )
    del engine
    gc.collect()
    return other + prompted


def main(work: Path, tp: int) -> int:
    print(f"vLLM {vllm.__version__}")
    expected = json.loads((work / "expected.json").read_text(encoding="utf-8"))
    faults = 0
    for dtype, answers in expected["models"]["nano"].items():
        for name in NANO if tp == 1 else ("nano-hf", "nano-llama"):
            faults += answers_of(work / name, dtype, tp, answers, expected["chats"])
    for name, by_dtype in expected["models"].items() if tp == 1 else ():
        # vLLM has no experts for TeleChat2 and no Dynamic NTK; a Llama form has the latter's base up to its length.
        if name == "nano" or name.startswith("moe"):
            continue
        for form in ("llama",) if name.startswith("ntk") else ("hf", "llama"):
            folder = work / f"{name}-{form}"
            most = json.loads((folder / "config.json").read_text()).get("max_position_embeddings", 1 << 20)
            answers = [a | {"answer": a["answer"][: most - len(a["prompt"])]} for a in by_dtype["float32"]]
            faults += answers_of(folder, "float32", tp, [a for a in answers if a["answer"]], [])
    print("all as ours" if not faults else f"{faults} differ")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
