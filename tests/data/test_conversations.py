"""Each form of record as messages."""

from __future__ import annotations

import pytest

from telechat_mindie.data.conversations import FORMS, read_conversation
from telechat_mindie.errors import InputError


def said(record, form=None):
    return [(message["role"], message["content"]) for message in read_conversation(record, form).messages]


U, A, S = "user", "assistant", "system"
SAME = [(S, "s"), (U, "q1"), (A, "a1"), (U, "q2"), (A, "a2")]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": role, "content": content} for role, content in SAME]},
        {
            "conversations": [
                {"from": who, "value": text}
                for who, (_, text) in zip(["system", "human", "gpt", "user", "bot"], SAME, strict=True)
            ]
        },
        {
            "system": "s",
            "conversations": [
                {"from": "human", "value": "q1"},
                {"from": "gpt", "value": "a1"},
                {"from": "human", "value": "q2"},
                {"from": "gpt", "value": "a2"},
            ],
        },
        {"system": "s", "dialog": [{"role": role, "content": content} for role, content in SAME[1:]]},
        {"system": "s", "history": [["q1", "a1"]], "instruction": "q2", "input": "", "output": "a2"},
        {"system": "s", "input": "<_user>q1<_bot>a1<_user>q2", "output": "a2"},
        {"input": "<_system>s\n<_user>q1<_bot>a1<_end>\n<_user>q2<_bot>", "output": "a2<_end>"},
        {"input": "<_pad><_pad> <_start><_system>s<_user>q1<_bot>a1<_user>q2", "output": "a2"},
    ],
)
def test_forms_say_the_same(record):
    assert said(record) == SAME


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("q", ["q"]),
        ("\n<_user>q", ["q"]),
        ("  q  ", ["  q  "]),
        ("<_user>  q ", ["  q "]),
        ("", [""]),
        ("<_user>什么是<_end>标记？", ["什么是<_end>标记？"]),
        ("<_user>a<_user>b", ["a<_user>b"]),
        ("<_user>q1<_bot>a<_bot>b<_user>q2", ["q1", "a<_bot>b", "q2"]),
    ],
)
def test_a_marker_counts_where_it_can_be_one(question, expected):
    assert [text for _, text in said({"input": question, "output": "a"})] == [*expected, "a"]


def test_alpaca_puts_the_input_under_the_instruction():
    assert said({"instruction": "翻译", "input": "hello", "output": "你好"}) == [(U, "翻译\nhello"), (A, "你好")]


def test_tools_and_calls():
    tool = {"type": "function", "function": {"name": "f"}}
    record = {
        "tools": '[{"type": "function", "function": {"name": "f"}}]',
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "r"},
            {"from": "gpt", "value": "a"},
        ],
    }
    conversation = read_conversation(record)
    assert conversation.tools == [tool]
    assert conversation.messages[1]["tool_calls"] == [{"name": "f", "arguments": {"x": 1}}]
    assert [message["role"] for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]


def test_the_form_may_be_said():
    record = {"messages": [{"role": "user", "content": "x"}], "input": "q", "output": "a"}
    assert said(record, "pair") == [(U, "q"), (A, "a")]


@pytest.mark.parametrize(
    ("record", "where"),
    [
        ({}, "unknown form"),
        ({"question": "q"}, "unknown form"),
        ({"input": "q"}, "output: is missing"),
        ({"input": None, "output": "a"}, "input: is missing"),
        ({"input": "q", "output": 42}, "output: is not a text"),
        ({"input": "<_user>q<_bot>a", "output": "b"}, "ends with an answer"),
        ({"input": "<_system>s", "output": "a"}, "has no question"),
        ({"system": "s", "input": "<_system>t<_user>q", "output": "a"}, "another `system`"),
        ({"messages": []}, "messages: is not a list of turns"),
        ({"messages": "q"}, "messages: is not a list of turns"),
        ({"messages": ["q"]}, "messages[0]: is not an object"),
        ({"conversations": [{"from": "alien", "value": "q"}]}, "conversations[0].from: is unknown"),
        ({"conversations": [{"from": "gpt"}]}, "conversations[0].value: is missing"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "is not valid JSON"),
        ({"dialog": [{"role": "user", "content": "q"}], "tools": {}}, "tools: is not a list"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, "history[0]"),
        ({"instruction": "q", "input": ["x"], "output": "a"}, "input: is not a text"),
    ],
)
def test_faults_name_the_field(record, where):
    with pytest.raises(InputError) as caught:
        read_conversation(record)
    assert where in str(caught.value)


def test_every_form_shows_its_own_field():
    assert all(f'"{form.field}"' in form.example for form in FORMS.values())
