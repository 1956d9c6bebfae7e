"""Run in a process of its own by `check`: imports a directory's modules and runs its tokenizer, as MindIE would.

`python -m telechat_mindie.service.check.probe MODEL_PATH module.Class ...` prints one JSON object.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from telechat_mindie.errors import InputError
from telechat_mindie.model_dir.modules import OWN_RUNNER
from telechat_mindie.text.trial import QUESTION, TOOLS, TURN

RUNNER = f"{OWN_RUNNER}.MindIEModelRunner"


def probe(model_path: str, names: list[str]) -> dict[str, Any]:
    """`imports`: what each name failed with; `tokenizer`: what it made of a question, or `error`.

    Any exception is the outcome of a probe, whatever the code of the directory or of an installed package raises.
    """
    imports: dict[str, str] = {}
    for name in (*names, RUNNER):
        try:
            module, _, attribute = name.rpartition(".")
            if name == RUNNER:
                getattr(importlib.import_module(module), attribute)
            else:
                _load(Path(model_path), module, attribute)
        except Exception as failure:
            imports[name] = f"{type(failure).__name__}: {failure}"
    try:
        tokenizer = _run_tokenizer(model_path)
    except Exception as failure:
        tokenizer = {"error": str(failure)}
    return {"imports": imports, "tokenizer": tokenizer}


def _load(directory: Path, module: str, attribute: str) -> None:
    """Run a module's source. The directory does not go on sys.path, nor is bytecode read: either would let other files
    in it run."""
    path = directory / f"{module}.py"
    namespace: dict[str, Any] = {"__name__": module, "__file__": str(path)}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), namespace)
    namespace[attribute]


def _run_tokenizer(model_path: str) -> dict[str, Any]:
    """The calls of MindIE-LLM v3.0.0.beta.2 mindie_llm/tokenizer/tokenizer.py and
    mindie_llm/modeling/model_wrapper/ms/mf_tokenizer_wrapper.py, in their form."""
    import numpy as np

    from telechat_mindie.backend.get_model import get_model

    tokenizer, builder = get_model(model_path)
    plain = tokenizer([QUESTION], return_tensors="np")["input_ids"][0].tolist()
    chat = builder.make_context(0, TURN, chat_template_kwargs={})
    with_tools = ""
    try:
        builder.make_context(0, [*TURN, {"role": "tools_call", "tools": TOOLS, "content": ""}])
    except InputError as failure:
        with_tools = str(failure)
    return {
        "pieces": tokenizer.vocab_size,
        "plain": plain,
        "chat": chat,
        "prompt": tokenizer.apply_chat_template(TURN, add_generation_prompt=True, tokenize=False),
        "with_tools": with_tools,
        "decoded": tokenizer.decode(np.array(chat), skip_special_tokens=True),
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # whatever the imports print
        outcome = probe(sys.argv[1], sys.argv[2:])
    print(json.dumps(outcome))
