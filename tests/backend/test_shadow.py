"""The stand-in for mindformers: found only where launch puts it, and exactly two names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.checkpoints import make_checkpoint

from telechat_mindie.model_dir.build import build
from telechat_mindie.service.launch.environment import SHADOW


def run(code, **variables):
    environment = {**os.environ, **variables}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment, cwd="/"
    )


def test_it_is_not_importable_by_accident():
    done = run("import importlib.util; print(importlib.util.find_spec('mindformers'))", PYTHONPATH="")
    if done.stdout.strip() != "None" and str(SHADOW) not in done.stdout:
        pytest.skip("the real mindformers is installed")
    assert done.stdout.strip() == "None"
    assert sorted(path.name for path in SHADOW.iterdir() if path.name != "__pycache__") == [
        "__init__.py",
        "mindformers",
    ]


def test_it_exports_exactly_two_names():
    code = (
        "import mindformers; print(mindformers.__file__); print(sorted(dir(mindformers)))\n"
        "names = {}; exec('from mindformers import *', names); print(sorted(n for n in names if n[:2] != '__'))\n"
        "try: from mindformers import AutoModel\n"
        "except ImportError as error: print(error)\n"
        "try: mindformers.pipeline\n"
        "except AttributeError as error: print(error)\n"
    )
    file, listed, star, failed, advice = run(code, PYTHONPATH=str(SHADOW)).stdout.splitlines()
    assert Path(file).parent == SHADOW / "mindformers"
    assert listed == star == "['ModelRunner', 'get_model']"
    assert "AutoModel" in failed and "install mindformers" in advice


def test_both_names_are_this_packages_own():
    code = (
        "import sys; from mindformers import get_model; import telechat_mindie.backend.get_model as entry\n"
        "print(get_model is entry.get_model, 'mindspore' in sys.modules)\n"
        "from mindformers import ModelRunner; import telechat_mindie.backend.model_runner as runner\n"
        "print(ModelRunner is runner.ModelRunner)\n"
    )
    done = run(code, PYTHONPATH=str(SHADOW))
    assert done.stdout.split() == ["True", "False", "True"], done.stderr


def test_it_serves_as_mindie_calls_it(tmp_path):
    """The calls of MindIE-LLM v3.0.0.beta.2 mf_model_wrapper.py:28-49 and mf_tokenizer_wrapper.py:14-36."""
    make_checkpoint(tmp_path / "ckpt", "float16")
    build(tmp_path / "model", tmp_path / "ckpt")
    code = (
        "from mindformers import ModelRunner, get_model; import numpy as np\n"
        f"path = {str(tmp_path / 'model')!r}\n"
        "tokenizer, builder = get_model(path)\n"
        "ids = builder.make_context(0, [{'role': 'user', 'content': 'hi'}], chat_template_kwargs={})\n"
        "runner = ModelRunner(model_path=path, npu_mem_size=1, cpu_mem_size=0, block_size=16, rank_id=0, world_size=1,"
        " npu_device_ids=[0], plugin_params=None)\n"
        "n = len(ids); blocks = -(-n // 16)\n"
        "logits = runner.forward(input_ids=np.array(ids), valid_length_each_example=np.array([n], np.int32),"
        " block_tables=np.arange(blocks, dtype=np.int32)[None], slot_mapping=np.arange(n, dtype=np.int32),"
        " prefill=True, position_ids=np.arange(n, dtype=np.int32), adapter_ids=[None],"
        " prefill_head_indices=np.array([n - 1]), key_cache=None, value_cache=None, spec_mask=None, q_seq_lens=None)\n"
        "print(logits.shape, runner.model_config.max_position_embedding)\n"
    )
    done = run(code, PYTHONPATH=str(SHADOW))
    assert done.stdout.strip().splitlines()[-1:] == ["(1, 512) 512"], done.stderr
