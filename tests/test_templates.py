"""model_dir_template/: no value of any template becomes syntax of its target."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from importlib import resources
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from jinja2 import nodes

from telechat_mindie.errors import ConfigError
from telechat_mindie.templates import FILTERS, environment, render

TEMPLATES = sorted(
    entry.name
    for entry in resources.files("telechat_mindie.model_dir_template").iterdir()
    if entry.name.endswith(".j2")
)

HOSTILE = [
    "x\nmodel:\n  arch:\n    type: evil\n---\n...\n'\"`$(touch evil)`\"' y: z # ${{}} ${HOME} $HOME $$ {{ 1 }} {%",
    " \t\r\n\x01\x1b[31m\x7f\x85\u2028\ufeff \\n 中文 🙂 \ufffd- [a, *b, &c !!python/object:os.system] \\ ",
    "null",
    "1e5",
]

CONFIG: dict[str, Any] = {
    "vocab_size": 70001, "hidden_size": 70002, "num_layers": 70003, "num_heads": 70004, "num_kv_heads": 70005,
    "ffn_size": 70006, "training_seqlen": 70007, "base_seqlen": 70008, "bos_token_id": 70009, "eos_token_id": 70010,
    "pad_token_id": 70011, "num_experts": 70012, "experts_per_token": 70013, "norm_eps": 70014.5, "rope_theta": 70015.5,
    "is_moe": True,
}  # fmt: skip

# Each value once, so that it is known again wherever it appears.
VALUES: dict[str, dict[str, Any]] = {
    "config.json.j2": {
        "config": CONFIG, "model_type": "M1", "dtype": "D1", "kept": {"K1": "K2", "K3": {"K4": ["K5"]}},
    },
    "generation_config.json.j2": {"top_k_limit": 80001, "generation": {"G1": "G2", "top_k": 5}},
    "predict.yaml.j2": {
        "config": CONFIG, "label": "L1", "dtype": "D1", "tp": 80001, "qkv_concat": True, "max_seq_len": 80002,
        "block_size": 80003, "num_blocks": 80004, "max_new_tokens": 80005,
        "generation": {
            "do_sample": "G1", "temperature": "G2", "top_k": "G3", "top_p": "G4", "repetition_penalty": "G5",
        },
        "tokenizer": {"control_tokens": "T1", "bare_prompt": "T2", "turn_tokens": "T3"},
    },
    "conf_config.json.j2": {"config": {"C1": "C2", "C3": [{"C4": ["C5"]}], "C6": {}}},
    "k8s_configmap.yaml.j2": {"name": "N1", "namespace": "N2", "config": "C1\n  x\n", "start": "S1\n\ny\n"},
    "k8s_poddisruptionbudget.yaml.j2": {"name": "N1", "namespace": "N2"},
    "k8s_kustomization.yaml.j2": {"namespace": "N2"},
    "k8s_service.yaml.j2": {"name": "N1", "namespace": "N2", "port": 80001, "metrics_port": 80002},
    "k8s_deployment.yaml.j2": {
        "name": "N1", "namespace": "N2", "replicas": 80001, "config_hash": "H1", "image": "I1", "port": 80002,
        "management_port": 80003, "metrics_port": 80004, "resource": "R1", "cards": 80005, "https": True,
        "startup_failures": 80006, "model_path": "P1", "host_model_path": "P2", "claim": "C1", "shm_gb": 80007,
        "tls_secret": "T1", "tls_files": {"F1": "F2"}, "environment": {"E1": "E2"},
    },
    "compose.yaml.j2": {
        "name": "N1", "replicas": 80001, "cards": 80002, "groups": [["G1"], ["G2"]], "image": "I1", "shm_gb": 80003,
        "host_model_path": "P1", "model_path": "P2", "https": False, "tls_files": {"F1": "F2"}, "port": 80004,
        "metrics_port": 80005, "management_port": 80006, "host_port_step": 10, "startup_failures": 80007,
        "environment": {"E1": "E2"},
    },
    "start.sh.j2": {"mindie_home": "M1", "home_variables": ["V1", "V2"]},
    "Dockerfile.j2": {"image": "I1", "wheel": "W1", "index_url": "X1", "requirement": "R1"},
    "telechat.py.j2": {}, "telechat_config.py.j2": {}, "telechat_tokenizer.py.j2": {},
    "mindformers_finetune.yaml.j2": {
        "config": CONFIG, "label": "L1", "seed": 80001, "checkpoint": "P1", "divided": True, "epochs": 80002,
        "weight_decay": 80003.5, "learning_rate": 80004.5, "learning_rate_end": 80005.5,
        "sequence_length": 80007, "data": "P2", "save_steps": 80008, "keep": 80009, "device_memory": "M1",
        "eos_token_id": 80010, "shard_threshold_kb": 80026, "gradient_groups": 80027, "capacity_factor": 80028.5,
        "param_dtype": "D1", "dtype": "D2", "offset": [80011, 80012],
        "lora": {"rank": 80013, "alpha": 80014, "modules": "T1"},
        "layout": {
            "dp": 80016, "tp": 80017, "pp": 80018, "ep": 80019, "micro_batches": 80020, "batch_size": 80021,
            "interleave": 80022, "optimizer_shard": 80023, "recompute": "R1", "world": 80024, "global_batch": 80025,
            "sequence_parallel": True,
        },
    },
    "mindformers_environment.sh.j2": {"nodes": 2, "world": 16, "master_addr": "A1", "master_port": 80001},
    "mindformers_start_node.sh.j2": {"node": 80001, "nodes": 80012, "world": 80003, "cards": 80004},
    "mindformers_README.md.j2": {
        "nodes": 2, "cards": 80001, "world": 80002, "sequence_length": 80003, "steps": 80004, "save_steps": 80005,
        "keep": 80006, "source": "P1", "checkpoint": "P2", "output": "P3", "param_dtype": "D1",
        "divided": True, "master_addr": None, "lora": {"scale": "S1"}, "usable": 80007.5, "device_gb": 80008,
        "layout": {
            "dp": 80009, "tp": 80010, "pp": 80011, "ep": 80012, "batch_size": 80013, "micro_batches": 80014,
            "global_batch": 80015, "recompute": "off",
        },
        "memory": [{"stage": 80016, "layers": 80017, "parts": [80018.5, 80019.5], "total": 80020.5}],
    },
}  # fmt: skip
VARIATIONS = {
    "k8s_deployment.yaml.j2": ({}, {"https": False}, {"claim": None}),
    "compose.yaml.j2": ({}, {"https": True}),
    "Dockerfile.j2": ({}, {"wheel": None}),
}


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a value or a key may be replaced."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*here, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from places(item, (*here, index))
    elif value is not None:
        yield here


def at(value: Any, place: tuple[Any, ...]) -> Any:
    for step in place:
        value = value[step]
    return value


def replaced(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    first, *rest = place
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    copy[first] = replaced(value[first], tuple(rest), new)
    return copy


def text_of(template: str, values: dict[str, Any]) -> str:
    if template in ("predict.yaml.j2", "config.json.j2"):  # attributes, as of a TelechatConfig
        values = values | {"config": SimpleNamespace(**values["config"])}
    return render(template, **values)


def parsed(template: str, values: dict[str, Any]) -> Any:
    """What the template's target reads in it."""
    text = text_of(template, values)
    if template == "compose.yaml.j2":
        return interpolated(yaml.safe_load(text))
    if ".yaml" in template:
        return yaml.safe_load(text)
    if ".json" in template:
        return json.loads(text)
    if template == "Dockerfile.j2":
        lines = [line for line in text.split("\n") if line and not line.startswith("#")]
        assert [line.partition(" ")[0] for line in lines if not line.startswith("COPY ")] == ["ARG", "FROM", "RUN"]
        return [json.loads(line.partition(" ")[2]) for line in lines[2:]]
    if template.startswith("mindformers_"):
        return PARSERS[template](text)
    if template == "start.sh.j2":
        head, _, _ = text.partition("; do home=")
        show = """; do printf '%s\\0' "$name"; done; printf %s "$home\""""
        return subprocess.run(["bash", "-c", head + show], capture_output=True, check=True).stdout.decode().split("\0")
    return [ast.dump(node) for node in ast.parse(text).body]


def sourced(text: str) -> list[str]:
    """What an environment.sh sets of what it is given."""
    code = f"MINDFORMERS_HOME=/; [() {{ builtin [ \"${{@/*research*/.}}\"; }}; here=/; {text}\nprintf '%s\\0' "
    return printed(code + '"$MASTER_ADDR" "$MASTER_PORT"')


def started(text: str) -> list[Any]:
    """The words of a start script's command, and the numbers of its first comment."""
    _, comment, rest = text.split("\n", 2)
    _, _, command = rest.partition("\nexec ")
    return [*map(str, json_values(comment)), *printed(f"here=/ MINDFORMERS_HOME=/; printf '%s\\0' {command}")]


def documented(text: str) -> list[Any]:
    """The JSON of a README's sentences, and the words of its commands."""
    parts = text.split("```")
    show = "() { printf '%s\\0' \"$@\"; }; "
    commands = "".join(part.removeprefix("bash") for part in parts[1::2])
    return json_values(" ".join(parts[::2])) + printed(f"telechat-mindie{show}bash{show}{commands}")


def printed(code: str) -> list[str]:
    return subprocess.run(["bash", "-c", code], capture_output=True, check=True).stdout.decode().split("\0")


def json_values(text: str) -> list[Any]:
    return [json.loads(value) for value in re.findall(r'"(?:[^"\\]|\\.)*"|\b\d+(?:\.\d+)?\b', text)]


PARSERS = {
    "mindformers_environment.sh.j2": sourced,
    "mindformers_finetune.yaml.j2": yaml.safe_load,
    "mindformers_start_node.sh.j2": started,
    "mindformers_README.md.j2": documented,
}


def interpolated(value: Any) -> Any:
    """A compose file as compose reads it: `$$` is a dollar sign, and no other is left."""
    if isinstance(value, dict):
        return {key: interpolated(item) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolated(item) for item in value]
    if isinstance(value, str):
        assert "$" not in value.replace("$$", ""), value
        return value.replace("$$", "$")
    return value


def swapped(tree: Any, marker: Any, hostile: str) -> Any:
    """The tree that the marker gave, with the hostile value in its place and nothing else changed."""
    if isinstance(tree, dict):
        return {swapped(key, marker, hostile): swapped(item, marker, hostile) for key, item in tree.items()}
    if isinstance(tree, list):
        return [swapped(item, marker, hostile) for item in tree]
    if type(tree) is type(marker) and tree == marker:
        return hostile
    if isinstance(tree, str) and tree.startswith("import "):  # Python in a health check: a literal
        return tree.replace(json.dumps(marker), json.dumps(hostile, ensure_ascii=False))
    return tree.replace(str(marker), hostile) if isinstance(tree, str) else tree


def cases() -> Iterator[tuple[str, dict[str, Any], tuple[Any, ...]]]:
    for template, values in VALUES.items():
        for changes in VARIATIONS.get(template, ({},)):
            chosen = values | changes
            yield from ((template, chosen, place) for place in places(chosen))


def test_every_template_is_looked_at():
    assert sorted(VALUES) == TEMPLATES


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_value_goes_through_a_filter(template):
    """Whatever a template prints is quoted at that place, or comes of a macro whose own values are."""
    source = resources.files("telechat_mindie.model_dir_template").joinpath(template).read_text()
    tree = environment().parse(source)
    macros = {macro.name for macro in tree.find_all(nodes.Macro)}
    for output in tree.find_all(nodes.Output):
        for node in output.nodes:
            quoted = isinstance(node, nodes.Filter) and node.name in FILTERS
            own = isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) and node.node.name in macros
            indent = template == "conf_config.json.j2" and isinstance(node, (nodes.Name, nodes.CondExpr))
            assert isinstance(node, nodes.TemplateData) or quoted or own or indent, f"{template}:{node.lineno}"


@pytest.mark.parametrize(("template", "values", "place"), list(cases()))
def test_a_hostile_value_stays_a_value(template, values, place):
    marker = at(values, place)
    if type(marker) is bool or (template, *place) == ("compose.yaml.j2", "startup_failures"):  # a switch; multiplied
        return
    plain = parsed(template, values)
    for hostile in HOSTILE:
        try:
            found = parsed(template, replaced(values, place, hostile))
        except TypeError:
            continue  # the template calculates with it: nothing was rendered
        # Health checks hold the value as a literal, which differs where YAML needs an escape; compare what it means.
        assert meaning(found) == meaning(swapped(plain, marker, hostile)), (template, place, hostile)


def meaning(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: meaning(item) for key, item in tree.items()}
    if isinstance(tree, list):
        return [meaning(item) for item in tree]
    if isinstance(tree, str) and tree.startswith("import "):
        return ast.dump(ast.parse(tree))
    return tree


@pytest.mark.parametrize(("template", "values", "place"), [case for case in cases() if type(at(*case[1:])) is str])
def test_nul_is_refused(template, values, place):
    used = text_of(template, values) != text_of(template, replaced(values, place, "other"))
    if used:
        with pytest.raises(ConfigError, match="NUL"):
            text_of(template, replaced(values, place, "a\0b"))


@pytest.mark.parametrize("key", HOSTILE)
def test_hostile_keys(key):
    assert json.loads(render("generation_config.json.j2", top_k_limit=1, generation={key: "x"}))[key] == "x"
    values = VALUES["compose.yaml.j2"] | {"environment": {key: "x"}}
    assert yaml.safe_load(render("compose.yaml.j2", **values))["services"]["server-0"]["environment"] == {key: "x"}


@pytest.mark.parametrize("number", [1e-05, 1e16, 0.1, 1.5, 1e-308, 12345678901234567890.0])
def test_floats_are_floats_in_yaml_too(number):
    values = VALUES["predict.yaml.j2"]
    generation = values["generation"] | {"temperature": number}
    found = parsed("predict.yaml.j2", values | {"generation": generation})
    assert found["model"]["model_config"]["temperature"] == number


@pytest.mark.parametrize("number", [float("nan"), float("inf"), [float("nan")]])
def test_what_json_has_not(number):
    with pytest.raises(ConfigError, match="NaN"):
        render("generation_config.json.j2", top_k_limit=1, generation={"x": number})
