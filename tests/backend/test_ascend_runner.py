"""ModelRunner as it runs on Ascend, with numpy in the operators' place: MindIE's arguments to the Ascend graphs."""

from __future__ import annotations

import shutil

import mindspore as ms
import numpy as np
import pytest
from helpers.ascend_operators import emulate
from helpers.checkpoints import make_checkpoint
from helpers.driver import Driver

from telechat_mindie.backend import model_runner
from telechat_mindie.backend.device import AscendModel, device_name
from telechat_mindie.errors import ConfigError, InputError
from telechat_mindie.model.kernels.ascend import AscendKernels
from telechat_mindie.model_dir.build import BuildOptions, build

BLOCK, NUM_BLOCKS = 16, 32


class Emulated(AscendModel):
    on_device = False
    prepare = staticmethod(emulate)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("ascend")
    make_checkpoint(root / "ckpt", "float16", hidden_size=64, n_head=4, num_key_value_heads=2)
    build(root / "model", root / "ckpt", BuildOptions(block_size=BLOCK))
    return root / "model"


@pytest.fixture
def ascend(directory, monkeypatch):
    """A runner over the emulated device; numpy can stand in for operators only outside of graphs."""
    monkeypatch.setattr(model_runner, "open_device_model", Emulated)
    ms.set_context(mode=ms.PYNATIVE_MODE)

    def make(path=directory, **options):
        arguments = {"npu_mem_size": 1, "cpu_mem_size": 0, "block_size": BLOCK, "num_blocks": NUM_BLOCKS}
        return model_runner.ModelRunner(str(path), **(arguments | options))

    yield make
    ms.set_context(mode=ms.GRAPH_MODE)


def conversation(runner, **caches):
    rng = np.random.default_rng(0)
    driver = Driver(runner, BLOCK, NUM_BLOCKS)
    prompts = [rng.integers(0, 512, length) for length in (5, 20)]
    tables = [driver.table(len(prompt) + 2) for prompt in prompts]
    found = [driver.prefill(prompts, tables, **caches)]
    for step in range(2):
        found.append(driver.decode([7 + step, 9], [len(prompt) + step for prompt in prompts], tables, **caches))
    return np.concatenate(found)


def test_the_same_logits_as_on_the_cpu(directory, ascend):
    on_ascend = conversation(ascend())
    ms.set_context(mode=ms.GRAPH_MODE)
    on_cpu = conversation(cpu_runner(directory))
    # float16 throughout against float32 activations.
    np.testing.assert_allclose(on_ascend, on_cpu, atol=3e-2)
    assert np.abs(on_cpu).max() > 0.5


def test_the_tables_have_the_models_base(tmp_path, ascend):
    """TeleChat2-7B-32K's base: cosines and sines are parameters, [positions, head_dim], both halves alike."""
    dynamic = {"factor": 1.0, "rope_type": "dynamic"}
    sizes = {"hidden_size": 64, "n_head": 4, "num_key_value_heads": 2}
    make_checkpoint(tmp_path / "ckpt", "float16", **sizes, rope_theta=1000000, rope_scaling=dynamic)
    build(tmp_path / "model", tmp_path / "ckpt", BuildOptions(block_size=BLOCK))
    runner = ascend(path=tmp_path / "model")
    kernels = runner.model.kernels
    half = np.arange(512)[:, None] * 1e6 ** (-np.arange(0, 16, 2) / 16)
    for table, of_angles in ((kernels.cos, np.cos), (kernels.sin, np.sin)):
        np.testing.assert_allclose(table.asnumpy(), np.tile(of_angles(half), 2), atol=5e-5)
    on_ascend = conversation(runner)
    ms.set_context(mode=ms.GRAPH_MODE)
    np.testing.assert_allclose(on_ascend, conversation(cpu_runner(tmp_path / "model")), atol=3e-2)


@pytest.mark.parametrize("form", ["flat", "split"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("gqa_bf16", {}), ("ntk_fp32", {"max_seq_len": 256}), ("moe_fp32", {}), ("theta_fp32", {})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_published_logits_in_float32(shared, ascend, tmp_path, monkeypatch, name, options, form):
    """Layouts, tables, masks and routing without an NPU's rounding: prompts, steps, and a prompt in two chunks."""
    monkeypatch.setattr(AscendKernels, "weight_dtype", staticmethod(lambda stored: stored))
    build(
        tmp_path / "model", shared(f"oracle/{name}") / "ckpt", BuildOptions(dtype="float32", block_size=16, **options)
    )
    yaml = next((tmp_path / "model").glob("*.yaml"))
    yaml.write_text(yaml.read_text().replace("layer_form: 'flat'", f"layer_form: '{form}'"))
    oracle = np.load(shared(f"oracle/{name}") / "oracle.npz")
    driver = Driver(ascend(path=tmp_path / "model", num_blocks=128), BLOCK, 128)
    prompts = [oracle[f"input_ids_{i}"].reshape(-1) for i in range(4)]
    tables = [driver.table(len(prompt) + 9) for prompt in prompts]
    tokens = np.stack([oracle[f"greedy_cached_{i}_rope32"].reshape(-1) for i in range(4)])
    wanted = np.stack([oracle[f"greedy_cached_logits_{i}_rope32"].reshape(tokens.shape[1], -1) for i in range(4)])
    found = driver.prefill(prompts, tables)
    for step in range(4):
        np.testing.assert_allclose(found, wanted[:, step], atol=5e-4)
        found = driver.decode(tokens[:, step], [len(prompt) + step for prompt in prompts], tables)
    longest = max(prompts, key=len)
    table, half = driver.table(len(longest)), len(longest) // 2
    positions = np.arange(len(longest), dtype=np.int32)
    slots = driver.slots(table, positions)
    for part in (slice(0, half), slice(half, len(longest))):
        new = part.stop - part.start
        found = driver.prefill(
            [longest[part]],
            [table],
            valid_length_each_example=np.array([part.stop], np.int32),
            slot_mapping=slots[part],
            position_ids=positions[part],
            q_seq_lens=[new],
        )
    if name != "ntk_fp32":  # whose first chunk is shorter than the training length, where its tables are others
        which = next(i for i in range(4) if prompts[i] is longest)
        np.testing.assert_allclose(found[0], wanted[which, 0], atol=5e-4)


@pytest.fixture
def networks(monkeypatch):
    """(kind, caches given) of every run of a graph, and the tensor that it gave."""
    from telechat_mindie.model.kernels.ascend_graphs import AscendGraphs

    seen, original = [], AscendGraphs.__call__

    def run(self, call, caches=None):
        seen.append((call.kind, caches is not None, original(self, call, caches)))
        return seen[-1][2]

    monkeypatch.setattr(AscendGraphs, "__call__", run)
    return seen


PREFIX_CACHE = '{"plugin_type": "prefix_cache"}'
MEMORY_DECODING = '{"plugin_type": "memory_decoding", "decoding_length": 4}'
LOOKAHEAD = '{"plugin_type": "la", "level": 4, "window": 5, "guess_set_size": 5}'


@pytest.mark.parametrize(
    ("plugins", "more"),
    [
        (None, []),
        (PREFIX_CACHE, ["history"]),
        (MEMORY_DECODING, ["history"]),
        (LOOKAHEAD, ["drafts", "history"]),
    ],
)
def test_the_first_prompt_compiles_what_comes_after_it(ascend, networks, plugins, more):
    """MindIE warms up with prompts alone."""
    runner = ascend(plugin_params=plugins)
    driver = Driver(runner, BLOCK, NUM_BLOCKS)
    table = driver.table(20)
    before = [cache.asnumpy().copy() for cache in runner.model.cache.keys]
    slots = np.full(5, -1, np.int32)
    driver.prefill([np.arange(4, 9)], [table], slot_mapping=slots)
    assert [kind for kind, _, _ in networks] == ["prefill", "decode", *more]
    for cache, was in zip(runner.model.cache.keys, before, strict=True):
        np.testing.assert_array_equal(cache.asnumpy(), was)
    driver.prefill([np.arange(4, 9)], [table])
    driver.decode([7], [5], [table])
    assert [kind for kind, _, _ in networks][2 + len(more) :] == ["prefill", "decode"]


def test_the_first_prompt_with_mindies_caches(ascend, networks):
    runner = ascend(npu_mem_size=-1, num_blocks=None)
    caches = {"key_cache": one_block(), "value_cache": one_block()}  # as in MindIE's warm-up
    Driver(runner, BLOCK, 2).prefill([np.arange(4, 9)], [np.zeros(1, np.int32)], **caches)
    assert [run[:2] for run in networks] == [("prefill", True), ("decode", True)]


def test_the_form_of_a_layer_is_the_yamls(directory, ascend, tmp_path):
    """The same logits either way; a directory without the key, as 0.1.0 and 0.2.0 built them, has flat layers."""
    (name,) = (file.name for file in directory.glob("*.yaml"))
    line = "    layer_form: 'flat'\n"
    text = (directory / name).read_text()
    assert line in text
    found = {}
    for form in ("flat", "split", None, "round"):
        path = tmp_path / str(form)
        shutil.copytree(directory, path)
        (path / name).chmod(0o640)
        (path / name).write_text(text.replace(line, "" if form is None else line.replace("flat", form)))
        if form == "round":
            with pytest.raises(ConfigError, match=r"layer_form: is not supported \(expected flat or split"):
                ascend(path=path)
        else:
            runner = ascend(path=path)
            found[form] = runner.model.kernels.layer_form, conversation(runner)
    assert [form for form, _ in found.values()] == ["flat", "split", "flat"]
    np.testing.assert_allclose(found["split"][1], found["flat"][1], atol=5e-3)
    np.testing.assert_array_equal(found[None][1], found["flat"][1])


def one_block():
    return ms.mutable([ms.ops.zeros((1, BLOCK, 2, 16), ms.float16) for _ in range(2)])


def test_forward_hands_back_what_the_graph_gave(ascend, networks, monkeypatch):
    """No copy and no wait for the device: MindIE samples there."""
    runner = ascend()
    runner._device._to_compile.clear()
    given = {
        "input_ids": np.arange(4, 9),
        "valid_length_each_example": np.array([5]),
        "block_tables": np.zeros((1, 1), int),
    }
    logits = runner.forward(**given, slot_mapping=np.arange(5), prefill=True)
    assert logits is networks[-1][2]
    assert logits.dtype == ms.float32 and logits.shape == (1, 512)


def test_nothing_of_the_device_is_copied_to_the_host(directory, ascend, monkeypatch):
    """With graphs that do nothing, since numpy stands in for the real ones' operators here."""
    from telechat_mindie.model.kernels.ascend_graphs import AscendGraphs

    def asnumpy(self):
        raise AssertionError("copied to the host")

    result = ms.Tensor(np.zeros((1, 512), np.float32))
    monkeypatch.setattr(AscendGraphs, "__call__", lambda self, call, caches=None: result)
    monkeypatch.setattr(ms.Tensor, "asnumpy", asnumpy)
    runner = ascend()
    given = {"block_tables": np.array([[0]]), "valid_length_each_example": np.array([5])}
    prompt = runner.forward(**given, input_ids=np.arange(4, 9), slot_mapping=np.arange(5), prefill=True)
    assert prompt is result
    given["valid_length_each_example"] = np.array([6])
    assert runner.forward(**given, input_ids=np.array([9]), slot_mapping=np.array([5]), prefill=False) is result


def cpu_runner(directory):
    from telechat_mindie.backend.device import CpuModel

    original, model_runner.open_device_model = model_runner.open_device_model, CpuModel
    try:
        return model_runner.ModelRunner(str(directory), 1, 0, BLOCK, num_blocks=NUM_BLOCKS)
    finally:
        model_runner.open_device_model = original


def test_caches_that_mindie_allocates(ascend):
    own = conversation(ascend())
    runner = ascend(npu_mem_size=-1, num_blocks=None)
    shape = (NUM_BLOCKS, BLOCK, 2, 16)
    keys, values = ([ms.ops.zeros(shape, ms.float16) for _ in range(2)] for _ in range(2))
    caches = {"key_cache": ms.mutable(keys), "value_cache": ms.mutable(values)}
    np.testing.assert_array_equal(conversation(runner, **caches), own)
    with pytest.raises(InputError, match=r"key_cache\[0\]"):
        conversation(runner, key_cache=[key.astype(ms.float32) for key in keys], value_cache=values)
    known = runner._device.external(**caches)
    assert runner._device.external(**caches)[0] is known[0]  # neither checked nor wrapped again
    with pytest.raises(InputError, match="key_cache: comes beside the model's own cache"):
        conversation(ascend(), **caches)
    fewer = {name: [cache[:4] for cache in side] for name, side in caches.items()}
    assert runner._device.external(**fewer)[1] == 4


@pytest.mark.skipif(
    tuple(map(int, ms.__version__.split(".")[:2])) < (2, 8),
    reason="a CPU's swap_cache copies memory that emulated operators do not write",
)
def test_swapping_with_mindspores_own_copy(ascend):
    runner = ascend(cpu_mem_size=1)
    driver = Driver(runner, BLOCK, NUM_BLOCKS)
    table, other = driver.table(BLOCK), driver.table(BLOCK)
    driver.prefill([np.arange(4, 14)], [table])
    before = driver.decode([5], [10], [table])
    runner.swap(np.array([[table[0], 3]]), True)
    runner.swap(np.array([[3, other[0]]]), False)
    np.testing.assert_array_equal(driver.decode([5], [10], [other]), before)
    with pytest.raises(InputError, match="device block"):
        runner.swap(np.array([[3, NUM_BLOCKS]]), False)


def test_which_device(monkeypatch):
    monkeypatch.setenv("TELECHAT_DEVICE", "ascend")
    assert device_name() == "ascend"
    monkeypatch.setenv("TELECHAT_DEVICE", "gpu")
    with pytest.raises(InputError, match="TELECHAT_DEVICE"):
        device_name()
    monkeypatch.delenv("TELECHAT_DEVICE")
    assert device_name() == "cpu"
