"""The command from files to mindrecord: what the model is trained on, the account of it, and the recipe's own rows."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
import pytest
from helpers import ROOT
from helpers.tiny_tokenizer import write_tiny_checkpoint
from typer.testing import CliRunner

from telechat_mindie.cli import app
from telechat_mindie.data.conversations import Conversation
from telechat_mindie.data.encoding import Encoding, _batches, encode_records
from telechat_mindie.data.examples import encode
from telechat_mindie.data.packing import IGNORED, PADDING
from telechat_mindie.data.recipe import Markers, Recipe
from telechat_mindie.data.records import Record, read_records
from telechat_mindie.errors import InputError, TelechatMindieError
from telechat_mindie.text.chat_template import default_template
from telechat_mindie.text.tokenizer import TelechatTokenizer

RUNNER = CliRunner()
PAIRS = [
    ("生抽味道咸吗？", "咸。"),
    ("第一段<_end>第二段", "见 <_user> 和 <_bot>，<tool_call>"),
    ("老抽", "颜色深，味道微甜。"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"input": question, "output": answer}, ensure_ascii=False) for question, answer in PAIRS]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def run(*arguments, code=0):
    """The command's JSON, or its complaint."""
    result = RUNNER.invoke(app, ["preprocess", *map(str, arguments), "--json"])
    if code == 0:
        assert result.exit_code == 0, result.exception
        return json.loads(result.stdout)
    assert isinstance(result.exception, TelechatMindieError)
    return str(result.exception)


def rows_of(folder):
    from mindspore.mindrecord import FileReader

    rows = []
    for path in sorted(folder.glob("*.mindrecord")):
        reader = FileReader(str(path), columns=["input_ids", "labels"])
        rows += [(row["input_ids"], row["labels"]) for row in reader.get_next()]
        reader.close()
    return rows


def test_rows_are_the_templates_ids_and_train_the_answers(tmp_path, data, checkpoint):
    report = run(data, "-o", tmp_path / "out", "--tokenizer", checkpoint, "--max-length", 1000)
    tokenizer = TelechatTokenizer.from_pretrained(checkpoint)
    asked = []
    (token_ids, labels), *more = rows_of(tmp_path / "out")
    assert not more and token_ids.dtype == labels.dtype == np.int32 and len(token_ids) == len(labels) == 1001
    at = 0
    for question, answer in PAIRS:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(turns)
        asked.append(len(tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True)))
        assert token_ids[at : at + len(ids)].tolist() == ids
        # Serving gives the prompt; what must be said of it is the rest, up to the token that ends it.
        end = ids.index(tokenizer.eos_token_id) + 1
        assert (labels[at : at + asked[-1]] == IGNORED).all() and (labels[at + end : at + len(ids)] == IGNORED).all()
        assert labels[at + asked[-1] : at + end].tolist() == ids[asked[-1] : end]
        at += len(ids)
    assert (token_ids[at:] == PADDING).all() and (labels[at:] == IGNORED).all()
    assert report["tokens"] == at and report["examples"] == report["records"] == 3 and report["rows"] == 1
    assert report["trained_tokens"] == (labels != IGNORED).sum()
    assert token_ids.max() < len(tokenizer)


def test_last_trains_the_last_answer_alone(checkpoint):
    tokenizer = TelechatTokenizer.from_pretrained(checkpoint)
    turns = [{"role": role, "content": text} for role, text in zip(["user", "bot"] * 2, "abcd", strict=True)]
    every, last = (encode(tokenizer, Conversation(turns), which) for which in ("all", "last"))
    prompt = tokenizer.apply_chat_template(turns[:3], add_generation_prompt=True)
    end = last.token_ids.tolist().index(tokenizer.eos_token_id, len(prompt))
    assert last.trained.tolist() == [len(prompt) <= at <= end for at in range(len(last))]
    assert every.trained.sum() > last.trained.sum()


def test_a_template_that_frames_no_answers_is_refused(tmp_path):
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    checkpoint = write_tiny_checkpoint(tmp_path, chat_template=template)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(InputError, match="does not frame each answer"):
        encode(TelechatTokenizer.from_pretrained(checkpoint), Conversation(turns))


def test_long_examples_are_cut_or_dropped_and_named(tmp_path, data, checkpoint):
    tokenizer = TelechatTokenizer.from_pretrained(checkpoint)
    lengths = []
    for question, answer in PAIRS:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lengths.append(len(tokenizer.apply_chat_template(turns)))
    room = max(lengths) - 1
    cut = run(data, "-o", tmp_path / "cut", "--tokenizer", checkpoint, "--max-length", room - 1)
    assert (cut["cut"], cut["dropped"], cut["examples"], cut["longest"]) == (1, 0, 3, room + 1)
    dropped = run(
        data, "-o", tmp_path / "drop", "--tokenizer", checkpoint, "--max-length", room - 1, "--overflow", "drop"
    )
    assert (dropped["cut"], dropped["dropped"], dropped["examples"]) == (0, 1, 2)
    line = lengths.index(max(lengths)) + 1
    for folder, what in (("cut", "cut"), ("drop", "dropped")):
        entry = json.loads((tmp_path / folder / "left-out.jsonl").read_text())
        assert entry == {"where": f"{data}:{line}", "what": what, "tokens": room + 1}
    # Nothing of an answer is left: there is nothing to learn.
    assert "no row to train on" in run(
        data, "-o", tmp_path / "none", "--tokenizer", checkpoint, "--max-length", 8, code=2
    )


def test_bad_records_end_the_run_or_are_counted(tmp_path, data, checkpoint):
    with data.open("a") as file:
        file.write('\n{"input": "q", "output": 7}\n{"input": "q"')
    complaint = run(data, "-o", tmp_path / "out", "--tokenizer", checkpoint, code=2)
    assert f"{data}:4: output: is not a text" in complaint and "--skip-bad" in complaint
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]
    report = run(data, "-o", tmp_path / "out", "--tokenizer", checkpoint, "--skip-bad")
    assert report["bad"] == 2 and report["examples"] == 3
    faults = [json.loads(line) for line in (tmp_path / "out/left-out.jsonl").read_text().splitlines()]
    assert [fault["where"] for fault in faults] == [f"{data}:4", f"{data}:5"]


def test_two_runs_give_the_same_bytes_in_shards_by_size(tmp_path, data, checkpoint):
    arguments = (data, data, "--tokenizer", checkpoint, "--max-length", 200, "--shard-size", 0.001)
    many = tmp_path / "many.jsonl"
    many.write_bytes(data.read_bytes() + b"\n" + b"\n".join([data.read_bytes()] * 900))
    for folder in ("one", "two"):
        run(many, *arguments[1:], "-o", tmp_path / folder)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sum(name.endswith(".mindrecord") for name in names) > 1
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert (tmp_path / "one" / name).stat().st_mode & 0o777 == 0o640
    assert len(rows_of(tmp_path / "one")) == json.loads((tmp_path / "one/preprocess.json").read_text())["rows"]


def test_several_processes_give_the_examples_of_one(data, checkpoint, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    records = list(read_records(data)) * 200
    encoding = Encoding(checkpoint)
    one, two = (list(encode_records(encoding, records, size)) for size in (0, 1 << 30))
    assert len(two) == len(records)
    for first, second in zip(one, two, strict=True):
        assert first.where == second.where and np.array_equal(first.example.token_ids, second.example.token_ids)


def test_an_output_of_ours_is_replaced_only_when_told(tmp_path, data, checkpoint):
    arguments = (data, "-o", tmp_path / "out", "--tokenizer", checkpoint)
    run(*arguments)
    assert "--force" in run(*arguments, code=2)
    run(*arguments, "--force")


def test_show_marks_what_is_trained(tmp_path, data, checkpoint):
    arguments = ["preprocess", str(data), "-o", str(tmp_path / "out"), "--tokenizer", str(checkpoint)]
    result = RUNNER.invoke(app, [*arguments, "--show", "0"])
    assert result.exit_code == 0 and "<_bot>[咸。<_end>]" in result.stdout.replace("\n", "")
    missing = ["preprocess", str(data), "-o", str(tmp_path / "none"), "--tokenizer", str(checkpoint), "--show", "5"]
    result = RUNNER.invoke(app, missing)
    assert "there is no such row" in str(result.exception) and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--format", "x"],
        ["--train-on", "x"],
        ["--overflow", "x"],
        ["--max-length", "0"],
        ["--compat", "--skip-bad"],
        ["--compat", "--shard-size", "0.5"],
    ],
)
def test_options_are_checked_first(tmp_path, data, checkpoint, arguments):
    run(data, "-o", tmp_path / "out", "--tokenizer", checkpoint, *arguments, code=2)
    assert not (tmp_path / "out").exists()


# The recipe's own rows


def recipe_rows(recipe, path):
    left_out = []
    with tempfile.TemporaryFile() as scratch:
        rows = list(recipe.rows(read_records(path), scratch, lambda where, _: left_out.append(where)))
    return rows, left_out


def test_compat_is_the_recipe_bit_for_bit(shared):
    folder = shared("training/preprocess")
    for said in sorted((folder / "rows").glob("*.json")):
        expected = json.loads(said.read_text())
        flags = expected["flags"]
        recipe = Recipe(
            shared(flags["vocab_file_path"]), int(flags["max_length"]), Markers(flags.get("start_token", "<_start>"))
        )
        source = folder / flags["input_dataset_file"]
        if not expected["ok"] or len(set(expected["row_lengths"] or ())) > 1:
            if source.stat().st_size:  # no record at all is the command's to refuse
                with pytest.raises(TelechatMindieError):
                    recipe_rows(recipe, source)
            continue
        rows, left_out = recipe_rows(recipe, source)
        assert len(rows) == expected["rows"], said.stem
        assert left_out, "the recipe never writes its last row"
        if rows:
            arrays = np.load(said.with_suffix(".npz"))
            for at, (token_ids, labels) in enumerate(rows):
                assert np.array_equal(token_ids, arrays[f"input_ids_{at}"]), said.stem
                assert np.array_equal(labels, arrays[f"labels_{at}"]), said.stem


def test_default_mode_keeps_every_example(tmp_path, shared):
    folder, tokenizer = shared("training/preprocess/inputs"), shared("telechat2-115b")
    report = run(folder / "single.jsonl", "-o", tmp_path / "single", "--tokenizer", tokenizer, "--max-length", 128)
    assert report["examples"] == 14
    run(folder / "system.jsonl", "-o", tmp_path / "system", "--tokenizer", tokenizer, "--max-length", 128)
    decode = TelechatTokenizer.from_pretrained(tokenizer).decode
    text = "".join(decode(ids[ids != PADDING].tolist()) for ids, _ in rows_of(tmp_path / "system"))
    for turn in (
        "<_user>你是谁？<_bot>我是星辰。",
        "<_user>带开始标记<_bot>好。",
        "<_user>问一<_bot>答一",
        "<_user>问二<_bot>答二",
    ):
        assert turn in text


@pytest.mark.parametrize("name", ["user", "bot", "end", "pad"])
def test_only_the_start_token_may_be_empty(name):
    assert Markers(start="").start == ""
    with pytest.raises(InputError, match=f"--{name}_token: is empty"):
        Markers(**{name: ""})


def test_a_task_is_bounded_in_records_and_bytes(monkeypatch):
    monkeypatch.setattr("telechat_mindie.data.encoding._BATCH", 3)
    monkeypatch.setattr("telechat_mindie.data.encoding._BATCH_BYTES", 10)
    batches = list(_batches(Record("", b"x" * size) for size in (1, 1, 1, 1, 20, 4, 7, 1)))
    assert [[len(record.data) for record in batch] for batch in batches] == [[1, 1, 1], [1, 20], [4, 7], [1]]


def test_a_record_whose_template_takes_too_long_is_named(tmp_path, data, monkeypatch):
    checkpoint = write_tiny_checkpoint(tmp_path)
    template = default_template()
    endless = "{% for x in range(99999) %}{% for y in range(99999) %}{% endfor %}{% endfor %}"
    template += "{% if messages[0].content == '老抽' %}" + endless + "{% endif %}"
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    monkeypatch.setattr("telechat_mindie.text.chat_template.MAX_SECONDS", 0.5)
    encoded = list(encode_records(Encoding(checkpoint), read_records(data), 0))
    assert [each.fault for each in encoded] == ["", "", f"{data}:3: chat template: takes more than 0.5 seconds"]


def test_a_worker_that_is_killed_is_told_in_a_sentence(data, checkpoint, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    others = set(psutil.Process().children())  # servers of other tests
    encoded = encode_records(Encoding(checkpoint), list(read_records(data)) * 4000, 1 << 30)
    next(encoded)
    workers = [process for process in psutil.Process().children() if "spawn_main" in " ".join(process.cmdline())]
    for worker in set(workers) - others:
        worker.kill()
    with pytest.raises(InputError, match="a process that made tokens ended"):
        list(encoded)


def test_the_recipe_packs_shuffles_and_pads_as_published(tmp_path, checkpoint):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"input": f"{at}", "output": f"{at}"}) for at in range(10)), encoding="utf-8")
    rows, left_out = recipe_rows(Recipe(checkpoint / "tokenizer.model", 20), path)
    # One conversation: start, user, ▁, digit, bot, ▁, digit, end: 8 tokens, of which a row of 21 holds two.
    assert len(rows) == 4 and len(left_out) == 2
    token_ids, labels = rows[0]
    assert token_ids[:7].tolist() == [PADDING] * 5 + [1, 1]
    assert (labels != IGNORED).sum() == 2 * 3
    other, _ = recipe_rows(Recipe(checkpoint / "tokenizer.model", 20, seed=7), path)
    assert not all(np.array_equal(first[0], second[0]) for first, second in zip(rows, other, strict=True))


@pytest.mark.parametrize("target", ["out", "named.mindrecord"])
def test_the_script_takes_the_recipes_flags(tmp_path, data, checkpoint, target):
    many = tmp_path / "many.jsonl"
    many.write_bytes(b"\n".join([data.read_bytes()] * 20))
    flags = ["--input_dataset_file", many, "--vocab_file_path", checkpoint / "tokenizer.model", "--max_length", "128"]
    command = [sys.executable, ROOT / "tools/telechat_preprocess.py", *flags, "--output_path", tmp_path / target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    file = tmp_path / target if target.endswith("d") else tmp_path / target / "dataset.mindrecord"
    assert file.is_file() and Path(f"{file}.db").is_file()
    expected, _ = recipe_rows(Recipe(checkpoint / "tokenizer.model", 128), many)
    found = rows_of(file.parent)
    assert all(np.array_equal(first[0], second[0]) for first, second in zip(found, expected, strict=True))
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2 and "Traceback" not in again.stderr
