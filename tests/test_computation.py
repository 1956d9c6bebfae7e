"""What a config.json may ask of the decoder: the rotary keys of other families are refused by value, or do nothing."""

from __future__ import annotations

import json

import pytest
from helpers.checkpoints import CONFIG
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_mindie.computation import OTHER_BASES, check_computation, plain_context, refusal
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import ConfigError

PLAIN = [
    {},
    {"rope_theta": 1000000, "rope_scaling": {"factor": 1.0, "rope_type": "dynamic"}},  # 7B-32K, T1-35B
    {"rope_scaling": {"type": "dynamic", "factor": 1}},
    {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    {"rope_scaling": {}},
    {"rope_scaling": {"type": "default", "rope_type": "default", "factor": None, "partial_rotary_factor": 1.0}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 1.0, "original_max_position_embeddings": 512}},
    {"rope_scaling": {"type": "dynamic", "factor": 1.0}, "rope_parameters": {"rope_type": "default"}},
    {"partial_rotary_factor": 1.0, "rotary_pct": 1, "use_dynamic_ntk": False, "rope_interleave": False},
    {"rotary_emb_base": 10000, "rope_ratio": None},
    {"rope_theta": 1e6, "rotary_base": 1e6},
    {"position_embedding_type": "rope", "logn": True, "offset_alibi": 100, "properties": 1},
    {"theta": 10000.0, "extend_method": "None", "scaling_factor": 1.0, "rotary_dtype": "float16"},
    {"hidden_act": "silu", "norm_topk_prob": True},
]


@pytest.mark.parametrize("keys", PLAIN, ids=str)
def test_what_changes_nothing_is_taken(keys):
    config = TelechatConfig.from_dict(CONFIG | keys)
    check_computation(config)
    assert refusal(config) is None


@pytest.mark.parametrize(
    ("keys", "key", "value"),
    [
        ({"rope_scaling": {"factor": 4.0, "rope_type": "yarn"}}, "rope_scaling.rope_type", "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type", "linear"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.rope_type", "llama3"),
        ({"rope_scaling": {"type": "default", "rope_type": "longrope"}}, "rope_scaling.rope_type", "longrope"),
        ({"rope_scaling": {"type": "su", "rope_type": "default"}}, "rope_scaling.type", "su"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling.factor", "2.0"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_scaling.factor", "None"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": True}}, "rope_scaling.factor", "True"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24]}}, "rope_scaling.mrope_section", "16"),
        ({"rope_scaling": {"type": "dynamic", "factor": 1, "alpha": 1000.0}}, "rope_scaling.alpha", "1000.0"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 1, "original_max_position_embeddings": 256}},
            "original_max_position_embeddings",
            "256",
        ),
        ({"rope_scaling": "yarn"}, "rope_scaling", "yarn"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters.rope_type", "yarn"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters.full_attention", "rope_theta"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor", "0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "0.5"),
        ({"rotary_pct": 0.25}, "rotary_pct", "0.25"),
        ({"rotary_dim": 64}, "rotary_dim", "64"),
        *(({name: 1e6}, name, "1000000.0") for name in OTHER_BASES),
        ({"rope_theta": 1e6, "rotary_emb_base": 10000}, "rotary_emb_base", "10000"),
        ({"rope_ratio": 500}, "rope_ratio", "500"),
        ({"ropeTheta": 1e6}, "ropeTheta", "1000000.0"),
        ({"rope_local_base_freq": 10000}, "rope_local_base_freq", "10000"),
        ({"use_dynamic_ntk": True}, "use_dynamic_ntk", "True"),
        ({"rope_interleave": True}, "rope_interleave", "True"),
        ({"use_rope": False}, "use_rope", "False"),
        ({"extend_method": "PI", "scaling_factor": 4.0}, "extend_method", "PI"),
        ({"scaling_factor": 2.0}, "scaling_factor", "2.0"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type", "alibi"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm", "True"),
        ({"hidden_act": "gelu"}, "hidden_act", "gelu"),
        ({"sliding_window": 4096}, "sliding_window", "4096"),
        ({"norm_topk_prob": False}, "norm_topk_prob", "False"),
    ],
)
def test_what_changes_something_is_refused_by_its_value(keys, key, value):
    config = TelechatConfig.from_dict(CONFIG | keys)  # whoever only moves the weights takes it
    with pytest.raises(ConfigError, match=rf"^{key.replace('.', '[.]')}|{key}: ") as caught:
        check_computation(config)
    assert value in str(caught.value)
    assert refusal(config) == str(caught.value)


def test_dynamic_is_plain_up_to_the_trained_positions():
    config = TelechatConfig.from_dict(CONFIG | {"rope_scaling": {"type": "dynamic", "factor": 1.0}})
    assert plain_context(config) == config.seq_length == 512
    assert plain_context(TelechatConfig.from_dict(CONFIG)) is None


WORDS = st.sampled_from(["rope", "rotary", "theta", "ntk", "yarn", "rope_scaling", "rope_parameters", *OTHER_BASES])
NAMES = st.one_of(
    WORDS,
    st.tuples(st.text("abc_.", max_size=5), WORDS, st.text("abc_.X1", max_size=5)).map("".join),
    st.sampled_from(
        ["rope_theta", "theta", "rope_type", "type", "factor", "partial_rotary_factor", "attention_factor"]
    ),
)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 1 << 20), st.floats(), st.text(max_size=4),
    st.sampled_from(["default", "dynamic", "yarn", "linear", "1.0", 1.0, 10000, 1e4, 1e6]),
)  # fmt: skip
VALUES = st.one_of(LEAVES, st.lists(LEAVES, max_size=2), st.dictionaries(NAMES, LEAVES, max_size=4))


def effect(value: object) -> bool:
    """Whether a section, read on its own, does anything but name the base and a type that is plain."""
    if not isinstance(value, dict):
        return True
    left = {key: item for key, item in value.items() if item is not None and key != "rope_theta"}
    kinds = {str(left.pop(key)) for key in ("rope_type", "type") if key in left}
    factor = left.pop("factor", None if "dynamic" in kinds else 1.0)
    part = left.pop("partial_rotary_factor", 1.0)
    return bool(left) or not kinds <= {"default", "dynamic"} or factor != 1.0 or part != 1.0


@settings(max_examples=400, deadline=None)
@given(changes=st.dictionaries(NAMES, VALUES, min_size=1, max_size=3))
def test_an_unknown_rotary_key_is_refused_or_does_nothing(changes):
    """What is taken names the base under which it is used, or is a value that leaves the plain embedding alone."""
    try:
        config = TelechatConfig.from_dict(CONFIG | changes)
        check_computation(config)
    except ConfigError as error:
        assert str(error)
        return
    for key, value in changes.items():
        if value is None or key in ("type", "factor", "attention_factor", "rope_theta", "theta"):
            continue  # at the top the first three belong to no rotary embedding; a base was read
        if key in ("rope_scaling", "rope_parameters"):
            assert not effect(value), (key, value)
        elif key in OTHER_BASES:
            assert value == config.rope_theta
        else:
            assert key == "partial_rotary_factor" and value == 1, (key, value)
    bases = [changes.get("rope_theta"), changes.get("theta")]
    bases += [
        section["rope_theta"] for section in changes.values() if isinstance(section, dict) and "rope_theta" in section
    ]
    assert {base for base in bases if base is not None} <= {config.rope_theta}


def test_a_config_json_that_was_read_is_written_as_it_was(tmp_path):
    data = CONFIG | {"rope_theta": 1000000, "rope_scaling": {"factor": 1.0, "rope_type": "dynamic"}}
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert TelechatConfig.from_directory(tmp_path).raw == data
