"""TeleChat2 on Ascend with MindIE: build a model directory, check it, serve it.

The two names MindIE asks a backend for, `ModelRunner` and `get_model`, are imported on first use, so that importing
the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from telechat_mindie.backend.get_model import get_model as get_model
    from telechat_mindie.backend.model_runner import ModelRunner as ModelRunner

__version__ = "0.1.0"
__all__ = ["ModelRunner", "__version__", "get_model"]


def __getattr__(name: str) -> Any:
    if name == "ModelRunner":
        from telechat_mindie.backend.model_runner import ModelRunner

        return ModelRunner
    if name == "get_model":
        from telechat_mindie.backend.get_model import get_model

        return get_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
