"""The forms in transformers beside what ours.py wrote: `in_transformers.py WORK`; exits with 1 where they differ."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

TOLERANCE = 1e-4
"""Of float32 logits."""


def compare_tokenizer(folder: Path, expected: dict[str, Any]) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    other, lost = [], []
    for case in expected["texts"]:
        ids = tokenizer.encode(case["text"], add_special_tokens=False)
        other += [case["text"]] if ids != case["ids"] else []
        lost += [case["text"]] if tokenizer.decode(case["ids"], skip_special_tokens=False) != case["text"] else []
    chats = 0
    for chat in expected["chats"]:
        options = {"add_generation_prompt": True, "tokenize": False}
        prompt = tokenizer.apply_chat_template(chat["messages"], tools=chat.get("tools"), **options)
        chats += tokenizer.encode(prompt, add_special_tokens=False) != chat["ids"]
    print(
        f"{folder.name}: of {len(expected['texts'])} texts {len(other)} have other ids, {len(lost)} do not come back;"
    )
    print(f"  of {len(expected['chats'])} chats {chats} have other ids")
    return [repr(text) for text in (*other, *lost)[:5]] + ["chats"] * bool(chats)


def compare_model(folder: Path, answers: list[dict[str, Any]], logits: Any) -> list[str]:
    """Logits behind each prompt, and greedy answers."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32).eval()
    farthest, other = 0.0, 0
    for number, answer in enumerate(answers):
        prompt = torch.tensor([answer["prompt"]])
        with torch.no_grad():
            farthest = max(farthest, np.abs(model(prompt).logits[0, -1].numpy() - logits[str(number)]).max())
        made = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(answer["answer"]),
            do_sample=False,
            repetition_penalty=1.0,
        )
        other += made[0, prompt.shape[1] :].tolist() != answer["answer"]
    print(f"{folder.name}: logits within {farthest:.1e}; of {len(answers)} greedy answers {other} differ")
    return [f"{folder.name} differs"] if farthest > TOLERANCE or other else []


def main(work: Path) -> int:
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    torch.set_num_threads(1)
    expected = json.loads((work / "expected.json").read_text(encoding="utf-8"))
    faults = []
    for form in ("hf", "llama"):
        for name, cases in expected["tokenizers"].items():
            faults += compare_tokenizer(work / f"{name}-{form}", cases)
        for name, by_dtype in expected["models"].items():
            folder = work / f"{name}-{form}"
            if not folder.exists():
                continue
            logits = np.load(work / f"{name}-float32.npz")
            answers = by_dtype["float32"]
            if form == "llama":  # which is right up to the trained length alone
                most = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
                answers = [a | {"answer": a["answer"][: max(1, most - len(a["prompt"]))]} for a in answers]
            faults += compare_model(folder, answers, logits)
    print("\n".join(faults) if faults else "all as ours")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
