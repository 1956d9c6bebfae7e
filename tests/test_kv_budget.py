"""The one account of a card's memory: whoever counts blocks, tokens and sequences comes to the same numbers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from telechat_mindie.checkpoint.mapping import mindformers_targets
from telechat_mindie.checkpoint.plan import make_plan
from telechat_mindie.cli import app
from telechat_mindie.errors import InputError
from telechat_mindie.kv_budget import RESERVED_BLOCKS, CacheShape, CardBudget, block_count
from telechat_mindie.model_dir.build import BuildOptions, build
from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.nano import write_checkpoint
from telechat_mindie.server.host import num_blocks
from telechat_mindie.server.settings import plain_settings
from telechat_mindie.service.check import CheckOptions, check_config
from telechat_mindie.service.facts import model_facts
from telechat_mindie.service.options import ModelFacts, ServiceOptions
from telechat_mindie.service.render import render_service_config
from telechat_mindie.units import GB
from telechat_mindie.variants import VARIANTS

LENGTH = 8192
PLAN = ("plan", "--no-probe", "--max-seq-len", LENGTH)


def command(*arguments: object) -> Any:
    """What a command prints with --json; its error where it refuses."""
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    if isinstance(done.exception, InputError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def service_account(facts: ModelFacts, card: float) -> tuple[int, int, int]:
    """npuMemSize, tokens and longest sequences, as `service-config` reckons."""
    options = ServiceOptions(device_mem_gb=card, request_tokens=facts.max_seq_len)
    decided = {entry.location[-1]: entry for entry in render_service_config(facts, options, lambda _: True).derived}
    batch = decided["maxBatchSize"]
    match = re.match(r"(\d+) KV blocks / (\d+)", batch.reason)
    assert match is not None
    blocks, longest = int(match[1]), int(match[2])
    return decided["npuMemSize"].value, blocks * facts.block_size, blocks // longest


def facts_of(variant: str, tp: int) -> ModelFacts:
    """The facts of a model directory that nobody has room to build here."""
    config = VARIANTS[variant]
    dtype = "bfloat16" if config.is_moe else "float16"
    targets = mindformers_targets(config, qkv_concat=True, transposed_experts=config.is_moe)
    plan = make_plan(config, targets, dtype, tp)
    per_token = config.kv_bytes_per_token(dtype, tp)
    return ModelFacts(variant, f"/models/{variant}", tp, LENGTH, 128, plan.rank_bytes, per_token, config.vocab_size)


@pytest.mark.parametrize("card", [24, 32, 64])
@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_plan_and_service_config_agree_to_the_token(variant, tp, card):
    arguments = (*PLAN, "--variant", variant, "--tp", tp, "--device-mem", card)
    facts = facts_of(variant, tp)
    try:
        expected = service_account(facts, card)
    except InputError as error:
        fit = command(*arguments)["fit"]
        assert not fit["fits"] and "does not hold the weights and the KV cache" in fit["refusal"], str(error)
        return
    planned = command(*arguments)
    assert planned["rank_bytes"] == facts.weight_bytes_per_rank
    fit = planned["fit"]
    assert (fit["npu_mem_gb"], fit["kv_tokens"], fit["sequences"]) == expected


@pytest.mark.parametrize(
    ("variant", "tp", "card", "name", "value"),
    [("7b", 1, 32, "sequences", 2), ("115b", 8, 64, "sequences", 63), ("3b", 1, 64, "kv_tokens", 163_712)],
)
def test_what_plan_once_promised_too_much_of(variant, tp, card, name, value):
    fit = command(*PLAN, "--variant", variant, "--tp", tp, "--device-mem", card)["fit"]
    assert fit[name] == value


def test_plan_info_service_config_server_and_runner_agree_on_a_real_directory(tmp_path: Path):
    write_checkpoint(tmp_path / "ckpt")
    build(tmp_path / "model", tmp_path / "ckpt", BuildOptions(max_seq_len=1000))
    directory = ModelDir.open(tmp_path / "model")
    facts = model_facts(directory)
    plan = ("plan", "--checkpoint", tmp_path / "ckpt", "--max-seq-len", 1000, "--device-mem", 32, "--no-probe")
    fit = command(*plan)["fit"]
    size, tokens, sequences = service_account(facts, 32)
    assert (fit["npu_mem_gb"], fit["kv_tokens"], fit["sequences"]) == (size, tokens, sequences)
    info = command("info", tmp_path / "model", "--kv-gb", size)
    assert (info["kv_tokens"], info["kv_sequences"]) == (tokens, sequences)
    assert sequences == tokens // 1024  # a sequence of 1,000 tokens takes eight whole blocks

    settings = plain_settings(directory).with_flags(None, None, 0.001)
    shape = CacheShape(facts.kv_bytes_per_token_per_rank, facts.block_size)
    assert num_blocks(directory, settings) == shape.blocks_in(int(0.001 * GB))
    assert block_count(size, shape.token_bytes, shape.block_size, "npu_mem_size") == tokens // 128 + RESERVED_BLOCKS


@pytest.mark.parametrize("size", [None, -1, 1, 20, 45, 60])
@pytest.mark.parametrize("card", [16, 20, 32, 64])
@pytest.mark.parametrize(("variant", "tp"), [("7b", 1), ("35b", 1), ("115b", 8)])
def test_check_refuses_what_service_config_refuses(variant, tp, card, size):
    """Size None: the one that `service-config` computes."""
    facts = facts_of(variant, tp)
    large = ServiceOptions(device_mem_gb=1000, insecure_http=True)
    config = render_service_config(facts, large, lambda _: True).config  # where none fits, that of another card
    if size is not None:
        config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]["npuMemSize"] = size
    chosen = () if size is None else (f"npuMemSize={size}",)
    try:
        options = replace(large, device_mem_gb=card, overrides=chosen)
        config = render_service_config(facts, options, lambda _: True).config
        refused = False
    except InputError:
        refused = True
    checked = CheckOptions(device_mem_gb=card, environment={"PATH": ""})
    found = {finding.id for finding in check_config(config, Path("conf.json"), facts, checked)}
    assert bool(found & {"memory", "kv-blocks"}) == refused


@pytest.mark.parametrize("card", [24, 32, 64])
def test_the_block_size_that_is_set_is_the_one_that_is_counted_with(card):
    facts = facts_of("7b", 1)
    options = ServiceOptions(device_mem_gb=card, overrides=("cacheBlockSize=16",), request_tokens=LENGTH)
    decided = {entry.location[-1]: entry for entry in render_service_config(facts, options, lambda _: True).derived}
    shape = CacheShape(facts.kv_bytes_per_token_per_rank, 16)
    blocks = shape.usable_blocks_in(decided["npuMemSize"].value * GB)
    assert decided["maxBatchSize"].reason.startswith(f"{blocks} KV blocks / {LENGTH // 16} for")


shapes = st.builds(CacheShape, st.integers(64, 1 << 20), st.sampled_from([1, 16, 128, 200]))
sizes = st.none() | st.just(-1) | st.integers(1, 150)


@given(shapes, st.integers(1, 1 << 15), st.floats(8, 128), st.integers(0, 90 * GB), st.none() | st.floats(0, 7), sizes)
def test_what_fits_fits_and_no_more_does(shape, longest, card, weight_bytes, reserve, size):
    budget = CardBudget.of(card, weight_bytes, 131_072, reserve)
    chosen = size not in (None, -1, budget.cache)
    try:
        room = budget.room(shape, longest, size)
    except InputError as refusal:
        if chosen and budget.weights + size > card:
            assert "beside the weights" in str(refusal) and "card of at least" not in str(refusal)
        elif chosen:
            # The size that the message asks for holds one sequence on a card that is large enough, and none less does.
            least = re.search(r"npuMemSize of at least (\d+)", str(refusal))
            assert least is not None and size < int(least[1])
            large = CardBudget.of(1e6, weight_bytes, 131_072, reserve)
            assert large.room(shape, longest, int(least[1])).sequences >= 1
            with pytest.raises(InputError):
                large.room(shape, longest, int(least[1]) - 1)
        else:
            # So does the card that it asks for, and none that is more than the rounding smaller.
            least = re.search(r"card of at least ([\d.]+) GB", str(refusal))
            assert least is not None and float(least[1]) >= card
            enough = CardBudget.of(float(least[1]), weight_bytes, 131_072, reserve)
            assert enough.room(shape, longest, size).sequences >= 1
            smaller = float(least[1]) - 0.11
            if smaller > (reserve or 0):
                with pytest.raises(InputError):
                    CardBudget.of(smaller, weight_bytes, 131_072, reserve).room(shape, longest, size)
        return
    cache = (budget.cache if size is None else budget.left if size == -1 else size) * GB
    assert (room.blocks + RESERVED_BLOCKS) * shape.block_bytes <= cache
    assert (room.blocks + RESERVED_BLOCKS + 1) * shape.block_bytes > cache
    assert room.sequences * shape.blocks_for(longest) <= room.blocks < (room.sequences + 1) * shape.blocks_for(longest)
    if chosen:
        assert budget.weights + size <= card  # the reserve is the user's to spend
    else:
        assert budget.reserve + budget.weights + budget.logits + cache / GB <= card + 1e-9


def test_a_reserve_in_gb_stays_what_it_is_on_a_larger_card():
    budget = CardBudget.of(64, 5 << 20, 2400, 63.5)
    with pytest.raises(InputError, match=r"card of at least 64\.6 GB"):
        budget.room(CacheShape(1024, 128), 1024)


@pytest.mark.parametrize(("card", "reserve"), [(0, None), (-1, None), (float("nan"), None), (32, 32), (32, -1)])
def test_a_card_without_memory(card, reserve):
    with pytest.raises(InputError, match="reserve less than the card"):
        CardBudget.of(card, 0, 1, reserve)


def test_memory_that_holds_no_block():
    with pytest.raises(InputError, match="too small for one block"):
        block_count(1, GB, 128, "npu_mem_size")
