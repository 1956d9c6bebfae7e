"""The request log and /docs, through the server's own routes without a socket."""

from __future__ import annotations

import asyncio
import logging
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from helpers.scripted import Scripted

from telechat_mindie.server.docs_page import render
from telechat_mindie.server.http import request_log
from telechat_mindie.server.http.request_log import RequestLog

BODY = {"messages": [{"role": "user", "content": "你好\n\x9b"}], "max_tokens": 20}
CHAT = "/v1/chat/completions"


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, request_log.__name__)
    return caplog


def send(log, *requests, **settings):
    """The answers, and the lines of the log."""
    server = Scripted()
    server.settings = replace(server.settings, **settings)
    log.clear()
    answers = server.send(*requests, prepare=lambda _: server.say("好\n的"))
    return answers, [record.getMessage() for record in log.records if record.name == request_log.__name__]


def test_a_request_is_a_line_without_what_was_said(log):
    body = {"model": "nano", **BODY}
    (answer,), (line,) = send(log, ("POST", CHAT, body))
    usage = answer.json()["usage"]
    begin = f"POST {CHAT} 200 in={usage['prompt_tokens']} out={usage['completion_tokens']} ms="
    assert line.startswith(begin) and line.endswith(f" id={answer.headers['RequestUUID']}")
    assert re.fullmatch(r".* ms=\d+ id=[0-9a-f]{32}", line)
    assert "好" not in line and usage["completion_tokens"] > 1


def test_a_stream_is_a_line_with_all_its_tokens(log):
    (answer,), (line,) = send(log, ("POST", CHAT, {"model": "nano", "stream": True, **BODY}))
    tokens = re.search(r'"completion_tokens":(\d+)', answer.text)[1]
    assert f" out={tokens} " in line and "broken-off" not in line


def test_what_was_said_only_if_asked_for(log):
    _, (line,) = send(log, ("POST", CHAT, {"model": "nano", **BODY}), log_content=True)
    assert ' answer="好\\n的"' in line and "你好\\n\\u009b" in line
    assert "\n" not in line and "\x9b" not in line


def test_refusals_and_unknown_paths(log):
    requests = (("POST", CHAT, {"model": "nano"}), ("GET", "/nothing%0Ahere%1b[31m?key=secret", None))
    (refused, unknown), (first, second) = send(log, *requests)
    assert (refused.status_code, unknown.status_code) == (422, 404)
    assert first.startswith(f"POST {CHAT} 422 ms=") and "in=" not in first
    assert second.startswith("GET /nothing\\u000ahere\\u001b[31m 404 ms=") and "secret" not in second


def test_a_look_at_the_server_is_for_v_alone(log):
    look = ("GET", "/health", None), ("HEAD", "/v1/models", None)
    assert send(log, *look)[1] == []
    log.set_level(logging.DEBUG, request_log.__name__)
    assert [line.split(" ms=")[0] for line in send(log, *look)[1]] == ["GET /health 200", "HEAD /v1/models 200"]
    log.set_level(logging.WARNING, request_log.__name__)
    assert send(log, ("POST", CHAT, {}))[1] == []


def test_a_client_that_leaves_and_an_application_that_fails(log):
    async def begins(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})

    async def fails(scope, receive, send):
        raise RuntimeError

    async def call(app):
        async def send(_):
            pass

        await RequestLog(app, with_content=False)({"type": "http", "method": "POST", "path": "/"}, None, send)

    asyncio.run(call(begins))
    with pytest.raises(RuntimeError):
        asyncio.run(call(fails))
    first, second = log.messages
    assert first.startswith("POST / 200 ms=") and first.endswith("id=- broken-off")
    assert second.startswith("POST / - ms=") and second.endswith("broken-off")


class Page(HTMLParser):
    """What a page would load, and its text."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.tags, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "action", "srcset")]

    def handle_data(self, data):
        self.text += data


def test_docs_lists_every_route_and_asks_nobody(log):
    (page, document), _ = send(log, ("GET", "/docs", None), ("GET", "/openapi.json", None))
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src" not in policy and "connect-src" not in policy
    found = Page(page.text)
    assert found.loads == ["openapi.json"] and "script" not in found.tags and "url(" not in page.text
    paths = document.json()["paths"]
    assert len(paths) > 20
    listed = re.findall(r"<b>(\w+)</b> <code>([^<]*)</code>", page.text)
    assert set(listed) == {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert "temperature" in found.text and "above 0 to 1" in found.text


def test_docs_says_what_a_field_may_be_and_is_escaped():
    schema = {
        "title": "Body",
        "required": ["a"],
        "properties": {
            "a": {"type": "integer", "minimum": 1, "maximum": 5, "default": 3, "description": "<b>"},
            "b": {"anyOf": [{"type": "array", "items": {"$ref": "#/components/schemas/Part"}}, {"type": "null"}]},
            "c": {"enum": ["x", "y"]},
            "d": {"type": "number", "exclusiveMinimum": 0, "maximum": 3.4e38},
        },
    }
    part = {"properties": {"part": {"$ref": "#/components/schemas/Part"}}}  # of itself
    route = {"tags": ["g<"], "requestBody": {"content": {"application/json": {"schema": schema}}}}
    document = {
        "info": {"title": "t", "version": "1"},
        "paths": {"/p/{x}": {"post": route, "get": {}}},
        "components": {"schemas": {"Part": part}},
    }
    page = render(document)
    assert "<td>a</td><td>integer from 1 to 5, required, default 3</td><td>&lt;b&gt;</td>" in page
    assert "<td>b</td><td>list of Part</td>" in page and page.count("<td>part</td><td>Part</td>") == 1
    assert "<td>c</td><td>x or y</td>" in page and "<td>d</td><td>number above 0</td>" in page
    assert "<h2>g&lt;</h2>" in page and "<h2>other</h2>" in page and "No body." in page
