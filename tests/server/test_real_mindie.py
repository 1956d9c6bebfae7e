"""What the real MindIE answers: each case in which this server and a real daemon were once found to differ."""

from __future__ import annotations

import dataclasses
import json
import re

import httpx
import pytest
from helpers.scripted import Scripted
from helpers.server import Server, nano_directory, shared_server, special_server

from telechat_mindie.commands.serve import serve
from telechat_mindie.errors import InputError
from telechat_mindie.server.fields import validate
from telechat_mindie.server.formats.mindie import NativeRequest
from telechat_mindie.server.formats.openai_requests import ChatRequest, CompletionRequest, Message
from telechat_mindie.server.formats.tgi import GeneralRequest, TgiRequest
from telechat_mindie.server.formats.triton import StopInfer, TritonText
from telechat_mindie.server.formats.vllm import VllmRequest
from telechat_mindie.server.http.errors import ApiError
from telechat_mindie.server.models import TokenizerRequest
from telechat_mindie.server.settings import checked_origin
from telechat_mindie.service import DEFAULT_GENERATION

CHAT = {"model": "nano", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 1}
TOOL = {"type": "function", "function": {"name": "天气", "parameters": {"type": "object", "properties": {}}}}
GENERATE, COMPLETION = {"inputs": "你好", "parameters": {"max_new_tokens": 1}}, {"model": "nano", "max_tokens": 1}
TENSOR = {"name": "input0", "shape": [1, 3], "datatype": "UINT32", "data": [-5, 6, 7]}


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


def user(content: object, **more: object) -> dict[str, object]:
    return CHAT | {"messages": [{"role": "user", "content": content}], **more}


def nested(levels: int) -> dict[str, object]:
    value: dict[str, object] = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return value


ANSWERED = {
    "TGI reads stream at / alone": ("/generate", GENERATE | {"stream": "x"}),
    "the path says that it is a stream": ("/generate_stream", GENERATE | {"stream": 5}),
    "included where there is nothing to stop at": ("/generate", {"prompt": "x", "include_stop_str_in_output": 1}),
    "the same in a chat": ("/v1/chat/completions", CHAT | {"include_stop_str_in_output": 1}),
    "do_decode of another type": ("/v1/tokenizer", {"inputs": "x", "do_decode": 1}),
    "typical_p of a tensor": (
        "/v2/models/nano/infer",
        {"inputs": [TENSOR | {"parameters": {"typical_p": "x"}}], "outputs": [{"name": "x"}]},
    ),
    "negative ids of a tensor": ("/v2/models/nano/infer", {"inputs": [TENSOR], "outputs": [{"name": "x"}]}),
    "a long stop text": ("/generate", {"prompt": "x", "stop": "y" * 1025, "max_tokens": 1}),
    "a long stop text of a chat": ("/v1/chat/completions", CHAT | {"stop": "y" * 32768}),
    "another role than OpenAI's": ("/v1/chat/completions", CHAT | {"messages": [{"role": "bot", "content": "x"}]}),
    "no tools as an object": ("/v1/chat/completions", CHAT | {"tools": {}}),
    "tools as someone wrote them": (
        "/v1/chat/completions",
        CHAT | {"tools": [{"type": "function", "function": {"name": "a", "description": 5, "parameters": "none"}}]},
    ),
    "no adapter, by its word": ("/generate", GENERATE | {"parameters": {"adapter_id": "None"}}),
    "a negative token": ("/v1/completions", COMPLETION | {"prompt": [-1]}),
    "negative and known tokens": ("/v1/completions", COMPLETION | {"prompt": [-5, 6]}),
    "a deep body": ("/generate", GENERATE | {"unread": nested(30)}),
    "a system message after the first": (
        "/v1/chat/completions",
        CHAT | {"messages": [*CHAT["messages"], {"role": "system", "content": "说"}]},
    ),
    "the developer's role": ("/v1/chat/completions", CHAT | {"messages": [{"role": "developer", "content": "x"}]}),
    "the developer's role beside tools": (
        "/v1/chat/completions",
        CHAT | {"messages": [{"role": "developer", "content": "x"}, *CHAT["messages"]], "tools": [TOOL]},
    ),
    "no calls, no content": (
        "/v1/chat/completions",
        CHAT | {"messages": [{"role": "assistant", "content": "", "tool_calls": []}, *CHAT["messages"]]},
    ),
    "calls of a user are not read": (
        "/v1/chat/completions",
        CHAT | {"messages": [{"role": "user", "content": "x", "tool_calls": 5}]},
    ),
    "empty content without tools": ("/v1/chat/completions", user("")),
    "an empty answer of a tool": (
        "/v1/chat/completions",
        CHAT | {"messages": [*CHAT["messages"], {"role": "tool", "tool_call_id": "1", "content": ""}], "tools": [TOOL]},
    ),
    "response_format is not read": ("/v1/chat/completions", CHAT | {"response_format": {"type": "json_object"}}),
}  # fmt: skip

PARTS = [{"type": "text", "text": "你好"}]
REFUSED = {
    "TGI's stream at /": ("/", GENERATE | {"stream": "x"}),
    "text parts, TGI": ("/generate", {"inputs": PARTS}),
    "text parts, vLLM": ("/generate", {"prompt": PARTS}),
    "text parts, native": ("/infer", {"inputs": PARTS}),
    "text parts, Triton": ("/v2/models/nano/generate", {"text_input": PARTS}),
    "null beside inputs": ("/infer", {"inputs": "x", "input_id": None}),
    "null beside input_id": ("/infer", {"inputs": None, "input_id": [4]}),
    "inputs of null": ("/infer", {"inputs": None}),
    "template variables of null": ("/v1/chat/completions", CHAT | {"chat_template_kwargs": None}),
    "enable_thinking as a text": ("/v1/chat/completions", CHAT | {"chat_template_kwargs": {"enable_thinking": "yes"}}),
    "enable_thinking of null": ("/v1/chat/completions", CHAT | {"chat_template_kwargs": {"enable_thinking": None}}),
    "included where stop is null": ("/generate", {"prompt": "x", "stop": None, "include_stop_str_in_output": 1}),
    "empty content beside tools": ("/v1/chat/completions", user("", tools=[TOOL])),
    "an empty system beside tools": (
        "/v1/chat/completions",
        CHAT | {"messages": [{"role": "system", "content": ""}, *CHAT["messages"]], "tools": [TOOL]},
    ),
    "another role beside tools": (
        "/v1/chat/completions",
        CHAT | {"messages": [{"role": "bot", "content": "x"}], "tools": [TOOL], "tool_choice": "none"},
    ),
    "an empty answer": ("/v1/chat/completions", CHAT | {"messages": [{"role": "assistant", "content": ""}]}),
    "a long stop text, TGI": ("/generate", GENERATE | {"parameters": {"stop": "y" * 1025}}),
    "a long stop text in a list": ("/generate", {"prompt": "x", "stop": ["y" * 1025]}),
    "several prompts": ("/v1/completions", COMPLETION | {"prompt": ["a", "b"]}),
    "one prompt in a list": ("/v1/completions", COMPLETION | {"prompt": ["a"]}),
    "several prompts of tokens": ("/v1/completions", COMPLETION | {"prompt": [[4], [5]]}),
    # Ours alone: MindIE takes these numbers modulo 2**32.
    "a wrap of 32 bits": ("/v1/chat/completions", CHAT | {"top_logprobs": 2**32}),
}  # fmt: skip


@pytest.mark.parametrize(("path", "body"), ANSWERED.values(), ids=ANSWERED)
def test_it_is_answered(server, path, body):
    response = server.post(path, body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(("path", "body"), REFUSED.values(), ids=REFUSED)
def test_it_is_refused(server, path, body):
    response = server.post(path, body)
    assert (response.status_code, response.json()["error_type"]) == (422, "Input Validation Error"), response.text


def test_usage_always_has_details(server):
    chat = server.post("/v1/chat/completions", CHAT).json()["usage"]
    completion = server.post("/v1/completions", COMPLETION | {"prompt": "你好"}).json()["usage"]
    stream = server.post("/v1/completions", COMPLETION | {"prompt": "你好", "stream": True}).text
    last = json.loads(stream.split("\n\n")[-3].removeprefix("data: "))["usage"]
    for usage in (chat, completion, last):
        assert list(usage) == ["prompt_tokens", "prompt_tokens_details", "completion_tokens", "total_tokens"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


OPENS = "{% for m in messages %}<_user>{{ m.content }}{% endfor %}<_bot><think>\n"
MAY_THINK = "{% for m in messages %}<_user>{{ m.content }}{% endfor %}<_bot>{# <think> #}"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        (OPENS, "好的\n</think>\n\n你好", "好的\n"),
        (OPENS, "好的", "好的"),  # cut off
        (OPENS, "</think>你好", ""),
        (MAY_THINK, "<think>好的</think>你好", "<think>好的"),
        (MAY_THINK, "你好</think>", ""),
        ("{% for m in messages %}<_user>{{ m.content }}{% endfor %}<_bot>", "你好", None),
    ],
)
def test_usage_counts_the_tokens_of_a_thought(stream, template, text, expected):
    scripted = Scripted(template)
    answer = scripted.ask(text, model="nano", messages=CHAT["messages"], stream=stream)
    event = answer.text.split("\n\n")[-3].removeprefix("data: ") if stream else answer.text
    usage = json.loads(event)["usage"]
    if expected is None:
        assert "completion_tokens_details" not in usage
        return
    assert list(usage)[2:4] == ["completion_tokens", "completion_tokens_details"]
    tokens = len(scripted.tokenizer.encode(expected, bare_prompt="raw")) if expected else 0
    if expected == text:  # the end of sequence belongs to a thought that was cut off
        tokens += 1
    assert usage["completion_tokens_details"] == {"reasoning_tokens": tokens}


def test_the_tokenizers_texts_are_as_many_as_its_tokens(server):
    text = "<_user>你好🙂<_end>"
    answer = server.post("/v1/tokenizer", {"inputs": text}).json()
    tokens = answer["tokens"]
    assert answer["token_number"] == len(tokens) and "".join(tokens) == "你好🙂"
    # Nothing for control tokens and the first bytes of a character, which is whole with its last.
    assert tokens[0] == tokens[-1] == "" and "🙂" in tokens and tokens.count("") >= 4


def test_the_models_datatypes(server):
    config = server.get("/v2/models/nano/config").json()
    assert config["input_datatype"] == config["output_datatype"] == "INT64"


class TestStopInfer:
    def test_an_unknown_id(self, server):
        response = server.post("/v2/models/nano/stopInfer", {"id": "unknown"})
        assert response.status_code == 500
        assert response.json()["error"] == "Stop request failed, internal failed."

    @pytest.mark.parametrize("path", ["/v2/models/null/generate_stream", "/v1/chat/completions"])
    def test_by_the_id_of_an_answer(self, path):
        """Also of another format, and without one of the client's own."""
        body = {"text_input": "说", "parameters": {"max_new_tokens": 1000}}
        if "chat" in path:
            body = {
                "model": "null",
                "messages": CHAT["messages"],
                "max_tokens": 1000,
                "ignore_eos": True,
                "stream": True,
            }
        with special_server(delay=0.01) as server, server.client() as client:
            with client.stream("POST", path, json=body) as response:
                lines = response.iter_lines()
                found = json.loads(next(line for line in lines if line).removeprefix("data:"))["id"]
                stop = {"id": found, "why": ["x"]}
                assert server.post("/v2/models/null/stopInfer", stop).json() == stop
                assert sum(1 for _ in lines) < 1000
            assert server.wait_until_idle()["runningRequestNum"] == 0


class TestTritonDetails:
    BODY = {"text_input": "你好", "parameters": {"max_new_tokens": 4, "details": True}}  # noqa: RUF012

    def test_whole(self, server):
        details = server.post("/v2/models/nano/generate", self.BODY).json()["details"]
        assert list(details)[-2:] == ["batch_size", "queue_wait_time"]
        assert details["batch_size"] == [1] * 4 and len(details["queue_wait_time"]) == 4
        assert all(isinstance(wait, int) and 0 <= wait < 10_000_000 for wait in details["queue_wait_time"])

    def test_stream(self, server):
        text = server.post("/v2/models/nano/generate_stream", self.BODY).text
        events = [json.loads(line.removeprefix("data:")) for line in text.split("\n\n")[:-1]]
        assert [event["details"]["batch_size"] for event in events] == [1] * 4
        assert all(isinstance(event["details"]["queue_wait_time"], int) for event in events)
        assert list(events[0])[-2:] == ["prefill_time", "decode_time"]

    def test_a_batch_and_a_wait(self):
        """Two answers of one step, and a third that waits for a place."""
        engine = {"max_batch_size": 2, "max_prefill_batch_size": 2}
        with special_server(delay=0.05, engine=engine) as server:
            long = {"prompt": "说", "n": 2, "temperature": 1.0, "max_tokens": 60, "ignore_eos": True, "stream": True}
            with server.client() as client, client.stream("POST", "/generate", json=long) as response:
                pieces = response.iter_bytes()
                next(pieces)
                details = server.post("/v2/models/null/generate", self.BODY).json()["details"]
                assert details["queue_wait_time"][0] > 50_000 > details["queue_wait_time"][1]  # microseconds
            assert details["batch_size"][0] in (1, 2)


class TestLibrary:
    @pytest.mark.parametrize("path", ["/health", "/v1/models", "/v2/models/nano/config", "/metrics", "/info", "/"])
    def test_head_is_get_without_a_body(self, server, path):
        with server.client() as client:
            head, get = client.head(path), client.get(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == get.headers["content-type"] if get.content else True
        assert abs(int(head.headers["content-length"]) - len(get.content)) < 200  # metrics change

    def test_head_of_what_is_not_there_or_does_something(self, server):
        with server.client() as client:
            for path in ("/nothing", "/generate", "/stopService", "/v2/models/other"):
                assert client.head(path).status_code == 404
        assert server.get("/health").status_code == 200

    def test_every_answer_has_a_name(self, server):
        answers = [
            server.get("/health"),
            server.get("/nothing"),
            server.post("/generate", GENERATE),
            server.post("/generate_stream", GENERATE),
            server.post("/generate", b"{"),
            server.get("/health", headers={"Origin": "http://evil.example"}),
        ]
        names = [answer.headers["requestuuid"] for answer in answers]
        assert len(set(names)) == len(names) and all(re.fullmatch("[0-9a-f]{32}", name) for name in names)
        assert any(name == b"RequestUUID" for name, _ in answers[0].headers.raw)

    @pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "GZIP", "gzip, br"])
    def test_compressed_bodies_are_not_read(self, server, encoding):
        response = server.post("/generate", GENERATE, headers={"Content-Encoding": encoding})
        assert response.status_code == 415 and response.json()["error_type"] == "Unsupported Media Type"
        assert len(response.headers["requestuuid"]) == 32
        assert server.post("/generate", GENERATE, headers={"Content-Encoding": "identity"}).status_code == 200

    def test_another_method_is_answered_at_once(self, server):
        """MindIE leaves DELETE on a POST route without an answer."""
        with server.client() as client:
            for method in ("DELETE", "PUT", "PATCH", "GET"):
                assert client.request(method, "/generate").json()["error_type"] == "NotFoundError"


def test_metrics_need_no_environment(server):
    assert server.get("/metrics").status_code == 200


def test_several_answers_are_all_there(server):
    body = {"model": "nano", "messages": CHAT["messages"], "n": 2, "temperature": 1.0, "max_tokens": 2}
    assert len(server.post("/v1/chat/completions", body).json()["choices"]) == 2


def test_the_developer_is_the_system(server):
    def prompt_tokens(role: str) -> int:
        messages = [{"role": role, "content": "说中文。"}, *CHAT["messages"]]
        return server.post("/v1/chat/completions", CHAT | {"messages": messages}).json()["usage"]["prompt_tokens"]

    assert prompt_tokens("developer") == prompt_tokens("system") != prompt_tokens("user")


def test_response_format_changes_nothing(server):
    body = CHAT | {"max_tokens": 8}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    answers = [
        server.post("/v1/chat/completions", body | more).json()["choices"]
        for more in ({}, {"response_format": {"type": "json_object"}}, {"response_format": schema})
    ]
    assert answers[0] == answers[1] == answers[2]


def test_several_prompts_are_refused_by_that_name(server):
    error = server.post("/v1/completions", COMPLETION | {"prompt": ["a", "b"]}).json()["error"]
    assert error.startswith("Parameter prompt must be one text or one list of tokens")


MESSAGE = {"role": "assistant", "content": "x"}
CALL = {"id": "1", "type": "function", "function": {"name": "a", "arguments": "{}"}}
SENTENCE = re.compile(
    r"Parameter [a-z_]+(\.([a-z_]+|\d+))* (is missing|must (be|have|match) \S.*, got \S.*)\.", re.DOTALL
)
ODD = (None, True, 7, -1, 2**70, 0.5, "", "x", "x" * 40_000, [], [7], [[]], ["x"], [{}], {}, {"a": 1}, {"type": "x"})


@pytest.mark.parametrize(
    ("model", "base", "inner"),
    [
        (TgiRequest, {"inputs": "x"}, "parameters"),
        (GeneralRequest, {"inputs": "x"}, "parameters"),
        (NativeRequest, {"inputs": "x"}, "parameters"),
        (TritonText, {"text_input": "x"}, "parameters"),
        (VllmRequest, {"prompt": "x"}, None),
        (CompletionRequest, COMPLETION | {"prompt": "x"}, None),
        (ChatRequest, CHAT, None),
        (TokenizerRequest, {"inputs": "x"}, None),
        (StopInfer, {"id": "x"}, None),
    ],
)
def test_what_is_said_of_a_wrong_field(model, base, inner):
    """Its path, in which no branch of a union is, one of a few verbs, and what was there."""
    bodies = [{**base, name: odd} for name in model.model_fields for odd in ODD]
    bodies += [{key: value for key, value in base.items() if key != name} for name in base]
    if inner is not None:
        names = model.model_fields[inner].annotation.model_fields
        bodies += [{**base, inner: {name: odd}} for name in names for odd in ODD]
    if model is ChatRequest:
        for odd in ODD:
            bodies += [{**base, "messages": [MESSAGE | {name: odd}]} for name in Message.model_fields]
            bodies += [{**base, "messages": [MESSAGE | {"tool_calls": [CALL | {name: odd}]}]} for name in CALL]
            bodies += [{**base, "tools": [TOOL | {name: odd}]} for name in TOOL]
            bodies += [{**base, "tool_choice": TOOL | {name: odd}} for name in TOOL]
            bodies += [{**base, "messages": [MESSAGE | {"content": [{"type": "text", "text": odd}]}]}]
    said = set()
    for body in bodies:
        try:
            validate(model, body)
        except ApiError as error:
            said.add(str(error))
    assert len(said) > len(model.model_fields)
    assert not [text for text in said if not SENTENCE.fullmatch(text) or len(text) > 300]


class TestOrigins:
    """`serve --allow-origin`: pages of other sites that may use the server."""

    PAGE = "http://localhost:5173"
    PREFLIGHT = {  # noqa: RUF012
        "Origin": PAGE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type,authorization",
        "Access-Control-Request-Private-Network": "true",  # Chrome's, on the way from a public page to this machine
        "Sec-Fetch-Site": "cross-site",
    }

    def ask(self, origins: tuple[str, ...], method: str, path: str, headers: dict[str, str]) -> httpx.Response:
        scripted = Scripted()
        scripted.settings = dataclasses.replace(scripted.settings, allowed_origins=origins)
        return scripted.send((method, path, None), headers=headers)[0]

    def test_none_are_allowed_by_default(self):
        response = self.ask((), "OPTIONS", "/v1/chat/completions", self.PREFLIGHT)
        assert response.status_code == 403 and "--allow-origin" in response.json()["error"]
        assert "access-control-allow-origin" not in response.headers

    @pytest.mark.parametrize("origins", [(PAGE,), ("https://other.example", PAGE), ("*",)])
    def test_a_page_that_is_allowed(self, origins):
        preflight = self.ask(origins, "OPTIONS", "/v1/chat/completions", self.PREFLIGHT)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] in (self.PAGE, "*")
        assert "POST" in preflight.headers["access-control-allow-methods"]
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
        assert preflight.headers["access-control-allow-private-network"] == "true"
        response = self.ask(origins, "GET", "/v1/models", {"Origin": self.PAGE, "Sec-Fetch-Site": "cross-site"})
        assert response.status_code == 200 and response.json()["data"]
        assert response.headers["access-control-allow-origin"] in (self.PAGE, "*")
        assert "RequestUUID" in response.headers["access-control-expose-headers"]

    def test_other_pages_are_not(self):
        for headers in (
            {"Origin": "https://evil.example"},
            {"Origin": "http://localhost:5174"},
            {"Origin": "null"},
            {"Origin": "http://["},
            {"Origin": self.PAGE, "Host": "["},
            {"Sec-Fetch-Site": "cross-site"},  # an image, say, which brings no origin
            {"Origin": self.PAGE, "Host": "evil.example"},  # a name that someone made point here
        ):
            response = self.ask((self.PAGE,), "GET", "/v1/models", headers)
            assert response.status_code == 403 and "access-control-allow-origin" not in response.headers

    def test_its_own_page_goes_on(self):
        own = {"Origin": "http://127.0.0.1", "Sec-Fetch-Site": "same-origin"}
        assert self.ask((self.PAGE,), "GET", "/v1/models", own).status_code == 200

    def test_the_commands_option(self, monkeypatch):
        found = []
        monkeypatch.setattr("telechat_mindie.server.run.serve", lambda _, settings, __: found.append(settings))
        for origins in ([], [self.PAGE, "https://App.example:8443/"]):
            serve(
                nano_directory(),
                None,
                None,
                None,
                mindie=DEFAULT_GENERATION,
                mindie_home=None,
                kv_gb=None,
                model_name=None,
                prefix_cache=False,
                chunked_prefill=False,
                allow_origin=origins,
                drain=1.0,
            )
        assert [settings.allowed_origins for settings in found] == [(), (self.PAGE, "https://app.example:8443")]

    @pytest.mark.parametrize("text", ["http://[::1]:5173", "http://xn--r8jz45g.jp", "chrome-extension://abc", "*"])
    def test_what_is_an_origin(self, text):
        assert checked_origin(text) == text

    @pytest.mark.parametrize(
        "text",
        [
            "null",
            "localhost:5173",
            "http://a.example/page",
            "file:///x",
            "http://u@a.b",
            "",
            "http://[::1",
            "https://app.example:443",
            "http://a:080",
            "http://a:",
            "http://a:x",
            "http://a:99999",
            "http:// a",
            "http://a\tb",
            "http://例え.jp",
            "https://*.example",
        ],
    )
    def test_what_is_no_origin(self, text):
        with pytest.raises(InputError, match="--allow-origin"):
            checked_origin(text)
