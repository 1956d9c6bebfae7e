"""TelechatConfig: spellings, refusals, counts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from helpers.checkpoints import CONFIG, MOE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from telechat_mindie.config import TelechatConfig
from telechat_mindie.config_json import SPELLINGS
from telechat_mindie.errors import ConfigError
from telechat_mindie.variants import VARIANTS, label_for


def test_published_115b(shared):
    config = TelechatConfig.from_directory(shared("telechat2-115b"))
    assert config == replace(VARIANTS["115b"], norm_eps=1e-8)  # an early copy: the published file says 1e-5 by now
    assert config.weight_bytes("float32") == 453131665408  # total_size of the published index
    assert config.head_dim == 128
    index = json.loads((shared("telechat2-115b") / "model.safetensors.index.json").read_text())
    from telechat_mindie.checkpoint.mapping import weights

    assert set(weights(config)) == set(index["weight_map"])
    assert len(index["weight_map"]) == 963


@pytest.mark.parametrize(
    ("label", "billions", "active"),
    [
        ("3b", 3.071, 3.071),
        ("7b", 7.617, 7.617),
        ("35b", 35.435, 35.435),
        ("115b", 113.283, 113.283),
        ("39b-a12b", 39.33, 12.15),
    ],
)
def test_parameter_counts(label, billions, active):
    config = VARIANTS[label]
    assert config.parameter_count / 1e9 == pytest.approx(billions, abs=5e-3)
    assert config.active_parameter_count / 1e9 == pytest.approx(active, abs=5e-3)
    assert label_for(config) == label


def test_counts_are_those_of_the_tensors():
    from telechat_mindie.checkpoint.mapping import weights

    for changes in ({}, MOE, {"embed_layernorm": True}):
        config = TelechatConfig.from_dict(CONFIG | changes)
        total = 0
        for weight in weights(config).values():
            count = 1
            for size in weight.shape:
                count *= size
            total += count
        assert config.parameter_count == total


@pytest.mark.parametrize(
    "renamed",
    [
        {"n_layer": "num_hidden_layers"},
        {"n_head": "num_attention_heads"},
        {"hidden_size": "n_embed"},
        {"ffn_hidden_size": "intermediate_size"},
        {"layer_norm_epsilon": "rms_norm_eps"},
        {"seq_length": "max_position_embeddings"},
    ],
)
def test_spellings(renamed):
    data = {renamed.get(key, key): value for key, value in CONFIG.items()}
    assert TelechatConfig.from_dict(data) == TelechatConfig.from_dict(CONFIG)


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 1000000},
        {"theta": 1e6},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 1.0, "rope_theta": 1e6}, "rope_theta": 1000000},
    ],
)
def test_the_rotary_base(keys):
    """In the spellings of transformers 4 and 5 and of mindformers; the file's own keys stay as they were."""
    config = TelechatConfig.from_dict(CONFIG | keys)
    assert config.rope_theta == 1e6 and type(config.rope_theta) is float
    assert config.raw == CONFIG | keys
    assert TelechatConfig.from_dict(CONFIG | {"rope_theta": None}).rope_theta == 10000.0


def test_missing_kv_heads_and_base_seqlen():
    data = {key: value for key, value in CONFIG.items() if key not in ("num_key_value_heads", "base_seqlen")}
    config = TelechatConfig.from_dict(data | {"num_key_value_heads": None})
    assert config.num_kv_heads == config.num_heads
    assert config.base_seqlen == config.training_seqlen


@pytest.mark.parametrize(
    "name", ["TelechatForCausalLM", "TeleChatForCausalLM", "TeleChat2ForCausalLM", "Telechat2ForCausalLM"]
)
def test_architectures_seen_in_the_wild(name):
    TelechatConfig.from_dict(CONFIG | {"architectures": [name]})


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
        ({"vocab_size": None}, "vocab_size"),
        ({"n_layer": None}, "n_layer"),
        ({"ffn_hidden_size": None}, "ffn_hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"num_hidden_layers": 3}, "num_hidden_layers"),
        ({"intermediate_size": 95}, "intermediate_size"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps"),
        ({"n_head": 7}, "num_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 16}, "head_dim"),
        ({"num_local_experts": 4}, "num_local_experts"),
        ({"num_local_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"rope_theta": "1e6"}, "rope_theta"),
        ({"rope_theta": True}, "rope_theta"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}}, "rope_parameters.rope_theta"),
        ({"rope_scaling": {"rope_theta": "1e6"}}, "rope_scaling.rope_theta"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"torch_dtype": "int8"}, "torch_dtype"),
        ({"torch_dtype": []}, "torch_dtype"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon"),
        ({"eos_token_id": 512}, "eos_token_id"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
)
def test_refused_with_the_key_named(changes, key):
    data = {name: value for name, value in (CONFIG | changes).items() if value is not None}
    with pytest.raises(ConfigError, match=key):
        TelechatConfig.from_dict(data)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"n_layer": 10**9}, "n_layer"),
        ({"n_layer": 1 << 31}, "n_layer"),
        ({"num_local_experts": 10**9, "num_experts_per_tok": 2}, "num_local_experts"),
        ({"n_layer": 1000, "num_local_experts": 1000, "num_experts_per_tok": 2}, "n_layer, num_local_experts"),
        ({"hidden_size": 1 << 30}, "hidden_size"),
        ({"vocab_size": 1 << 30}, "vocab_size"),
        ({"ffn_hidden_size": 10**400}, "ffn_hidden_size"),
        ({"n_head": 1 << 20, "hidden_size": 1 << 20}, "n_head"),
        ({"seq_length": 1 << 32}, "seq_length"),
    ],
)
def test_sizes_are_bounded(changes, key):
    """Whatever lists layers, experts or ranks would take minutes and gigabytes for these."""
    with pytest.raises(ConfigError, match=f"^{key}: "):
        TelechatConfig.from_dict(CONFIG | changes)


SIZES = st.one_of(
    st.sampled_from([0, 1, 2, 8, 64, 512, 1023, 1024, 4096, 1 << 14, 1 << 20, 1 << 24, 1 << 31, 10**18, 10**400]),
    st.integers(-3, 1 << 33),
    st.sampled_from([None, True, 1.5, float("nan"), "8", [], {}, [8]]),
)
KEYS = [key for keys in SPELLINGS.values() for key in keys] + ["head_dim", "model_type", "architectures", "rope_theta"]


@settings(max_examples=150, deadline=10_000, suppress_health_check=[HealthCheck.too_slow])
@given(changes=st.dictionaries(st.sampled_from(KEYS), SIZES, max_size=4))
def test_any_config_is_refused_or_soon_listed(changes):
    from telechat_mindie.checkpoint.mapping import mindformers_targets

    try:
        config = TelechatConfig.from_dict(CONFIG | changes)
    except ConfigError as error:
        assert str(error)
        return
    tp = config.allowed_tp()
    assert tp[0] == 1 and config.parameter_count > 0 and label_for(config)
    if config.num_layers * max(1, config.num_experts) < 4096:  # the greatest take seconds
        assert mindformers_targets(config, qkv_concat=True, transposed_experts=config.is_moe)


def test_allowed_tp():
    config = TelechatConfig.from_dict(CONFIG)
    assert config.allowed_tp() == (1, 2, 4)
    with pytest.raises(ConfigError, match="one of 1, 2, 4"):
        config.check_tp(3)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not valid JSON"),
        ("[1]", "no JSON object"),
        ('{"a": 1, "a": 2}', "stands twice"),
        ("[" * 100000, "nested too deeply"),
        ("\xff", "not valid JSON"),
    ],
)
def test_malformed_config_json(tmp_path, text, problem):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=problem):
        TelechatConfig.from_directory(tmp_path)
