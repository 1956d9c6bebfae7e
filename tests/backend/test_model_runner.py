"""ModelRunner against the published code's logits (shared fixtures) and against plain numpy (synthetic models)."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import reference
from helpers.checkpoints import CONFIG, MOE, make_checkpoint
from helpers.driver import Driver

from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import ConfigError, InputError, ModelDirError
from telechat_mindie.model_dir.build import BuildOptions, build

NUM_BLOCKS = 64
TOLERANCE = 5e-4
MARGIN = 1e-2


def open_runner(path, block_size=16, **options):
    from telechat_mindie import ModelRunner

    return ModelRunner(str(path), 1, 0, block_size, num_blocks=NUM_BLOCKS, **options)


@pytest.fixture(scope="session")
def built_fixture(shared, tmp_path_factory):
    """A model directory of a shared fixture; built once for each set of options."""
    made = {}

    def get(name, **options):
        key = (name, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("built") / name
            build(made[key], shared(f"oracle/{name}") / "ckpt", BuildOptions(**options))
        return made[key]

    return get


CASES = [
    ("mha_fp32", {"dtype": "float32"}),
    ("mha_fp32", {"dtype": "float32", "qkv_concat": False}),
    ("gqa_bf16", {"dtype": "float32"}),  # its keys in 16 bits: test_cache_dtype.py
    ("gqa_bf16", {"dtype": "float32", "qkv_concat": False}),
    ("ntk_fp32", {"dtype": "float32", "max_seq_len": 256}),
    ("moe_fp32", {"dtype": "float32"}),
    ("theta_fp32", {"dtype": "float32"}),
]


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: value if isinstance(value, str) else str(value))
def test_published_logits(shared, built_fixture, name, options, block_size):
    """Four prompts of different lengths in one prefill, then 32 decode steps in one batch, over shuffled blocks."""
    oracle = np.load(shared(f"oracle/{name}") / "oracle.npz")
    driver = Driver(open_runner(built_fixture(name, **options), block_size), block_size, NUM_BLOCKS)
    prompts = [oracle[f"input_ids_{i}"].reshape(-1) for i in range(4)]
    tables = [driver.table(len(prompt) + 33) for prompt in prompts]
    found = driver.prefill(prompts, tables)
    for i in range(4):
        np.testing.assert_allclose(
            found[i], oracle[f"logits_{i}_rope32"].reshape(len(prompts[i]), -1)[-1], atol=TOLERANCE
        )
    tokens = np.stack([oracle[f"greedy_cached_{i}_rope32"].reshape(-1) for i in range(4)])
    wanted = [oracle[f"greedy_cached_logits_{i}_rope32"].reshape(tokens.shape[1], -1) for i in range(4)]
    margins = [oracle[f"greedy_cached_margin_{i}_rope32"].reshape(-1) for i in range(4)]
    for step in range(tokens.shape[1]):
        for i in range(4):
            np.testing.assert_allclose(found[i], wanted[i][step], atol=TOLERANCE)
            if margins[i][step] > MARGIN:
                assert found[i].argmax() == tokens[i, step]
        found = driver.decode(tokens[:, step], [len(prompt) + step for prompt in prompts], tables)


def test_published_logits_of_another_base_by_mindspores_operators(shared, built_fixture, monkeypatch):
    monkeypatch.setenv("TELECHAT_CPU_KERNELS", "mindspore")
    test_published_logits(shared, built_fixture, "theta_fp32", {"dtype": "float32"}, 16)


def test_shipped_rounding_of_the_rotary_table(shared, built_fixture, tmp_path):
    """With rotary_dtype float16 in the yaml, the logits are those of the published code as it is shipped."""
    import shutil

    path = tmp_path / "model"
    shutil.copytree(built_fixture("mha_fp32", dtype="float32"), path)
    yaml = next(path.glob("*.yaml"))
    yaml.write_text(yaml.read_text().replace("rotary_dtype: 'float32'", "rotary_dtype: 'float16'"))
    oracle = np.load(shared("oracle/mha_fp32") / "oracle.npz")
    driver = Driver(open_runner(path), 16, NUM_BLOCKS)
    prompt = oracle["input_ids_3"].reshape(-1)
    found = driver.prefill([prompt], [driver.table(len(prompt))])
    np.testing.assert_allclose(found[0], oracle["logits_3"].reshape(len(prompt), -1)[-1], atol=TOLERANCE)


THETA = {"rope_theta": 1000000, "rope_scaling": {"factor": 1.0, "rope_type": "dynamic"}}


@pytest.fixture(scope="session", params=["gqa", "moe"])
def synthetic(request, tmp_path_factory):
    """(directory, weights, config) of a random model that the suite makes itself."""
    changes = MOE | THETA if request.param == "moe" else {}
    root = tmp_path_factory.mktemp(request.param)
    weights = make_checkpoint(root / "ckpt", "float32", **changes)
    build(root / "model", root / "ckpt", BuildOptions(dtype="float32"))
    return root / "model", weights, TelechatConfig.from_dict(CONFIG | changes)


@pytest.fixture(scope="session")
def runner(synthetic):
    return open_runner(synthetic[0])


def test_logits_are_numpys(synthetic, runner):
    _, weights, config = synthetic
    rng = np.random.default_rng(1)
    driver = Driver(runner, 16, NUM_BLOCKS)
    sequences = [rng.integers(0, config.vocab_size, length + 4) for length in (1, 7, 16, 40)]
    tables = [driver.table(len(ids)) for ids in sequences]
    wanted = [reference.logits(weights, config, ids) for ids in sequences]
    found = driver.prefill([ids[:-4] for ids in sequences], tables)
    for step in range(4):
        at = [len(ids) - 5 + step for ids in sequences]
        for row, position in enumerate(at):
            np.testing.assert_allclose(found[row], wanted[row][position], atol=TOLERANCE)
        order = rng.permutation(4)  # MindIE may order a batch anew at every step
        rows = driver.decode(
            [sequences[i][at[i] + 1] for i in order], [at[i] + 1 for i in order], [tables[i] for i in order]
        )
        found = rows[np.argsort(order)]


def test_long_prompts_go_in_pieces(synthetic, runner, monkeypatch):
    from telechat_mindie.model.kernels import cpu

    _, weights, config = synthetic
    monkeypatch.setattr(cpu, "MAX_QUERY", 16)
    driver = Driver(runner, 16, NUM_BLOCKS)
    ids = np.random.default_rng(2).integers(0, config.vocab_size, 50)
    found = driver.prefill([ids], [driver.table(50)])
    np.testing.assert_allclose(found[0], reference.logits(weights, config, ids)[-1], atol=TOLERANCE)


def test_slot_minus_one_is_not_written(runner):
    driver = Driver(runner, 16, NUM_BLOCKS)
    ids = np.arange(5, 25)
    table = driver.table(32)
    first = driver.prefill([ids], [table])
    other = driver.prefill([ids[::-1]], [table], slot_mapping=np.full(20, -1, np.int32))
    assert not np.allclose(other, first)
    again = driver.decode([7], [20], [table])
    driver.prefill([ids], [table])
    np.testing.assert_array_equal(again, driver.decode([7], [20], [table]))


def test_legacy_shapes_and_other_integer_types(runner):
    driver = Driver(runner, 16, NUM_BLOCKS)
    ids = np.arange(5, 25)
    table = driver.table(32)
    flat = driver.prefill([ids], [table])
    legacy = driver.prefill([ids], [table], input_ids=ids[None].astype(np.int32), position_ids=None)
    np.testing.assert_array_equal(flat, legacy)
    flat = driver.decode([7], [20], [table])
    legacy = driver.decode(
        [7], [20], [table], input_ids=np.array([[7]]), slot_mapping=driver.slots(table, np.array([20], np.int64))
    )
    np.testing.assert_array_equal(flat, legacy)


def test_what_mindie_reads(runner):
    import mindspore as ms

    assert runner.dtype is ms.float32 and runner.use_legacy is False
    assert (runner.num_layers, runner.num_kv_heads, runner.head_size) == (2, 4, 8)
    config = runner.model_config.__dict__
    assert config["max_position_embedding"] == 512 and config["vocab_size"] == 512
    assert config["top_k"] <= config["vocab_size"]
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 3)


def test_block_count_is_mindies(synthetic):
    from telechat_mindie import ModelRunner

    runner = ModelRunner(str(synthetic[0]), 1, 0, 128)
    assert runner.npu_num_blocks == (1 << 30) // (2 * 2 * 4 * 8 * 4 * 128)  # layers, k and v, kv heads, head_dim, fp32


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"input_ids": np.array([1.0])}, "input_ids"),
        ({"input_ids": np.array([1, 2])}, "input_ids"),
        ({"slot_mapping": np.array([NUM_BLOCKS * 16])}, "slot_mapping"),
        ({"slot_mapping": np.array([1, 2])}, "slot_mapping"),
        ({"block_tables": np.array([[NUM_BLOCKS, 0]])}, "block_tables"),
        ({"block_tables": np.array([3])}, "block_tables"),
        ({"block_tables": np.array([[3]])}, "block_tables"),
        ({"valid_length_each_example": np.array([513])}, "block_tables"),
        ({"valid_length_each_example": np.array([], int)}, "valid_length_each_example"),
        ({"position_ids": np.array([20, 21])}, "position_ids"),
        ({"q_seq_lens": [2]}, "input_ids"),
        ({"q_seq_lens": [0]}, "q_seq_lens"),
        ({"prefill": True, "prefill_head_indices": np.array([1])}, "input_ids"),
    ],
)
def test_misuse_is_refused_and_the_runner_lives_on(runner, changes, name):
    driver = Driver(runner, 16, NUM_BLOCKS)
    table = driver.table(32)
    driver.prefill([np.arange(5, 25)], [table])
    before = driver.decode([7], [20], [table])
    with pytest.raises(InputError, match=name):
        driver.decode([7], [20], [table], **changes)
    np.testing.assert_array_equal(before, driver.decode([7], [20], [table]))


def test_constructor_refusals(synthetic, tmp_path):
    path = synthetic[0]
    with pytest.raises(InputError, match="world_size"):
        open_runner(path, world_size=2)
    with pytest.raises(InputError, match="rank_id"):
        open_runner(path, rank_id=1)
    with pytest.raises(ModelDirError, match="not a model directory"):
        open_runner(tmp_path)
    with pytest.raises(ModelDirError, match="not a directory"):
        open_runner(tmp_path / "absent")


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (lambda path: (path / "second.yaml").write_text("a: 1"), ModelDirError, "exactly one yaml"),
        (lambda path: (path / "rank_0").rename(path / "rank_1"), ModelDirError, "rank are missing"),
        (lambda path: edit_yaml(path, "num_layers: 2", "num_layers: 3"), ModelDirError, "num_layers"),
        (lambda path: edit_yaml(path, 'type: "float32"', 'type: "float16"'), ModelDirError, "param_init_type"),
        (lambda path: edit_yaml(path, "'DYNAMIC_NTK'", "'YARN'"), ConfigError, "extend_method"),
        (lambda path: edit_weights(path, drop="lm_head.weight"), ModelDirError, "missing: lm_head.weight"),
        (lambda path: edit_weights(path, add="odd.weight"), ModelDirError, "unknown: odd.weight"),
        (lambda path: edit_weights(path, cut="model.norm_out.weight"), ModelDirError, "model.norm_out.weight"),
    ],
)  # fmt: skip
def test_damaged_directories_are_refused(synthetic, tmp_path, damage, kind, message):
    import shutil

    path = tmp_path / "model"
    shutil.copytree(synthetic[0], path)
    damage(path)
    with pytest.raises(kind, match=message):
        open_runner(path)


def edit_yaml(path, old, new):
    yaml = next(path.glob("*.yaml"))
    text = yaml.read_text()
    assert old in text
    yaml.write_text(text.replace(old, new))


def edit_weights(path, drop=None, add=None, cut=None):
    from safetensors.numpy import load_file, save_file

    file = next((path / "rank_0").iterdir())
    arrays = load_file(file)
    if drop:
        del arrays[drop]
    if add:
        arrays[add] = np.zeros(3, np.float32)
    if cut:
        arrays[cut] = arrays[cut][:-1].copy()
    save_file(arrays, file)


def test_the_hook_of_mindformers(synthetic):
    """Positional, with the yaml's path second."""
    from telechat_mindie.backend.model_runner import MindIEModelRunner

    path = synthetic[0]
    yaml = next(path.glob("*.yaml"))
    runner = MindIEModelRunner(str(path), str(yaml), 1, 0, 128, 0, 1, [0], None)
    assert runner.num_layers == 2
    with pytest.raises(ModelDirError, match="outside"):
        MindIEModelRunner(str(path), "/elsewhere/x.yaml", 1, 0, 128, 0, 1, [0], None)
