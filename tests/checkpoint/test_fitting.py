"""What `plan` says of cards: the table, the smallest that fits, and the disk that is left alone."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from telechat_mindie.checkpoint.fitting import CARD_SIZES, USUAL_TP, Fitting, smallest
from telechat_mindie.checkpoint.mapping import mindformers_targets
from telechat_mindie.checkpoint.plan import make_plan
from telechat_mindie.cli import app
from telechat_mindie.kv_budget import RESERVED_BLOCKS
from telechat_mindie.units import GB
from telechat_mindie.variants import VARIANTS


def plan(*arguments):
    done = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.stdout


def table(variant, tp=1, longest=8192, cards=CARD_SIZES):
    config = VARIANTS[variant]
    targets = mindformers_targets(config, qkv_concat=True, transposed_experts=config.is_moe)

    def rank_bytes(ranks):
        return make_plan(config, targets, "float16", ranks).rank_bytes

    return Fitting(config, "float16", 128, longest, rank_bytes, config.allowed_tp()).table(tp, cards)


@pytest.mark.parametrize(("variant", "tp", "card"), [("3b", 1, 32), ("7b", 1, 32), ("35b", 2, 64), ("115b", 8, 64)])
def test_the_smallest_that_fits(variant, tp, card):
    found = smallest(table(variant))
    assert (found.tp, found.card) == (tp, card)
    # By hand: what is left of the card, in whole GB, over the bytes of a block; one block is reserved.
    config = VARIANTS[variant]
    left = int(card * 0.8 - found.rank_bytes / GB - 200 * config.vocab_size * 4 / GB)
    block = config.kv_bytes_per_token("float16", tp) * 128
    blocks = left * GB // block - RESERVED_BLOCKS
    assert found.room.tokens == blocks * 128 and found.room.sequences == blocks // 64


def test_every_number_of_cards_that_the_model_allows():
    rows = table("7b", tp=16)
    assert [row[0].tp for row in rows] == [*USUAL_TP, 16] and all([fit.card for fit in row] == [32, 64] for row in rows)
    assert [row[0].tp for row in table("3b")] == [1, 2, 4, 8]
    weights = [row[0].rank_bytes for row in rows]
    assert weights == sorted(weights, reverse=True)


def test_nothing_fits():
    rows = table("115b", cards=(16,))
    assert smallest(rows) is None and str(rows[0][0]) == "too small" and rows[0][0].refusal
    few = table("7b", longest=32768)[0][0]
    assert str(few).endswith("tokens, too few") and few.room.tokens > 0 and not few.as_dict()["fits"]
    said = plan("--variant", "115b", "--max-seq-len", 10**6)
    assert "none of these holds one sequence of 1,000,000 tokens" in " ".join(said.replace("│", " ").split())


def test_for_people(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    said = plan("--variant", "7b", "--max-seq-len", 8192)
    assert "smallest that fits │ 1 x 32 GB: " in said and "32 GB cards" in said and "64 GB cards" in said
    assert "GiB" in said and "bytes" not in said
    assert plan("--variant", "115b", "--tp", 8).count("safetensors") == 9  # of 65 files, and how many more


def test_for_programs():
    facts = json.loads(plan("--variant", "7b", "--device-mem", 24, "--max-seq-len", 8192, "--json"))
    keys = ["tp", "device_bytes", "rank_bytes", "reserve_bytes", "fits", "npu_mem_gb", "kv_tokens", "sequences"]
    assert len(facts["cards"]) == 4 * 3
    assert all(list(entry) == [*keys, "refusal"] for entry in (*facts["cards"], facts["fit"], facts["smallest"]))
    assert facts["fit"] in facts["cards"] and facts["smallest"] in facts["cards"]
    assert all(entry["fits"] == (entry["refusal"] is None) == (entry["sequences"] > 0) for entry in facts["cards"])


def test_the_disk_is_measured_only_where_that_is_asked(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("telechat_mindie.checkpoint.estimate.probe_disk", lambda folder: asked.append(folder) or 1e9)
    for flags, expected in (((), []), (("--no-probe",), []), (("--probe",), [tmp_path])):
        facts = json.loads(plan("--variant", "3b", "--target", tmp_path, "--json", *flags))
        assert asked == expected and ("estimated_seconds" in facts) == bool(expected)
        assert facts["disk_free_bytes"] > 0
