"""`service-config` and `check` agree: on each generation's own file, and on every size, card and tp."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from telechat_mindie.checkpoint.mapping import mindformers_targets
from telechat_mindie.checkpoint.plan import make_plan
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import ConfigError, InputError, TelechatMindieError
from telechat_mindie.findings import Finding
from telechat_mindie.mindie import GENERATIONS
from telechat_mindie.nano import write_checkpoint
from telechat_mindie.service import schema
from telechat_mindie.service.check import CheckOptions, check_config
from telechat_mindie.service.options import ModelFacts, ServiceOptions
from telechat_mindie.service.render import render_service_config
from telechat_mindie.service.schema.rules_generation import missing_keys
from telechat_mindie.variants import VARIANTS

BETA = "3.0.0.beta"
SERVING = [name for name, row in GENERATIONS.items() if row.ms_backend]
SIZES = ("nano", *VARIANTS)
CARDS = (32, 64)
LENGTH = 8192  # of the released service examples
FITTING = {  # the tp of 1 to 8 at which a card holds the weights and a request: on 32 GB, on 64 GB
    "nano": ("1 2", "1 2"),
    "3b": ("1 2 4 8", "1 2 4 8"),
    "7b": ("1 2 4 8", "1 2 4 8"),
    "35b": ("4 8", "2 4 8"),
    "115b": ("", "8"),
    "39b-a12b": ("4 8", "2 4 8"),
}


@cache
def config_of(size: str) -> TelechatConfig:
    if size != "nano":
        return VARIANTS[size]
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder, "nano"))
        return TelechatConfig.from_directory(Path(folder, "nano"))


@cache
def facts_of(size: str, tp: int) -> ModelFacts | None:
    """What a directory of this size for tp ranks would say of itself; None where the heads cannot be shared so."""
    config = config_of(size)
    targets = mindformers_targets(config, qkv_concat=True, transposed_experts=config.is_moe)
    try:
        plan = make_plan(config, targets, "bfloat16", tp)
    except TelechatMindieError:
        return None
    return ModelFacts(
        model_name=size,
        model_path=f"/models/{size}",
        tp=tp,
        max_seq_len=min(LENGTH, config.seq_length),
        block_size=128,
        weight_bytes_per_rank=plan.rank_bytes,
        kv_bytes_per_token_per_rank=config.kv_bytes_per_token(plan.dtype, tp),
        vocab_size=config.vocab_size,
    )


def all_free(port: int) -> bool:
    return True


def found_in(config: dict[str, Any], facts: ModelFacts | None, generation: str, card: float = 64) -> list[Finding]:
    """What `check` has to say, but for the ports that something on this machine may hold."""
    options = CheckOptions(generation=generation, device_mem_gb=card, environment={})
    found = check_config(config, Path("conf.json"), facts, options)
    return [finding for finding in found if finding.severity != "ok" and finding.id != "port"]


@pytest.mark.parametrize("tp", range(1, 9))
@pytest.mark.parametrize("size", SIZES)
def test_they_agree_on_what_is_rendered(size: str, tp: int) -> None:
    """Where `service-config` renders, `check` has nothing to say for any generation; where it refuses, `check` does."""
    facts = facts_of(size, tp)
    for card, fitting in zip(CARDS, FITTING[size], strict=True):
        if str(tp) not in fitting.split():
            if facts is not None:
                refuse(facts, card)
            continue
        assert facts is not None
        for generation in SERVING:
            options = ServiceOptions(device_mem_gb=card, port_base=26025, generation=generation)
            rendered = render_service_config(facts, options, all_free)
            assert rendered.warnings == ()
            assert found_in(rendered.config, facts, generation, card) == [], (generation, card)
            rendered.config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]["npuMemSize"] = card
            assert found_in(rendered.config, facts, generation, card)[0].id == "memory"


def refuse(facts: ModelFacts, card: float) -> None:
    with pytest.raises(InputError, match=f"on a card of {card} GB"):
        render_service_config(facts, ServiceOptions(device_mem_gb=card, port_base=26025), all_free)
    great = ServiceOptions(device_mem_gb=4096, port_base=26025, dynamic_kv=True)
    config = render_service_config(facts, great, all_free).config
    assert [finding.id for finding in found_in(config, facts, BETA, card) if finding.severity == "error"] == ["memory"]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_they_agree_on_the_shipped_file(generation: str, tmp_path: Path) -> None:
    """It is clean; and it renders as a template to what is rendered without one."""
    shipped = schema.default_config(generation)
    assert found_in(shipped, None, generation) == []
    assert list(missing_keys(generation, shipped)) == []
    facts = facts_of("7b", 1)
    assert facts is not None
    path = tmp_path / "config.json"
    path.write_text(json.dumps(shipped, indent=4))
    results = []
    for template in (None, path):
        options = ServiceOptions(generation=generation, template=template, port_base=26025)
        try:
            results.append(render_service_config(facts, options, all_free).config)
        except ConfigError as failure:
            results.append(str(failure).partition(": ")[2])
    assert results[0] == results[1]
    # 3.0 can serve no directory for MindSpore, and both say so in one sentence.
    found = {finding.id for finding in found_in(with_ms(shipped), facts, generation) if finding.severity == "error"}
    assert ("ms-backend" in found) is not GENERATIONS[generation].ms_backend
    assert isinstance(results[0], dict) is GENERATIONS[generation].ms_backend


def with_ms(config: dict[str, Any]) -> dict[str, Any]:
    config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0] |= {"backendType": "ms", "npuMemSize": 8}
    return config
