"""What a service config needs to know of a model directory."""

from __future__ import annotations

import os
import re

from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.service.options import ModelFacts

FALLBACK_NAME = "telechat2"


def model_facts(directory: ModelDir) -> ModelFacts:
    """The facts of an opened model directory. Weights are counted for the fullest rank, as the manifest lists them."""
    path = os.path.abspath(directory.path)  # noqa: PTH100 - resolve() would follow a link
    return ModelFacts(
        model_name=model_name(os.path.basename(path)),  # noqa: PTH119
        model_path=path,
        tp=directory.tp,
        max_seq_len=directory.serving.max_seq_len,
        block_size=directory.serving.block_size,
        weight_bytes_per_rank=directory.rank_bytes,
        kv_bytes_per_token_per_rank=directory.config.kv_bytes_per_token(directory.serving.dtype, directory.tp),
        vocab_size=directory.config.vocab_size,
    )


def model_name(folder: str) -> str:
    """The folder's name with what MindIE refuses in a modelName replaced (MindIE-LLM v3.0.0.beta.2
    src/config_manager/model_deploy_config.cpp:438-448): letters, digits, `_.-`, a letter or digit at both ends."""
    return re.sub(r"[^a-zA-Z0-9_.-]", "-", folder)[:256].strip("_.-") or FALLBACK_NAME
