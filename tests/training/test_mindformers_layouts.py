"""Layouts of a finetune by mindformers: rules by name, memory by part, proposals by rule."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from telechat_mindie.errors import InputError, TelechatMindieError
from telechat_mindie.training.mindformers.layout import (
    Cluster,
    Layout,
    Lora,
    Work,
    as_yaml_offset,
    parse_offset,
)
from telechat_mindie.training.mindformers.memory import FULL, HALF, LOGITS, estimate, usable_bytes
from telechat_mindie.training.mindformers.propose import STAGE_LAYERS, Choice, propose
from telechat_mindie.training.mindformers.rules import check, faults
from telechat_mindie.units import GB
from telechat_mindie.variants import VARIANTS

PUBLISHED = {
    "7b": (Layout(dp=8, optimizer_shard=8, recompute="full"), 58),
    "35b": (Layout(tp=4, pp=4, micro_batches=32, offset=((-1, 1, 1, -1),), recompute="full"), 57),
    "115b": (
        Layout(
            dp=8,
            tp=8,
            pp=8,
            micro_batches=8,
            interleave=3,
            optimizer_shard=8,
            recompute="select",
            offset=((-1, -1, 0, 0, 0, 0, 0, 0), (-1, 0, 0, 0, 0, 0, 0, 0), (0, 0, 0, 1, 1, 1, 1, -1)),
        ),
        54.5,
    ),
    "39b-a12b": (Layout(dp=128, tp=4, pp=2, ep=2, micro_batches=4, optimizer_shard=2, recompute="full"), 53),
}
"""What mindformers' yamls say, and the GB of their memory pool."""


def cluster_of(layout: Layout, gb: float = 64) -> Cluster:
    return Cluster(max(1, layout.world // 8), min(8, layout.world), gb)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layouts_keep_the_rules_and_fit_their_pool(name):
    layout, pool = PUBLISHED[name]
    work = Work(VARIANTS[name], 8192)
    check(layout, work, cluster_of(layout))
    assert max(stage.total for stage in estimate(layout, work)) < pool * GB


DENSE, MOE = Layout(dp=2, tp=4, pp=2, micro_batches=8), Layout(dp=4, tp=2, pp=2, ep=2, micro_batches=8)
RIGHT = {"115b": DENSE, "35b": DENSE, "7b": DENSE, "39b-a12b": MOE}

WRONG = {
    "world": ("115b", {"dp": 4}, {}, r"dp 4 x tp 4 x pp 2 .*expected 16, 2 x 8, found 32"),
    "recipe": ("115b", {"dp": 1, "tp": 8, "pp": 8}, {}, r"expected 16, 2 x 8, found 64"),
    "zero": ("115b", {"dp": 0}, {}, r"--dp: is too small .*found 0"),
    "node": ("115b", {"tp": 16, "dp": 1, "pp": 1}, {}, r"--tp: .*over machines .*the 8 cards of one, found 16"),
    "heads": ("115b", {"tp": 3, "dp": 1, "pp": 2}, {"cards": 3}, r"one of 1, 2, 4, 8, found 3.*64 heads, 8 kv heads"),
    "kv heads": ("115b", {"tp": 16, "dp": 1, "pp": 1}, {"nodes": 1, "cards": 16}, r"found 16.*8 kv heads"),
    "ffn": ("7b", {"tp": 4}, {"config": {"ffn_size": 12290}}, r"feed-forward 12290"),
    "vocabulary": ("7b", {"tp": 4}, {"config": {"vocab_size": 131070}}, r"vocabulary 131070"),
    "stages": ("7b", {"pp": 32, "tp": 1, "dp": 1, "micro_batches": 32}, {"nodes": 4}, r"32 x 1 = 32, found 30"),
    "interleave": ("7b", {"interleave": 16}, {}, r"layers: are too few .*2 x 16 = 32, found 30"),
    "no stages": ("7b", {"pp": 1, "dp": 4, "interleave": 2}, {}, r"--interleave: needs stages .*found 2"),
    "offset length": ("35b", {"offset": ((1, 0, -1),)}, {}, r"--offset: has the wrong length .*1 x 2 .*found 1,0,-1"),
    "offset runs": ("35b", {"offset": ((0, 0),), "interleave": 2}, {}, r"2 x 2 numbers, one a stage, found 0,0"),
    "offset sum": ("35b", {"offset": ((1, 0),)}, {}, r"64 layers over 2 stages x 1 leave 0 .*expected 0, found 1"),
    "empty stage": ("35b", {"offset": ((-32, 32),)}, {}, r"leaves a stage without layers .*found 0"),
    "micro batches": ("35b", {"micro_batches": 1}, {}, r"--micro-batches: are fewer than the stages .*2, found 1"),
    "rows": ("35b", {}, {"rows": 15}, r"rows: are fewer .*1 x dp 2 x 8 micro batches.*at least 16, found 15"),
    "one card": (
        "7b", {"dp": 1, "tp": 1, "pp": 1}, {"nodes": 1, "cards": 1}, r"on a single card .*expected 1, found 8"
    ),
    "sequence": ("7b", {}, {"sequence_length": 8190}, r"--max-length: .*multiple of 16, found 8190"),
    "sequence tp": (
        "7b", {"tp": 32, "dp": 1, "pp": 1}, {"sequence_length": 8176, "cards": 32, "nodes": 1},
        r"multiple of tp 32, found 8176",
    ),
    "dense ep": ("7b", {"ep": 2}, {}, r"--ep: is for a model with experts .*found 2"),
    "ep dp": ("39b-a12b", {"ep": 3}, {}, r"--ep: does not divide dp .*divisor of 4, found 3"),
    "ep experts": (
        "39b-a12b", {"dp": 16, "ep": 16, "pp": 1, "tp": 2, "micro_batches": 1}, {"nodes": 4},
        r"ep 16 x tp 2 = 32 groups .*divisor of 16, found 32",
    ),
    "shard": ("7b", {"optimizer_shard": 4}, {}, r"--optimizer-shard: .*divisor of dp 2, found 4"),
    "shard experts": ("39b-a12b", {"optimizer_shard": 4}, {}, r"2 copies of an expert, dp / ep, found 4"),
    "dtype": ("7b", {}, {"dtype": "float16"}, r"--dtype: .*expected bfloat16, found float16.*loss scale"),
    "recompute": ("7b", {"recompute": "some"}, {}, r"--recompute: is unknown .*off or select or full, found some"),
    "tied": ("7b", {}, {"config": {"tie_word_embeddings": True}}, r"config.json: has tied embeddings"),
    "norm": ("7b", {}, {"config": {"embed_layernorm": True}}, r"has a norm after its embedding"),
    "lora experts": ("39b-a12b", {}, {"lora": Lora()}, r"adapts no experts .*wq, wk_v, wo, found w1, w2, w3"),
    "lora rank": ("7b", {}, {"lora": Lora(rank=0)}, r"LoRA: is out of range .*found rank 0"),
    "lora name": ("7b", {}, {"lora": Lora(targets=("w_qkv",))}, r"LoRA targets: .*found w_qkv"),
    "too many": ("7b", {"dp": 1024}, {"nodes": 1024}, r"are too many cards .*expected 4096, found 8192"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_layouts_are_refused_by_name(case):
    name, changes, others, sentence = WRONG[case]
    config = replace(VARIANTS[name], **others.get("config", {}))
    work = Work(
        config,
        others.get("sequence_length", 8192),
        others.get("lora"),
        others.get("dtype", "bfloat16"),
        others.get("rows"),
    )
    cluster = Cluster(others.get("nodes", 2), others.get("cards", 8), 64)
    layout = replace(RIGHT[name], **changes)
    found = [str(fault) for fault in faults(layout, work, cluster)]
    assert any(re.search(sentence, fault) for fault in found), found
    with pytest.raises(TelechatMindieError):
        check(layout, work, cluster)


def test_the_right_ones_are_right():
    for name, layout in RIGHT.items():
        check(layout, Work(VARIANTS[name], 8192, rows=32), Cluster(2, 8, 64))


def test_memory_is_what_the_shapes_say():
    """One card: every element four bytes, moments twice that, a layer and the logits by hand."""
    config = VARIANTS["7b"]
    (memory,) = estimate(Layout(recompute="full"), Work(config, 4096))
    assert memory.weights == config.weight_bytes("float32")
    assert memory.gradients == memory.weights
    assert memory.optimizer == 2 * memory.weights
    assert memory.computed == 0
    assert memory.logits == LOGITS * 4096 * config.vocab_size
    layers = config.num_layers * FULL * config.hidden_size * 4096
    working = memory.activations - layers
    kept = estimate(Layout(recompute="off"), Work(config, 4096))[0].activations
    per_layer = (kept - working) / config.num_layers
    assert 34 < per_layer / 4096 / config.hidden_size < 60  # bytes a token and channel, as in published accounts


@pytest.mark.parametrize("shard", [2, 8])
def test_the_optimizer_parallel_divides_all_large_weights(shard):
    config = VARIANTS["7b"]
    alone = estimate(Layout(dp=8, recompute="full"), Work(config, 4096))[0]
    divided = estimate(Layout(dp=8, optimizer_shard=shard, recompute="full"), Work(config, 4096))[0]
    assert divided.weights == pytest.approx(alone.weights / shard, rel=0.001)
    assert divided.optimizer == 2 * divided.weights
    assert divided.computed == pytest.approx(HALF * config.parameter_count, rel=0.001)


def test_tensor_and_expert_parallel_divide_theirs():
    dense = VARIANTS["115b"]
    one, eight = (estimate(Layout(tp=tp, recompute="full"), Work(dense, 4096))[0] for tp in (1, 8))
    assert eight.weights == pytest.approx(one.weights / 8, rel=0.001)
    assert eight.logits == one.logits / 8
    moe = VARIANTS["39b-a12b"]
    every, half = (estimate(Layout(dp=4, ep=ep, recompute="full"), Work(moe, 4096))[0] for ep in (1, 2))
    experts = moe.num_layers * moe.num_experts * (3 * moe.hidden_size * moe.ffn_size + moe.hidden_size)
    assert every.weights - half.weights == FULL * experts / 2


def test_stages_hold_what_is_theirs():
    config = VARIANTS["35b"]
    layout = Layout(pp=4, micro_batches=16, recompute="full")
    stages = estimate(layout, Work(config, 4096))
    assert sum(stage.weights for stage in stages) == config.weight_bytes("float32")
    assert [stage.logits > 0 for stage in stages] == [False, False, False, True]
    assert stages[0].activations > stages[1].activations > stages[3].activations  # micro batches under way
    fewer = estimate(replace(layout, micro_batches=4, recompute="full"), Work(config, 4096))
    assert fewer[0].activations == stages[0].activations


def test_what_is_computed_again_is_not_kept():
    work = Work(VARIANTS["115b"], 8192)
    kept = [estimate(Layout(tp=8, recompute=recompute), work)[0].activations for recompute in ("off", "select", "full")]
    assert kept[0] > 1.3 * kept[1] > 1.3 * 1.3 * kept[2]


def test_an_adapter_needs_no_state_of_the_model():
    config, lora = VARIANTS["7b"], Lora(rank=8)
    (memory,) = estimate(Layout(recompute="full"), Work(config, 4096, lora))
    hidden, ffn = config.hidden_size, config.ffn_size
    factors = config.num_layers * 8 * (2 * 2 * hidden + (hidden + 2 * config.kv_size) + 3 * (hidden + ffn))
    assert memory.optimizer == 2 * FULL * factors
    embedding = config.vocab_size * hidden  # in float32 like the stream that comes of it
    assert memory.weights == HALF * (config.parameter_count + embedding) + FULL * factors


FIRST = {
    ("7b", 8): "dp 8, tp 1, pp 1",
    ("7b", 16): "dp 16, tp 1, pp 1",
    ("7b", 64): "dp 64, tp 1, pp 1",
    ("7b", 128): "dp 128, tp 1, pp 1",
    ("35b", 8): "2 such machines would do",
    ("35b", 16): "dp 1, tp 2, pp 8",
    ("35b", 64): "dp 8, tp 1, pp 8",
    ("35b", 128): "dp 16, tp 1, pp 8",
    ("115b", 8): "8 such machines would do",
    ("115b", 16): "8 such machines would do",
    ("115b", 64): "dp 2, tp 4, pp 8",
    ("115b", 128): "dp 4, tp 2, pp 16",
    ("39b-a12b", 8): "2 such machines would do",
    ("39b-a12b", 16): "dp 4, tp 2, pp 2, ep 4",
    ("39b-a12b", 64): "dp 16, tp 1, pp 4, ep 4",
    ("39b-a12b", 128): "dp 32, tp 1, pp 4, ep 4",
}


@pytest.mark.parametrize(("name", "cards"), FIRST)
def test_proposals_of_the_four_sizes(name, cards):
    work, cluster = Work(VARIANTS[name], 8192), Cluster(cards // 8, 8, 64)
    if not FIRST[name, cards].startswith("dp"):
        with pytest.raises(InputError, match=f"at most 57.6 GB of a card, found about .*{FIRST[name, cards]}"):
            propose(Choice(), work, cluster)
        return
    proposals = propose(Choice(), work, cluster)
    assert str(proposals[0].layout) == FIRST[name, cards]
    shallow = work.config.num_layers / STAGE_LAYERS
    order = [(p.layout.pp > shallow, p.layout.tp, p.layout.pp, p.layout.ep) for p in proposals]
    assert order == sorted(order)
    for proposal in proposals:
        check(proposal.layout, work, cluster)
        assert proposal.peak <= usable_bytes(cluster)


def test_smaller_cards_take_more_of_them():
    work = Work(VARIANTS["7b"], 8192)
    first = propose(Choice(), work, Cluster(1, 8, 32))[0]
    assert first.layout.tp > 1
    assert first.peak <= 0.9 * 32 * GB


def test_no_more_is_computed_again_than_needed():
    work, cluster = Work(VARIANTS["7b"], 8192), Cluster(16, 8, 64)
    for proposal in propose(Choice(), work, cluster):
        less = {"full": "select", "select": "off"}.get(proposal.layout.recompute)
        if less:
            stages = estimate(replace(proposal.layout, recompute=less), work)
            assert max(stage.total for stage in stages) > usable_bytes(cluster)


def test_what_is_fixed_stays():
    choice = Choice(tp=8, global_batch=64, recompute="full", interleave=2)
    for proposal in propose(choice, Work(VARIANTS["115b"], 8192), Cluster(8, 8, 64)):
        assert (proposal.layout.tp, proposal.layout.global_batch, proposal.layout.recompute) == (8, 64, "full")
    with pytest.raises(InputError, match="divisor of the 8 cards of one, found 3"):
        propose(Choice(tp=3), Work(VARIANTS["115b"], 8192), Cluster(8, 8, 64))
    with pytest.raises(InputError, match=r"--batch-size: .*a multiple of batch size 1 x dp 2, found 33"):
        propose(Choice(dp=2, tp=4, pp=8, global_batch=33), Work(VARIANTS["115b"], 8192), Cluster(8, 8, 64))
    (one,) = propose(Choice(global_batch=32, micro_batches=8, tp=4), Work(VARIANTS["35b"], 8192), Cluster(8, 8, 64))
    assert (one.layout.dp, one.layout.pp) == (4, 4)
    with pytest.raises(InputError, match=r"--batch-size: .*a multiple of batch size 3 x dp, found 32"):
        propose(Choice(global_batch=32, batch_size=3), Work(VARIANTS["115b"], 8192), Cluster(8, 8, 64))
    with pytest.raises(InputError, match=r"--batch-size: .*batch size 1 x dp 2 x 8 micro batches, found 32"):
        propose(
            Choice(dp=2, tp=4, pp=8, global_batch=32, micro_batches=8), Work(VARIANTS["115b"], 8192), Cluster(8, 8, 64)
        )


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        *((name, f"--{name}") for name in ("dp", "tp", "pp", "ep", "interleave")),
        ("micro_batches", "--micro-batches"),
        ("optimizer_shard", "--optimizer-shard"),
        ("global_batch", "--batch-size"),  # as the command calls them
        ("batch_size", "--micro-batch"),
    ],
)
def test_nothing_is_smaller_than_one(name, flag):
    with pytest.raises(InputError, match=f"^{flag}: is too small .*at least 1, found 0"):
        Choice(**{name: 0})


@pytest.mark.parametrize(
    ("numbers", "flag"), [((0, 8, 64), "--nodes"), ((1, 0, 64), "--cards"), ((1, 8, 0), "--device-mem")]
)
def test_a_cluster_has_something(numbers, flag):
    with pytest.raises(InputError, match=f"{flag}: is "):
        Cluster(*numbers)


def test_a_layout_that_does_not_fit_names_both_numbers():
    choice = Choice(dp=1, tp=8, pp=2, micro_batches=16)
    with pytest.raises(InputError, match=r"dp 1, tp 8, pp 2 takes least .*found about 1\d\d.\d GB.*--device-mem"):
        propose(choice, Work(VARIANTS["115b"], 8192), Cluster(2, 8, 64))


def test_few_rows_make_few_micro_batches():
    work, cluster = Work(VARIANTS["35b"], 8192, rows=70), Cluster(8, 8, 64)
    assert propose(Choice(dp=8, tp=1, pp=8), work, cluster)[0].layout.micro_batches == 8
    with pytest.raises(InputError, match="at least 64, found 63"):
        propose(Choice(dp=8, tp=1, pp=8), replace(work, rows=63), cluster)


def test_layers_that_are_left_over_go_to_the_middle():
    layout = Layout(pp=4)
    assert layout.offsets(30) == ((0, 1, 1, 0),)
    assert layout.stage_layers(30) == [[7, 8, 8, 7]]
    assert as_yaml_offset(layout.offsets(32)) == 0
    assert as_yaml_offset(layout.offsets(30)) == [0, 1, 1, 0]
    assert as_yaml_offset(Layout(pp=2, interleave=2).offsets(30)) == [[1, 1], [0, 0]]


def test_offsets_are_read():
    assert parse_offset("-1,1,1,-1") == ((-1, 1, 1, -1),)
    assert parse_offset(" -1, 0; 0, 1") == ((-1, 0), (0, 1))
    with pytest.raises(InputError, match=r"--offset: is no list of numbers .*found 1,x"):
        parse_offset("1,x")
