"""MindIE's formats over a running server: fields, defaults, framing, finish reasons and errors."""

from __future__ import annotations

import json
import subprocess

import httpx
import pytest
from helpers.server import Server, shared_server

QUESTION = "生抽与老抽的区别？"
CONTROL_TOKENS = ("<_bot>", "<_end>", "<_user>", "<_pad>")


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


def whole_text(server: Server) -> str:
    body = {"inputs": QUESTION, "parameters": {"do_sample": False, "max_new_tokens": 512}}
    return str(server.post("/generate", body).json()["generated_text"])


def sse(response: httpx.Response, prefix: str = "data: ") -> list[str]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream"
    assert response.text.endswith("\n\n")
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith(prefix) for event in events)
    return [event.removeprefix(prefix) for event in events]


def test_the_readmes_curl_request_gets_a_clean_answer(server):
    # Verbatim but for the port: mindformers r1.6.0 research/telechat2/README.md:600.
    command = (
        'curl -w "\\ntime_total=%{time_total}\\n" -H "Accept: application/json" -H "Content-type: application/json" '
        '-X POST -d \'{"inputs": "生抽与老抽的区别？", "parameters": {"do_sample": false, "max_new_tokens": 512}, '
        f'"stream": false}}\' {server.url}/generate'
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    body, _, timing = done.stdout.rpartition("\ntime_total=")
    answer = json.loads(body)
    assert list(answer) == ["generated_text"] and float(timing) > 0
    assert answer["generated_text"].startswith("生抽和老抽都是酱油") and answer["generated_text"].endswith(
        "上色用老抽。"
    )
    assert not any(token in body for token in CONTROL_TOKENS)


class TestTgi:
    def test_details(self, server):
        body = {"inputs": QUESTION, "parameters": {"max_new_tokens": 3, "details": True, "decoder_input_details": True}}
        answer = server.post("/generate", body).json()
        details = answer["details"]
        assert list(details) == [
            "prompt_tokens",
            "finish_reason",
            "generated_tokens",
            "prefill",
            "seed",
            "tokens",
        ]
        assert details["finish_reason"] == "length" and details["generated_tokens"] == 3
        assert [list(token) for token in details["tokens"]] == [["id", "logprob", "special", "text"]] * 3
        assert len(details["prefill"]) == details["prompt_tokens"] and isinstance(details["seed"], int)

    def test_twenty_tokens_are_the_default(self, server):
        answer = server.post("/generate", {"inputs": QUESTION, "parameters": {"details": True}}).json()
        assert answer["details"]["generated_tokens"] == 20 and answer["details"]["prefill"] == []

    def test_the_general_route_answers_with_a_list(self, server):
        body = {"inputs": QUESTION, "parameters": {"max_new_tokens": 2}}
        assert [list(answer) for answer in server.post("/", body).json()] == [["generated_text"]]

    @pytest.mark.parametrize("path", ["/generate_stream", "/"])
    def test_stream(self, server, path):
        body = {"inputs": QUESTION, "stream": True, "parameters": {"max_new_tokens": 512, "details": True}}
        events = [json.loads(event) for event in sse(server.post(path, body))]
        assert all(list(event) == ["token", "generated_text", "details"] for event in events)
        assert all(list(event["token"]) == ["id", "text", "logprob", "special"] for event in events)
        assert all(event["generated_text"] is event["details"] is None for event in events[:-1])
        text = whole_text(server)
        assert events[-1]["generated_text"] == "".join(event["token"]["text"] for event in events) == text
        assert list(events[-1]["details"]) == ["prompt_tokens", "finish_reason", "generated_tokens", "seed"]
        assert events[-1]["details"]["finish_reason"] == "eos_token"
        assert events[-1]["details"]["generated_tokens"] == len(events)

    def test_stop_strings_return_full_text_and_truncate(self, server):
        parameters = {"max_new_tokens": 99, "stop": ["酱油", "zzz"], "return_full_text": True, "details": True}
        answer = server.post("/generate", {"inputs": QUESTION, "parameters": parameters}).json()
        assert answer["generated_text"] == f"{QUESTION} 生抽和老抽都是"
        assert answer["details"]["finish_reason"] == "stop_sequence"
        parameters = {"max_new_tokens": 1, "truncate": 5, "details": True}
        answer = server.post("/generate", {"inputs": QUESTION, "parameters": parameters}).json()
        assert answer["details"]["prompt_tokens"] == 5

    def test_null_counts_as_absent(self, server):
        body = {"inputs": QUESTION, "stream": None, "parameters": {"top_k": None, "max_new_tokens": None, "stop": None}}
        assert server.post("/generate", body).status_code == 200
        assert server.post("/generate", {"inputs": QUESTION, "parameters": None}).status_code == 200

    def test_the_content_type_does_not_matter(self, server):
        for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json; charset=gbk"):
            body = {"inputs": QUESTION, "parameters": {"max_new_tokens": 1}}
            assert server.post("/generate", body, headers={"Content-Type": kind}).status_code == 200


class TestVllm:
    def test_whole(self, server):
        answer = server.post("/generate", {"prompt": QUESTION, "temperature": 0}).json()
        assert answer == {"text": [f"{QUESTION} {whole_text(server)}"]}

    def test_a_stream_is_json_with_nul_bytes(self, server):
        response = server.post("/generate", {"prompt": QUESTION, "stream": True})
        events = response.content.split(b"\0")
        assert events.pop() == b""
        assert "".join(json.loads(event)["text"][0] for event in events) == whole_text(server)

    def test_best_of_gives_all_of_them(self, server):
        body = {"prompt": QUESTION, "best_of": 3, "n": 2, "temperature": 5.0, "seed": 1, "max_tokens": 8}
        texts = server.post("/generate", body).json()["text"]
        assert len(texts) == 3 and len(set(texts)) > 1
        assert texts == server.post("/generate", body).json()["text"], "the same seed gave other answers"
        response = server.post("/generate", body | {"stream": True})
        pieces = [json.loads(event)["text"] for event in response.content.split(b"\0")[:-1]]
        assert all(len(piece) == 3 for piece in pieces)
        streamed = {"".join(column) for column in zip(*pieces, strict=True)}
        assert streamed == {text.removeprefix(f"{QUESTION} ") for text in texts}

    def test_stop_tokens_and_included_stop_strings(self, server):
        tokens = server.post("/infer", {"inputs": QUESTION, "parameters": {"details": True}}).json()
        third = tokens["details"]["generated_token_ids"][2]
        stopped = server.post("/generate", {"prompt": QUESTION, "stop_token_ids": [third, -7, 2**40]}).json()
        text = stopped["text"][0].removeprefix(f"{QUESTION} ")
        assert text and whole_text(server).startswith(text) and len(text) < 5
        body = {"prompt": QUESTION, "stop": "酱油", "include_stop_str_in_output": True}
        assert server.post("/generate", body).json()["text"][0].endswith("酱油")


class TestNative:
    @pytest.mark.parametrize("path", ["/infer", "/infer_token"])
    def test_text_and_tokens_are_the_same_request(self, server, path):
        parameters = {"max_new_tokens": 6, "details": True, "priority": 1, "timeout": 100}
        by_text = server.post(path, {"inputs": QUESTION, "parameters": parameters}).json()
        assert list(by_text) == ["generated_text", "details"]
        assert list(by_text["details"]) == ["finish_reason", "generated_tokens", "generated_token_ids", "seed"]
        prompt = server.post("/generate", {"inputs": QUESTION, "parameters": {"decoder_input_details": True}}).json()
        ids = [token["id"] for token in prompt["details"]["prefill"]]
        by_tokens = server.post(path, {"input_id": ids, "parameters": parameters}).json()
        assert by_tokens["details"]["generated_token_ids"] == by_text["details"]["generated_token_ids"]

    def test_stream(self, server):
        body = {"inputs": QUESTION, "stream": True, "parameters": {"max_new_tokens": 5, "details": True}}
        events = [json.loads(event) for event in sse(server.post("/infer", body))]
        assert len(events) == 5
        assert isinstance(events[0]["prefill_time"], int) and events[0]["decode_time"] is None
        assert all(e["prefill_time"] is None and isinstance(e["decode_time"], int) for e in events[1:])
        assert all(list(event) == ["prefill_time", "decode_time", "token"] for event in events[:-1])
        last = events[-1]
        assert list(last) == ["prefill_time", "decode_time", "generated_text", "details", "token"]
        assert last["token"]["text"] is None and last["details"]["generated_tokens"] == 5
        assert last["generated_text"].startswith("".join(event["token"]["text"] for event in events[:-1]))


class TestTriton:
    def test_tokens(self, server):
        ids = [4, 5]
        given = {"name": "input0", "shape": [1, 2], "datatype": "UINT32", "data": ids}
        body = {
            "id": "mine-1",
            "inputs": [given | {"parameters": {"max_new_tokens": None, "top_k": 0, "seed": None}}],
            "outputs": [{"name": ""}],
        }
        answer = server.post("/v2/models/nano/infer", body).json()
        (output,) = answer["outputs"]
        assert answer["id"] == "mine-1"
        assert (output["name"], output["datatype"], output["shape"]) == ("output0", "UINT32", [1, len(output["data"])])
        assert 0 < len(output["data"]) <= 20  # what max_new_tokens is where it is null

    def test_text(self, server):
        body = {"id": "mine", "text_input": QUESTION, "parameters": {"max_new_tokens": 512, "details": True}}
        answer = server.post("/v2/models/nano/generate", body).json()
        assert answer["text_output"] == whole_text(server)
        assert (answer["id"], answer["model_name"], answer["model_version"]) == ("mine", "nano", None)
        assert answer["details"]["finish_reason"] == "eos_token"
        events = sse(server.post("/v2/models/nano/generate_stream", body), prefix="data:")
        assert not events[0].startswith(" ")
        texts = [json.loads(event) for event in events]
        assert "".join(event["text_output"] for event in texts) == whole_text(server)
        assert "finish_reason" not in texts[0]["details"] and texts[-1]["details"]["finish_reason"] == "eos_token"

    def test_metadata(self, server):
        assert server.get("/v2").json()["name"] == "MindIE Server"
        assert server.get("/v2/models/nano").json()["inputs"] == [
            {"name": "input0", "shape": [-1], "datatype": "UINT32"}
        ]
        config = server.get("/v2/models/nano/config").json()
        assert (config["model_name"], config["world_size"], config["model_weight_path"]) == ("nano", 1, "nano")
        assert server.get("/v2/models/nano/ready").status_code == 200
        for path in ("", "/config", "/ready", "/getSlotCount"):
            assert server.get(f"/v2/models/other{path}").json()["error_type"] == "NotFoundError"


class TestManagement:
    def test_health(self, server):
        for path in ("/health", "/v2/health/live", "/v2/health/ready"):
            response = server.get(path)
            assert (response.status_code, response.content) == (200, b"")
        assert server.get("/health/timed").json() == server.get("/health/timed-5").json() == {"status": "healthy"}
        for seconds in ("0", "601", "abc", "9999"):
            assert server.get(f"/health/timed-{seconds}").status_code == 404

    def test_slots_and_status(self, server):
        slots = server.get("/v2/models/nano/getSlotCount").json()
        resources = server.wait_until_idle()
        assert slots["total_slots"] == 32
        assert slots["available_tokens_length"] == 128 * resources["totalNpuBlockNums"]
        assert server.get("/v2/status").json()["resource"]["dpInstMap"] == [[0, resources["totalNpuBlockNums"]]]
        assert server.get("/v1/engine-server/running-status").json() == {"status": 1, "errors": []}
        assert server.get("/info").json()["models"][0]["model_id"] == "nano"
        assert server.get("/v1/config").json()["modelName"] == "nano"

    def test_metrics_have_mindies_names_and_count(self, server):
        def values():
            lines = server.get("/metrics").text.splitlines()
            return {line.split("{")[0]: float(line.split()[-1]) for line in lines if "{model_name=" in line}

        before = values()
        server.post("/generate", {"inputs": QUESTION, "parameters": {"max_new_tokens": 7}})
        server.post("/generate", {"nothing": 1})
        after = values()
        changes = {name: after[name] - before[name] for name in after if name in before}
        assert changes["request_received_total"] == 2
        assert changes["request_success_total"] == changes["request_failed_total"] == 1
        assert changes["generation_tokens_total"] == 7
        assert changes["time_to_first_token_seconds_count"] == changes["e2e_request_latency_seconds_count"] == 1
        assert changes["time_per_output_token_seconds_count"] == 6
        names = """num_requests_running num_requests_waiting num_requests_swapped num_preemptions_total
            prompt_tokens_total avg_prompt_throughput_toks_per_s avg_generation_throughput_toks_per_s
            failed_request_perc npu_cache_usage_perc cpu_cache_usage_perc npu_prefix_cache_hit_rate
            request_prompt_tokens_count request_generation_tokens_count"""
        assert set(names.split()) <= set(after)

    def test_metrics_json(self, server):
        names = [item["metric"][0]["__name__"] for item in server.get("/metrics-json").json()["result"]]
        assert names == ["TTFT", "TBT", "waitingInferRequestNum", "processingInferRequestNum", "remainBlocks"]

    def test_tokenizer(self, server):
        answer = server.post("/v1/tokenizer", {"inputs": "<_user>你好<_bot>"}).json()
        assert answer["token_number"] == len(answer["tokens"]) >= 3 and "".join(answer["tokens"]) == "你好"
        counted = server.post("/v1/tokenizer", {"inputs": "<_user>你好<_bot>", "do_decode": False}).json()
        assert counted == {"token_number": answer["token_number"], "tokens": []}


CHAT = {"model": "nano", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 1}
FAULTS = [
    ("/generate", {"inputs": QUESTION, "parameters": {"temperature": 0}}, 422, "temperature"),
    ("/generate", {"inputs": QUESTION, "parameters": {"temperature": "1"}}, 422, "temperature"),
    ("/generate", {"inputs": QUESTION, "parameters": {"top_p": 1}}, 422, "top_p"),
    ("/generate", {"inputs": QUESTION, "parameters": {"top_k": 0}}, 422, "top_k"),
    ("/generate", {"inputs": QUESTION, "parameters": {"seed": -1}}, 422, "seed"),
    ("/generate", {"inputs": QUESTION, "parameters": {"seed": 2**63}}, 422, "seed"),
    ("/generate", {"inputs": QUESTION, "parameters": {"max_new_tokens": 0}}, 422, "max_new_tokens"),
    ("/generate", {"inputs": QUESTION, "parameters": {"max_new_tokens": 2**31}}, 422, "max_new_tokens"),
    ("/generate", {"inputs": QUESTION, "parameters": {"max_new_tokens": 5.0}}, 422, "max_new_tokens"),
    ("/generate", {"inputs": QUESTION, "parameters": {"do_sample": 1}}, 422, "do_sample"),
    ("/generate", {"inputs": QUESTION, "parameters": {"stop": ["x"] * 1025}}, 422, "stop"),
    ("/generate", {"inputs": QUESTION, "parameters": {"stop": "x" * 1025}}, 422, "stop"),
    ("/generate", {"inputs": QUESTION, "parameters": {"stop": ["x" * 1000] * 33}}, 422, "stop"),
    ("/generate", {"inputs": QUESTION, "parameters": {"stop": [""]}}, 422, "stop"),
    ("/generate", {"inputs": QUESTION, "parameters": {"adapter_id": "mine"}}, 422, "mine"),
    ("/generate", {"inputs": QUESTION, "parameters": []}, 422, "parameters"),
    ("/generate_stream", {"inputs": QUESTION, "parameters": {"decoder_input_details": True}}, 422, "decoder_input"),
    ("/generate", {"inputs": ""}, 422, "inputs"),
    ("/generate", {"inputs": 7}, 422, "inputs"),
    ("/generate", {"inputs": [{"type": "image_url", "image_url": "x"}]}, 422, "inputs"),
    ("/generate", {"text": "x"}, 422, "`inputs` or `prompt`"),
    ("/generate", {"inputs": "你" * 5000}, 424, "too long"),
    ("/generate", {"prompt": QUESTION, "top_k": 0}, 422, "top_k"),
    ("/generate", {"prompt": QUESTION, "n": 129}, 422, "n must"),
    ("/generate", {"prompt": QUESTION, "n": 2}, 422, "temperature"),
    ("/generate", {"prompt": QUESTION, "n": 3, "best_of": 2, "temperature": 1}, 422, "best_of"),
    ("/generate", {"prompt": QUESTION, "presence_penalty": 2.1}, 422, "presence_penalty"),
    ("/generate", {"prompt": QUESTION, "stop_token_ids": list(range(2000))}, 422, "stop_token_ids"),
    ("/generate", {"prompt": QUESTION, "model": "adapter"}, 422, "adapter"),
    ("/infer", {"inputs": QUESTION, "input_id": [4]}, 422, "either"),
    ("/infer", {}, 422, "either"),
    ("/infer", {"input_id": []}, 422, "input_id"),
    ("/infer", {"input_id": [10**6]}, 424, "vocabulary"),
    ("/infer", {"input_id": [2**21]}, 422, "input_id"),
    ("/infer", {"input_id": [4] * 5000}, 424, "too long"),
    ("/infer", {"inputs": QUESTION, "parameters": {"priority": 6}}, 422, "priority"),
    ("/infer", {"inputs": QUESTION, "parameters": {"timeout": 65536}}, 422, "timeout"),
    ("/v2/models/other/generate", {"text_input": QUESTION}, 404, "other"),
    ("/v2/models/nano/generate", {"text_input": QUESTION, "id": "a b"}, 422, "id"),
    ("/v2/models/nano/infer", {"inputs": [], "outputs": [{"name": "x"}]}, 422, "inputs"),
    ("/v2/models/nano/stopInfer", {"id": "unknown"}, 500, "Stop request failed, internal failed."),
    ("/v2/models/nano/stopInfer", {"id": "a b"}, 422, "id must match"),
    ("/v1/chat/completions", CHAT | {"model": "other"}, 422, "other"),
    ("/v1/chat/completions", CHAT | {"messages": []}, 422, "messages"),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "robot", "content": "x"}]}, 422, "role"),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": None}]}, 422, "content"),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "tool", "content": "x"}]}, 422, "tool_call_id"),
    ("/v1/chat/completions", CHAT | {"messages": CHAT["messages"] + [{"role": "assistant"}]}, 422, "messages.1"),
    ("/v1/chat/completions", CHAT | {"top_logprobs": 21}, 422, "top_logprobs"),
    ("/v1/chat/completions", CHAT | {"logprobs": False, "top_logprobs": 1}, 422, "top_logprobs"),
    ("/v1/chat/completions", CHAT | {"use_beam_search": True}, 422, "beam"),
    ("/v1/chat/completions", CHAT | {"repetition_penalty": 2.5}, 422, "repetition_penalty"),
    ("/v1/chat/completions", CHAT | {"tools": [{"type": "function", "function": {"name": "a b"}}]}, 422, "name"),
    ("/v1/chat/completions", CHAT | {"tool_choice": "maybe"}, 422, "tool_choice"),
    ("/v1/completions", {"model": "nano", "prompt": []}, 422, "prompt"),
    ("/v1/completions", {"model": "nano", "prompt": "x", "logprobs": 6}, 422, "logprobs"),
    ("/v1/tokenizer", {"inputs": ""}, 422, "inputs"),
    ("/v1/nothing", {}, 404, "/v1/nothing"),
    ("/health", {}, 404, "POST"),
]
TYPES = {
    404: "NotFoundError",
    422: "Input Validation Error",
    424: "Generation Error",
    500: "Incomplete Generation",
}


@pytest.mark.parametrize(("path", "body", "status", "says"), FAULTS)
def test_faults(server, path, body, status, says):
    response = server.post(path, body)
    assert response.status_code == status, response.text
    answer = response.json()
    assert list(answer) == ["error", "error_type"] and answer["error_type"] == TYPES[status]
    assert says in answer["error"]
    assert len(answer["error"]) < 400


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"inputs": "x", }',
        b'{"inputs": "\xff\xfe"}',
        b'{"inputs": "\\ud800"}',
        b'{"inputs": "x", "parameters": {"temperature": NaN}}',
        b'{"inputs": "x", "parameters": {"temperature": 1e999}}',
        b'{"inputs": "x", "parameters": {"seed": ' + b"9" * 5000 + b"}}",
        b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"inputs": ' + b'{"a":' * 12 + b"1" + b"}" * 12 + b"}",
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/infer", "/v1/tokenizer"])
def test_bodies_that_are_no_requests(server, path, raw):
    response = server.post(path, raw)
    assert response.status_code == 422 and response.json()["error_type"] == "Input Validation Error"
