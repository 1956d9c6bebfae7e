"""Thoughts and tool calls of answers: the parsers, and a model that says what a test wants, behind the real routes."""

from __future__ import annotations

import itertools
import json

import pytest
from helpers.scripted import Scripted
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_mindie.server.formats.chat_parts import ChatParts, message
from telechat_mindie.server.formats.tool_calls import ToolCallParser
from telechat_mindie.text.thoughts import Piece, ThoughtParser, without_thought, without_thoughts

TURNS = """{% for m in messages %}{% if m.role == 'assistant' %}<_bot>{{ m.content.split('</think>')[-1] }}<_end>
{% else %}<_user>{{ m.content }}{% endif %}{% endfor %}"""
PLAIN = TURNS + "{% if add_generation_prompt %}<_bot>{% endif %}"
OPENS = TURNS + "{% if add_generation_prompt %}<_bot><think>\n{% endif %}"
CHOOSES = TURNS + (
    "{% if add_generation_prompt %}<_bot>{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CALL = '<tool_call>\n{"name": "天气", "arguments": {"地点": "北京"}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "天气", "parameters": {"type": "object", "properties": {}}}}]

SPECIAL_TAGS = {
    str(index): {"content": name, "special": True}
    for index, name in enumerate(("<tool_call>", "</tool_call>", "<think>", "</think>"), 9)
}


def split(text, **options):
    parser = ThoughtParser(**options)
    return [*parser.put(text), *parser.flush()]


@pytest.mark.parametrize(
    ("opened", "text", "thought", "answer"),
    [
        (True, "a\n</think>\n\nb", "a\n", "\n\nb"),
        (True, "<think>\na</think>b", "\na", "b"),  # the model repeats the tag of its prompt
        (True, "\n<think>a</think>b", "a", "b"),
        (True, "</think>b", "", "b"),
        (True, "cut off </thi", "cut off </thi", ""),
        (True, "\n", "\n", ""),
        (False, "<think>\na\n</think>\n\nb", "\na\n", "\n\nb"),
        (False, " \n<think>a", "a", ""),
        (False, "b <think>c</think> d", "", "b <think>c</think> d"),
        (False, "b</think>", "", "b</think>"),
        (False, "<thin", "", "<thin"),
        (False, "<thing>", "", "<thing>"),
        (False, "<think>a</think>b<think>c</think>", "a", "b<think>c</think>"),
        (False, "", "", ""),
    ],
)
def test_the_thought_of_a_whole_answer(opened, text, thought, answer):
    pieces = split(text, opened=opened)
    assert "".join(piece.text for piece in pieces if piece.is_thought) == thought
    assert "".join(piece.text for piece in pieces if not piece.is_thought) == answer
    assert all(piece.text for piece in pieces)


def test_a_model_that_does_not_think_is_left_alone():
    assert split("<think>a</think>b", expected=False) == [Piece("<think>a</think>b")]


TEXTS = st.lists(
    st.sampled_from(
        ["<think>", "</think>", "<", "<th", "</", "</think", "<tool_call>", CALL, CALL[:-9], " ", "\n", "好", "b"]
    ),
    max_size=12,
).map("".join)


@settings(max_examples=400, deadline=None)
@given(st.data(), TEXTS, st.booleans(), st.booleans(), st.booleans())
def test_however_an_answer_is_cut_its_parts_are_the_same(data, text, opened, expected, with_tools):
    def fresh():
        thoughts = ThoughtParser(opened=opened, expected=opened or expected)
        return ChatParts(thoughts, ToolCallParser() if with_tools else None)

    whole = message(fresh(), text)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=len(text))))
    parts, streamed = fresh(), {"content": "", "reasoning_content": "", "tool_calls": []}
    bounds = [0, *cuts, len(text)]
    for number, (start, end) in enumerate(itertools.pairwise(bounds), 1):
        for delta in parts.put(text[start:end], is_last=number == len(bounds) - 1):
            ((name, value),) = delta.items()
            assert value
            streamed[name] += value
    assert streamed["content"] == whole["content"]
    assert streamed["reasoning_content"] == whole.get("reasoning_content", "")
    called = [call["function"] for call in whole["tool_calls"]]
    assert [call["function"] for call in streamed["tool_calls"]] == called
    if not with_tools and not opened and not expected:
        assert whole["content"] == text


def test_history_without_thoughts():
    assert without_thought("<think>\na\n</think>\n\nb</think>c") == "b</think>c"
    assert without_thought("a\n</think>\n\nb") == "b"
    assert without_thought("</think>\nb") == "b"
    assert without_thought("the tag </think> ends a thought") == "the tag </think> ends a thought"
    assert without_thought("<think>cut off") == "<think>cut off"
    turns = [{"role": "user", "content": "a\n</think>\nb"}, {"role": "assistant", "content": "a\n</think>\nb"}]
    assert without_thoughts(turns, "no thoughts") == turns
    assert without_thoughts(turns, "<think>{{ split('</think>') }}") == turns  # the template does it
    assert without_thoughts(turns, "<_bot><think>\n") == [turns[0], {"role": "assistant", "content": "b"}]


def both(test):
    return pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])(test)


@both
class TestRoutes:
    def test_a_thought_that_the_prompt_opened(self, stream):
        server = Scripted(OPENS)
        found, reason = server.chat("想一想\n</think>\n\n你好！", stream)
        assert server.prompt.endswith("<_bot><think>\n")
        assert found == {
            "role": "assistant",
            "content": "\n\n你好！",
            "reasoning_content": "想一想\n",
            "tool_calls": [],
        }
        assert reason == "stop"

    def test_an_answer_that_ends_in_its_thought(self, stream):
        found, reason = Scripted(OPENS).chat("想一想想一想想一想", stream, max_tokens=3)
        assert found["content"] == "" and "想一想想一想想一想".startswith(found["reasoning_content"])
        assert found["reasoning_content"] and reason == "length"

    def test_a_model_that_opens_its_thought_itself(self, stream):
        server = Scripted(CHOOSES)
        found, _ = server.chat("<think>\n想\n</think>\n\n好", stream)
        assert (found["reasoning_content"], found["content"]) == ("\n想\n", "\n\n好")
        assert server.prompt.endswith("<_bot>")

    def test_thinking_can_be_switched_off(self, stream):
        server = Scripted(CHOOSES)
        found, _ = server.chat("好", stream, chat_template_kwargs={"enable_thinking": False})
        assert server.prompt.endswith("</think>\n\n")
        assert found == {"role": "assistant", "content": "好", "tool_calls": []}

    def test_the_prompt_has_no_earlier_thoughts(self, stream):
        server = Scripted(OPENS)
        history = [
            {"role": "user", "content": "一"},
            {"role": "assistant", "content": "旧想</think>二", "reasoning_content": "旧想"},
            {"role": "assistant", "content": "", "reasoning_content": "旧想"},
            {"role": "user", "content": "三"},
        ]
        server.chat("x</think>y", stream, history)
        assert "二" in server.prompt and "旧想" not in server.prompt

    def test_a_model_without_thoughts_is_untouched(self, stream):
        found, _ = Scripted().chat("<think>a</think>b", stream)
        assert found == {"role": "assistant", "content": "<think>a</think>b", "tool_calls": []}

    @pytest.mark.parametrize("skip", [False, True])
    def test_a_tool_call_behind_a_thought(self, stream, skip):
        text = f"先{CALL}想\n</think>\n\n{CALL}\n{CALL}"
        found, reason = Scripted(OPENS).chat(text, stream, tools=TOOLS, skip_special_tokens=skip)
        assert found["reasoning_content"] == f"先{CALL}想\n" and found["content"] == "" and reason == "tool_calls"
        assert len({call["id"] for call in found["tool_calls"]}) == 2
        for call in found["tool_calls"]:
            assert call["type"] == "function" and call["function"]["name"] == "天气"
            assert json.loads(call["function"]["arguments"]) == {"地点": "北京"}

    @pytest.mark.parametrize("skip", [False, True])
    def test_tags_that_are_special_tokens(self, stream, skip):
        server = Scripted(OPENS, added_tokens_decoder=SPECIAL_TAGS)
        found, reason = server.chat(f"想</think>{CALL}", stream, tools=TOOLS, skip_special_tokens=skip)
        assert (found["reasoning_content"], found["content"], reason) == ("想", "", "tool_calls")
        assert found["tool_calls"][0]["function"]["name"] == "天气"

    @pytest.mark.parametrize("template", [PLAIN, OPENS], ids=["plain", "thinking"])
    def test_tags_that_nobody_looks_for_are_skipped_as_others(self, stream, template):
        server = Scripted(template, added_tokens_decoder=SPECIAL_TAGS)
        other = {"type": "function", "function": {"name": "别的"}}
        found, reason = server.chat(
            f"<think>想</think>{CALL}", stream, tools=TOOLS, tool_choice=other, skip_special_tokens=True
        )
        said = CALL.replace("<tool_call>", " ").removesuffix("</tool_call>")
        assert found["content"] == (said if template is OPENS else f"想{said}") and reason == "stop"
        assert found.get("reasoning_content") == (" 想" if template is OPENS else None) and found["tool_calls"] == []

    def test_the_template_for_tools_says_whether_the_model_thinks_with_them(self, stream):
        only_opens = "{% for m in messages %}<_user>{{ m.content }}{% endfor %}<_bot><think>\n"
        history = [
            {"role": "user", "content": "一"},
            {"role": "assistant", "content": "旧想\n</think>\n\n二"},
            {"role": "user", "content": "三"},
        ]
        for templates, thinks_with_tools in (
            ({"default": PLAIN, "tool_use": CHOOSES}, True),
            ({"default": CHOOSES, "tool_use": PLAIN}, False),
            ({"default": PLAIN, "tool_use": only_opens}, True),
        ):
            server = Scripted(templates)
            found, _ = server.chat("<think>想</think>好", stream, history, tools=TOOLS)
            thought, content = ("想", "好") if thinks_with_tools else (None, "<think>想</think>好")
            assert (found.get("reasoning_content"), found["content"]) == (thought, content)
            assert "二" in server.prompt and "旧想" not in server.prompt

    def test_a_tool_call_and_the_round_trip_of_its_result(self, stream):
        found, reason = Scripted().chat(f"查一下。\n{CALL}", stream, tools=TOOLS)
        assert found["content"] == "查一下。" and reason == "tool_calls"
        (call,) = found["tool_calls"]
        result = {"role": "tool", "tool_call_id": call["id"], "content": "晴"}
        found, reason = Scripted().chat(
            "天晴。", stream, [{"role": "user", "content": "北京天气"}, found, result], tools=TOOLS
        )
        assert found == {"role": "assistant", "content": "天晴。", "tool_calls": []} and reason == "stop"

    def test_without_tools_a_call_is_text(self, stream):
        found, reason = Scripted().chat(CALL, stream)
        assert found == {"role": "assistant", "content": CALL, "tool_calls": []} and reason == "stop"


def test_a_developer_is_the_system():
    prompts = []
    for role in ("system", "developer"):
        server = Scripted()
        server.chat("好", False, [{"role": role, "content": "简短"}, {"role": "user", "content": "你好"}])
        prompts.append(server.prompt)
    assert prompts[0] == prompts[1] and "简短" in prompts[0]


def test_every_event_repeats_the_text_where_the_service_says_so():
    found, _ = Scripted(OPENS, full_text=True).chat("想一想</think>你好", stream=True)
    assert (found["reasoning_content"], found["content"]) == ("想一想", "你好")


def test_log_probabilities_of_held_tokens_are_not_lost():
    body = {"model": "nano", "messages": [{"role": "user", "content": "你好"}], "stream": True, "logprobs": True}
    text = f"想</think>好{CALL}"
    events = Scripted(OPENS).ask(text, **body, tools=TOOLS).text.split("\n\n")[:-2]
    reports = [json.loads(event.removeprefix("data: "))["choices"][0]["logprobs"] for event in events]
    tokens = [entry["token"] for report in reports if report for entry in report["content"]]
    assert "".join(tokens).startswith(text)


@pytest.mark.parametrize(
    ("path", "body", "read"),
    [
        ("/generate", {"inputs": "你好", "parameters": {"max_new_tokens": 90}}, lambda found: found["generated_text"]),
        ("/infer", {"inputs": "你好", "parameters": {"max_new_tokens": 90}}, lambda found: found["generated_text"]),
        ("/generate", {"prompt": "你好"}, lambda found: found["text"][0].removeprefix("你好 ")),
        ("/v1/completions", {"model": "nano", "prompt": "你好"}, lambda found: found["choices"][0]["text"]),
    ],
)
def test_the_other_routes_give_the_text_as_it_is(path, body, read):
    text = f"想\n</think>\n{CALL}"
    assert read(Scripted(OPENS).ask(text, path, **body).json()) == text


def test_what_turns_thinking_on_is_true_or_false():
    with pytest.raises(AssertionError, match=r"chat_template_kwargs\.enable_thinking"):
        Scripted(CHOOSES).chat("好", False, chat_template_kwargs={"enable_thinking": "yes"})
