"""The estimate of a run's memory against what a process of its own takes, and how its parts go with the sizes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from helpers.training import tiny_config

from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import ConfigError
from telechat_mindie.training.memory import estimate
from telechat_mindie.training.settings import Computation, Lora

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_layers": 1,
    "num_heads": 8,
    "ffn_size": 1280,
}
ROWS, LENGTH = 4, 256

RUN = """
import json, sys
import numpy as np
from telechat_mindie.config import TelechatConfig
from telechat_mindie.training.rows import Batch
from telechat_mindie.training.settings import Optimization
from telechat_mindie.training.trainer import Trainer
from telechat_mindie.training.weights import RankWeights, decoder_targets

config = TelechatConfig(**json.loads(sys.argv[1]))
read = lambda source, rows, columns: np.full((len(rows), len(columns)), 0.01, np.float32)
trainer = Trainer(config, RankWeights(decoder_targets(config), read), Optimization(1e-4, 10))
ids = np.full((int(sys.argv[2]), int(sys.argv[3]) + 1), 9, np.int32)
for _ in range(2):
    trainer.accumulate(Batch(ids, ids))
    trainer.update()
status = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
print("PEAK", int(status["VmHWM"].split()[0]) << 10)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [{}, {"ffn_size": 640, "num_experts": 8, "experts_per_token": 2}], ids=["dense", "moe"]
)
def test_a_process_takes_what_was_estimated(more):
    shape = SHAPE | more
    command = [sys.executable, "-c", RUN, json.dumps(shape), str(ROWS), str(LENGTH)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert "PEAK" in done.stdout, done.stderr[-2000:]
    peak = int(done.stdout.rpartition("PEAK")[2])
    assert estimate(TelechatConfig(**shape), ROWS, LENGTH).total == pytest.approx(peak, rel=0.1)


def test_parts_of_a_full_run():
    config = TelechatConfig(**SHAPE)
    found = estimate(config, ROWS, LENGTH)
    trained = config.parameter_count * 4
    assert (found.weights, found.masters, found.moments) == (0, trained, 2 * trained)
    assert found.total == sum(found.parts().values())
    assert estimate(config, 2 * ROWS, LENGTH).logits == 2 * found.logits
    assert estimate(config, ROWS, 4 * LENGTH).activations > 4 * found.activations  # scores grow with the square


def test_ranks_share():
    config = TelechatConfig(**SHAPE)
    whole = estimate(config, ROWS, LENGTH)
    half = estimate(config, ROWS, LENGTH, Computation(dp=2))
    assert (half.masters, half.activations, half.logits) == (whole.masters, whole.activations // 2, whole.logits // 2)
    cut = estimate(config, ROWS, LENGTH, Computation(tp=2))
    assert cut.masters < 0.51 * whole.masters and cut.logits == whole.logits // 2
    with pytest.raises(ConfigError, match="cannot be split into that many ranks"):
        estimate(tiny_config(), 1, 8, Computation(tp=3))


def test_lora_and_bfloat16():
    config = TelechatConfig(**SHAPE)
    full = estimate(config, ROWS, LENGTH)
    lora = estimate(config, ROWS, LENGTH, lora=Lora(rank=8, targets=("query",)))
    assert lora.weights == full.masters and lora.masters == 8 * 2 * 512 * 4
    narrow = estimate(config, ROWS, LENGTH, Computation(dtype="bfloat16"))
    assert narrow.masters == full.masters and narrow.weights > 0


def test_tied_embeddings_are_one():
    apart, tied = (estimate(tiny_config(tie_word_embeddings=tie), 1, 8) for tie in (False, True))
    assert apart.masters - tied.masters == 40 * 16 * 4
