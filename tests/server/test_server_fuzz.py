"""Requests that no person writes: schemathesis on the server's own OpenAPI, and noise on the socket."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.server import shared_server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TRITON = ["/v2/models/nano/infer", "/v2/models/nano/generate", "/v2/models/nano/generate_stream"]
"""What schemathesis does not reach: to it the model's name in a path is any text."""

PATHS = ["/generate", "/", "/generate_stream", "/infer", "/v1/chat/completions", "/v1/completions", "/v1/tokenizer"]


def test_the_document_is_complete():
    document = shared_server().get("/openapi.json").json()
    for path in (*PATHS, "/v2/models/{model}/infer", "/v2/models/{model}/generate_stream"):
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert "properties" in schema or "anyOf" in schema
    names = set(document["components"]["schemas"])
    assert {"TgiParameters", "Message", "TritonInput"} <= names
    text = shared_server().get("/openapi.json").text
    assert "$defs" not in text and all(f"schemas/{name}" in text for name in ("Tool", "TritonParameters"))


@pytest.mark.slow
def test_schemathesis_finds_no_server_error_and_no_hang(tmp_path):
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "run",
        f"{shared_server().url}/openapi.json",
        "--checks=not_a_server_error",
        "--exclude-path-regex=/stopService",
        "--phases=examples,fuzzing",
        "--max-examples=25",
        "--request-timeout=20",
        "--seed=1",
        "--generation-database=none",
        "--no-color",
    ]
    environment = {**os.environ, "NO_PROXY": "*", "HTTP_PROXY": "", "http_proxy": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert shared_server().get("/health").status_code == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = """inputs prompt parameters stream messages model tools tool_choice max_tokens temperature top_k top_p seed
    stop n best_of logprobs top_logprobs details truncate priority timeout input_id text_input stop_token_ids
    outputs id shape data"""


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(st.sampled_from([*PATHS, *TRITON]), st.dictionaries(st.sampled_from(FIELDS.split()), JSON, max_size=6) | JSON)
def test_any_json_gets_an_answer(path, body):
    base = {"max_tokens": 2, "parameters": {"max_new_tokens": 2}} if isinstance(body, dict) else None
    raw = json.dumps({**base, **body} if base is not None else body).encode()
    response = shared_server().post(path, raw)
    assert response.status_code in (200, 422, 424), response.text
