"""Stands in for mindformers where MindIE's workers find none: the two names that MindIE imports from it, and no other.

MindIE-LLM v3.0.0.beta.2 imports `ModelRunner` in mindie_llm/modeling/model_wrapper/ms/mf_model_wrapper.py and
`get_model` in mf_tokenizer_wrapper.py. `telechat-mindie launch` puts the folder above first on the workers' PYTHONPATH;
without that, `import mindformers` never finds this package.
"""

from __future__ import annotations

from typing import Any

from telechat_mindie.backend.get_model import get_model

__all__ = ["ModelRunner", "get_model"]


def __getattr__(name: str) -> Any:
    """ModelRunner, imported on first use: MindIE's tokenizer processes need get_model alone, and no MindSpore."""
    if name == "ModelRunner":
        from telechat_mindie.backend.model_runner import ModelRunner

        return ModelRunner
    raise AttributeError(
        f"module 'mindformers' has no attribute {name!r}: it is telechat_mindie's stand-in with "
        "ModelRunner and get_model only; install mindformers for the rest"
    )


def __dir__() -> list[str]:
    return __all__
