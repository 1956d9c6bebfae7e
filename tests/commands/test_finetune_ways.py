"""`finetune` and `finetune --render mindformers`: one command, and no option of the one is passed over by the other."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from telechat_mindie.cli import app
from telechat_mindie.errors import InputError


def finetune(*arguments):
    return CliRunner().invoke(app, ["finetune", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--render", "mindformers", "--variant", "7b", "--eval-share", "0.1"), "--eval-share: has no meaning with"),
        (
            ("--render", "mindformers", "--variant", "7b", "--warmup", 5, "--resume"),
            "--warmup, --resume: has no meaning",
        ),
        (("ckpt", "rows", "-o", "run", "--pp", 2), "--pp: is for --render mindformers"),
        (("--variant", "7b", "rows", "-o", "run"), "--variant: is for --render mindformers"),
        (("--render", "megatron", "--variant", "7b"), "--render: is unknown (expected mindformers, found megatron)"),
        (("--render", "mindformers", "--variant", "7b", "--epochs", 1.5), "--epochs: is no whole number"),
        (("--render", "mindformers", "--variant", "7b", "a", "b"), "DATA: takes one folder or file of rows"),
        (("--render", "mindformers", "ckpt", "--variant", "7b", "-o", "x"), "ckpt"),  # then it is DATA
        (
            ("--render", "mindformers", "--variant", "7b", "--max-length", 0),
            "--max-length: does not suit flash attention (expected a multiple of 16, found 0)",
        ),
        ((), "MODEL: is missing"),
        (("ckpt",), "DATA: is missing"),
        (("ckpt", "rows"), "-o: is missing"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, words):
    refused = finetune(*arguments).exception
    assert isinstance(refused, InputError) and words in str(refused)


def test_names_of_modules_are_the_same_for_both():
    done = finetune("--render", "mindformers", "--variant", "7b", "--lora", "8,16,query+key_value", "--json")
    assert done.exit_code == 0, done.exception
    found = json.loads(done.stdout)
    assert found["proposals"] and found["files"] == []
    whole = json.loads(finetune("--render", "mindformers", "--variant", "7b", "--json").stdout)
    assert found["proposals"][0]["peak_bytes"] < whole["proposals"][0]["peak_bytes"]
