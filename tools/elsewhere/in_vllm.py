"""The forms in vLLM, compared with what ours.py wrote: `in_vllm.py WORK TP`. Exits with 1 where they differ."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import vllm

NEAR = {"float32": 1e-3, "bfloat16": 0.25}
"""A lead, in logarithms of probabilities, that another engine's rounding may turn round: a bfloat16 logit of 16 to 32
is a multiple of 1/8."""

MADE = {"mha": ("hf", "llama"), "theta": ("hf", "llama"), "ntk": ("llama",)}
"""Of ours.py's models those that vLLM takes, which has no experts for TeleChat2. Its kernels for CPUs take no heads of
16, as the fixtures have."""

NANO = ("nano-hf", "nano-from-model-directory", "nano-from-ckpt", "nano-llama")


def answers_of(folder: Path, dtype: str, tp: int, answers: list[dict[str, Any]], chats: list[dict[str, Any]]) -> int:
    """How many greedy answers and chat prompts differ, near ties aside."""
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
    other, near = 0, 0
    for answer, made in zip(answers, engine.generate(prompts, sampling, use_tqdm=False), strict=True):
        pairs = zip(made.outputs[0].token_ids, answer["answer"], strict=False)
        parted = next((at for at, (one, two) in enumerate(pairs) if one != two), None)
        if parted is not None:
            is_near = answer["leads"][parted] < NEAR[dtype]
            near, other = near + is_near, other + (not is_near)
            print(f"  {made.outputs[0].text!r} instead of {answer['text']!r}, lead {answer['leads'][parted]:.3f}")
    one = vllm.SamplingParams(temperature=0, max_tokens=1)
    prompted = 0
    for chat in chats:
        made = engine.chat(chat["messages"], one, tools=chat.get("tools"), use_tqdm=False)
        prompted += list(made[0].prompt_token_ids) != chat["ids"]
    print(
        f"{folder.name}, {dtype}, tp {tp}: of {len(answers)} answers {other} differ and {near} part at near ties, "
        f"of {len(chats)} chats {prompted} differ"
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
            faults += answers_of(work / name, dtype, tp, answers, expected["tokenizers"]["nano"]["chats"])
    for name, forms in MADE.items() if tp == 1 else ():
        for form in forms:
            folder = work / f"{name}-{form}"
            # No Dynamic NTK: vLLM goes as far as the plain embedding, and a Llama form to the trained length.
            most = 64 if name == "ntk" else 256
            answers = expected["models"][name]["float32"]
            cut = [answer | {"answer": answer["answer"][: most - len(answer["prompt"])]} for answer in answers]
            chats = expected["tokenizers"].get(name, {"chats": []})["chats"]
            faults += answers_of(folder, "float32", tp, cut, chats)
    print("all as ours" if not faults else f"{faults} differ")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
