"""TeleChat2 on Ascend with MindIE: build a model directory, check it, serve it.

The public names are imported on first use, so that importing the package costs nothing. `ModelRunner` and `get_model`
are what MindIE asks a backend for; the modules of a built directory take `TelechatTokenizer` and `TelechatConfig`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from telechat_mindie.backend.get_model import get_model as get_model
    from telechat_mindie.backend.model_runner import ModelRunner as ModelRunner
    from telechat_mindie.config import TelechatConfig as TelechatConfig
    from telechat_mindie.text.tokenizer import TelechatTokenizer as TelechatTokenizer

__version__ = "0.3.0"
__all__ = ["ModelRunner", "TelechatConfig", "TelechatTokenizer", "__version__", "get_model"]

_HOMES = {
    "ModelRunner": "telechat_mindie.backend.model_runner",
    "TelechatConfig": "telechat_mindie.config",
    "TelechatTokenizer": "telechat_mindie.text.tokenizer",
    "get_model": "telechat_mindie.backend.get_model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
