"""The rows of a run: read from mindrecord in their order, checked one by one, kept in a flat file."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.checkpoints import CONFIG

from telechat_mindie.config import TelechatConfig
from telechat_mindie.data.mindrecord import RowWriter
from telechat_mindie.data.packing import IGNORED, PADDING
from telechat_mindie.errors import InputError
from telechat_mindie.training.dataset import gather_rows, mindrecord_files
from telechat_mindie.training.order import BLANK

MODEL = TelechatConfig.from_dict(CONFIG)


def write(folder, rows, shard_bytes=None, name="dataset"):
    writer = RowWriter(folder, shard_bytes, name)
    for token_ids, labels in rows:
        writer.write(np.array(token_ids, np.int32), np.array(labels, np.int32))
    writer.close()
    return [folder / name for name in writer.names]


def row(first, length=6):
    return [first] * length, [IGNORED, *[first] * (length - 1)]


def gathered(folder, rows):
    return gather_rows(write(folder, rows), folder / "flat", MODEL)


def test_rows_come_in_the_order_of_files_and_rows(tmp_path):
    files = write(tmp_path, [row(number) for number in range(10, 60)], shard_bytes=1000)
    assert len(files) > 1
    data = gather_rows(mindrecord_files([str(tmp_path)]), tmp_path / "flat", MODEL)
    batch = data.take(np.arange(50))
    assert batch.input_ids[:, 0].tolist() == list(range(10, 60)) and batch.labels[7].tolist() == row(17)[1]
    assert (len(data), data.length, data.trained_tokens) == (50, 6, 250)
    again = gather_rows(files, tmp_path / "again", MODEL)
    assert again.sha256 == data.sha256
    assert gather_rows(files[::-1], tmp_path / "turned", MODEL).sha256 != data.sha256


def test_rows_that_train_nothing_are_left_out(tmp_path):
    nothing = ([5] * 6, [IGNORED] * 6)
    behind_padding = ([PADDING] * 6, [IGNORED, *[5] * 5])  # the loss leaves out what is said behind padding
    first_alone = ([5] * 6, [5, *[IGNORED] * 5])  # nothing stands before it
    data = gathered(tmp_path, [row(10), nothing, behind_padding, first_alone, row(11)])
    assert (len(data), data.left_out) == (2, 3)
    assert data.take(np.array([1, BLANK])).input_ids.tolist() == [[11] * 6, [PADDING] * 6]
    assert (data.take(np.array([BLANK])).labels == IGNORED).all()


def test_nothing_to_train_on_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"hold no row with a token to train on \(found 1 rows\)"):
        gathered(tmp_path, [([5] * 6, [IGNORED] * 6)])


@pytest.mark.parametrize(
    "bad, complaint",
    [
        (([10] * 7, [10] * 7), r"dataset.mindrecord: row 1: input_ids: has another length \(expected 6, found 7\)"),
        (([10] * 6, [10] * 5), r"row 1: labels: has another length"),
        (([512] * 6, [10] * 6), r"row 1: input_ids: has an id .* \(expected 0 to 511, found 512\)"),
        (([-1] * 6, [10] * 6), r"row 1: input_ids: has an id .* found -1"),
        (([10] * 6, [600] * 6), r"row 1: labels: has an id"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_named(tmp_path, bad, complaint):
    with pytest.raises(InputError, match=complaint):
        gathered(tmp_path, [row(10), bad])


def test_other_columns_and_short_rows_are_refused(tmp_path):
    from mindspore.mindrecord import FileWriter

    writer = FileWriter(str(tmp_path / "a.mindrecord"), 1)
    writer.add_schema({"input_ids": {"type": "int32", "shape": [-1]}}, "no labels")
    writer.write_raw_data([{"input_ids": np.arange(6, dtype=np.int32)}])
    writer.commit()
    with pytest.raises(InputError, match=r"row 0: has no column labels \(found input_ids\)"):
        gather_rows([tmp_path / "a.mindrecord"], tmp_path / "flat", MODEL)
    with pytest.raises(InputError, match="row 0: is too short to train on"):
        gathered(tmp_path, [row(10, 1)])


def test_names_are_files_folders_and_patterns(tmp_path):
    (tmp_path / "made").mkdir()
    files = write(tmp_path / "made", [row(number) for number in range(10, 60)], shard_bytes=1000)
    (tmp_path / "made" / "preprocess.json").write_text("{}")
    other = write(tmp_path, [row(1)], name="other")
    names = [f"{tmp_path}/made/*", str(other[0]), str(tmp_path / "made")]
    assert mindrecord_files(names) == [*files, *other]
    text = tmp_path / "a.jsonl"
    text.write_text("{}")
    assert mindrecord_files([str(text), "absent*.jsonl"]) == []  # for `preprocess` to read
    with pytest.raises(InputError, match="mindrecord files and other data: are mixed"):
        mindrecord_files([str(other[0]), str(text)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no mindrecord files"):
        mindrecord_files([str(tmp_path / "empty")])


def test_damaged_files_are_refused_in_one_sentence(tmp_path):
    file = write(tmp_path, [row(number % 400) for number in range(2000)])[0]
    file.write_bytes(file.read_bytes()[:-30000])
    with pytest.raises(InputError, match=r"dataset.mindrecord: cannot be read: .*Is it whole") as caught:
        gather_rows([file], tmp_path / "flat", MODEL)
    assert "\n" not in str(caught.value)
    file.with_name("dataset.mindrecord.db").unlink()
    with pytest.raises(InputError, match="is without the index that belongs to it"):
        mindrecord_files([str(file)])
