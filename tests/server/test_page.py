"""The chat page, in a real browser against a service that answers as a test wants: asking, answers, settings, looks."""

from __future__ import annotations

import json
import re

import pytest
from helpers.page import ask, ask_slowly, asked, press, reload, start, texts, wait_for_end, wait_until, watch
from helpers.server import shared_server

from telechat_mindie.server.page import PAGE_HEADERS, PAGE_POLICY, page_files

HOSTILE = '<img src="/pwned" onerror="window.pwned = 1"><script>window.pwned = 1</script>'


def test_the_policy_admits_the_servers_own_files_and_nothing_else():
    files = page_files()
    assert "unsafe" not in PAGE_POLICY and "default-src 'none'" in PAGE_POLICY
    assert {"script-src 'self'", "connect-src 'self'", "trusted-types 'none'"} <= set(PAGE_POLICY.split("; "))
    ours = {path: content.decode() for path, (content, _) in files.items() if "vendor" not in path}
    html = ours["/"]
    assert re.findall(r"<style|\s(?:on\w+|style)=|<script[^>]*>[^<]", html) == []
    named = set(re.findall(r'(?:src|href)="(page/[^"]*)"', html))
    assert {f"/{name}" for name in named} <= files.keys() and len(named) == 4
    for path, text in ours.items():
        assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text.replace("https?:", "")) == [], path
        assert re.findall("innerHTML|outerHTML|insertAdjacentHTML|document.write|eval\\(", text) == [], path


def test_the_embedded_server_has_the_pages_files():
    server = shared_server()
    for path, (content, kind) in page_files().items():
        response = server.get(path)
        assert (response.status_code, response.content) == (200, content)
        assert response.headers["content-type"] == kind
        assert {name: response.headers[name] for name in PAGE_HEADERS} == PAGE_HEADERS
    assert server.get("/page/vendor/marked/LICENSE").status_code == 404
    assert server.get("/page/../page.py").status_code == 404


SETTINGS = {
    "Temperature": "0.5",
    "top_p": "0.9",
    "top_k": "7",
    "Max tokens": "2",
    "Repetition penalty": "1.1",
    "Presence penalty": "0.4",
    "Frequency penalty": "-0.5",
    "Seed": "3",
    "Stop strings": "END\n\na\\nb\\\\\n",
}


def test_a_conversation(fake, visit):
    page = visit()
    wait_until(page, "document.getElementById('model').textContent === 'fake'")
    first = ask_slowly(page, fake, "one")
    assert first.locator(".text").text_content() == "你好，世界"
    assert re.fullmatch(r"3 tokens · First token \d+ ms · [\d.]+ tok/s", first.locator(".foot").text_content())
    assert int(page.locator("#ttft").text_content()) >= 0 and float(page.locator("#speed").text_content()) > 0
    page.get_by_label("System prompt").fill("short")
    for label, value in SETTINGS.items():
        page.get_by_label(label, exact=True).fill(value)
    second = ask(page, "two")
    assert second.locator(".text").text_content() == "你好"
    assert second.locator(".foot").text_content().endswith("cut for its length")
    bodies = asked(fake)
    user = {"role": "user", "content": "one"}
    assert bodies[0] == {"model": "fake", "messages": [user], "stream": True}
    assert bodies[1] == {
        "model": "fake",
        "messages": [
            {"role": "system", "content": "short"},
            user,
            {"role": "assistant", "content": "你好，世界"},
            {"role": "user", "content": "two"},
        ],
        "stream": True,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "max_tokens": 2,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.4,
        "frequency_penalty": -0.5,
        "seed": 3,
        "stop": ["END", "a\nb\\"],
    }
    press(page, "New chat")
    assert page.locator(".turn").count() == 0 and page.locator("#welcome").is_visible()
    ask(page, "three")
    assert [message["content"] for message in asked(fake)[2]["messages"]] == ["short", "three"]


def test_the_embedded_server(visit):
    server = shared_server()
    page = visit(server.url)
    throughputs = watch(page, "throughput")
    answer = ask(page, "生抽与老抽的区别？")
    assert answer.locator(".text").text_content().startswith("生抽和老抽都是酱油")
    foot = answer.locator(".foot").text_content()
    assert re.fullmatch(r"\d\d tokens · First token \d+ ms(?: · [\d.]+ tok/s)?", foot)  # none if it came at once
    wait_until(page, f"{throughputs}.some((text) => Number(text) > 0)")
    wait_until(page, "document.getElementById('running').textContent === '0'")  # the figures come once a second
    assert page.locator("#waiting").text_content() == "0"
    assert page.locator("#kv").text_content().endswith("%")
    assert "prompt: is too long" in ask(page, "长" * 3000).get_by_role("alert").text_content()


def test_an_answer_is_shown_as_it_comes(fake, visit):
    fake.pieces, fake.delay = ["x"] * 3000, 0.02
    page = visit()
    start(page, "long")
    lengths = []
    for size in (3, 10, 20):
        least = max([size, *(length + 1 for length in lengths)])
        wait_until(page, f"document.querySelector('.assistant .text').textContent.length >= {least}")
        lengths.append(len(page.locator(".assistant .text").text_content()))
    assert lengths[0] < lengths[1] < lengths[2] < 3000
    wait_until(page, "document.getElementById('running').textContent === '1'")


@pytest.mark.parametrize("how", ["button", "key"])
def test_an_answer_can_be_stopped(fake, visit, how):
    fake.pieces, fake.delay = ["x"] * 500, 0.02
    page = visit()
    start(page, "long")
    wait_until(page, "document.querySelector('.assistant .text').textContent.length >= 3")
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    wait_for_end(page)
    assert page.locator(".assistant .foot").text_content().endswith("stopped")
    wait_until(page, lambda: fake.running == 0)
    assert fake.disconnects == 1  # the service need not compute what nobody reads
    fake.pieces, fake.delay = ["short"], 0
    ask(page, "again")
    question, partial, _ = asked(fake)[1]["messages"]
    assert question["content"] == "long" and 3 <= len(partial["content"]) < 500


def test_text_is_never_markup(fake, visit):
    fake.pieces = [HOSTILE[:9], HOSTILE[9:]]
    page = visit()
    answer = ask(page, HOSTILE)
    assert page.locator(".user .text").text_content() == answer.locator(".text").text_content() == HOSTILE
    fake.faults["/v1/chat/completions"] = (422, json.dumps({"error": HOSTILE}))
    fault = ask(page, "x").get_by_role("alert")
    assert fault.text_content() == f"HTTP 422: {HOSTILE}"
    assert page.locator("#log img, #log script").count() == 0
    assert page.evaluate("window.pwned") is None
    assert "/pwned" not in [path for path, _ in fake.requests]


@pytest.mark.parametrize(
    ("thoughts", "pieces"),
    [
        (["想\n", HOSTILE], ["\n\n", "好 </think>"]),
        ([], ["<thi", "nk>想\n", HOSTILE, "</th", "ink>\n\n好 </think>"]),
        ([], ["想\n", HOSTILE, "\n</think>", "\n\n好 </think>"]),  # the prompt had the opening tag
    ],
    ids=["told apart", "tags", "closing tag"],
)
def test_a_thought_is_folded(fake, visit, thoughts, pieces):
    fake.thoughts, fake.pieces = thoughts, pieces
    page = visit()
    answer = ask(page, "one")
    assert answer.locator(".text").text_content() == "好 </think>"
    thought = answer.locator("details.thought")
    assert thought.evaluate("details => details.open") is False
    assert re.fullmatch(r"Thought for [\d.]+ s", thought.locator("summary").text_content())
    thought.locator("summary").click()
    assert thought.locator("div").is_visible() and thought.locator("div").text_content() == f"想\n{HOSTILE}"
    assert page.locator("#log img, #log script").count() == 0 and page.evaluate("window.pwned") is None
    page.get_by_role("button", name="中文").click()
    assert thought.locator("summary").text_content().startswith("已思考")
    ask(page, "two")
    assert [message["content"] for message in asked(fake)[1]["messages"]] == ["one", "好 </think>", "two"]


def test_a_thoughts_time_is_that_of_its_end(fake, visit):
    # The prompt had the opening tag, so that all looks like the answer until the closing one.
    fake.pieces, fake.delay = ["想", "一", "想", "\n</think>\n\n好"], 0.6
    summary = ask(visit(), "one").locator(".thought summary").text_content()
    assert float(summary.removeprefix("Thought for ").removesuffix(" s")) >= 1.8, summary


def test_a_thought_shows_that_it_goes_on(fake, visit):
    fake.thoughts, fake.pieces, fake.delay = ["想"] * 1000, ["好"], 0.02
    page = visit()
    start(page, "long")
    wait_until(page, "document.querySelector('.thought div').textContent.length >= 3")
    assert page.locator(".thought summary").text_content().startswith("Thinking… ")
    assert page.locator(".assistant .text").text_content() == ""
    page.keyboard.press("Escape")  # an answer that ends inside its thought
    wait_for_end(page)
    assert page.locator(".thought summary").text_content().startswith("Thought for ")
    fake.thoughts, fake.delay = [], 0
    answer = ask(page, "again")
    assert answer.locator(".thought").is_hidden()
    assert [message["content"] for message in asked(fake)[1]["messages"]] == ["again"]


def test_faults_are_said(fake, visit):
    fake.faults["/v1/chat/completions"] = (503, '{"error": "queue is full", "error_type": "Service Unavailable"}')
    page = visit()
    assert ask(page, "one").get_by_role("alert").text_content() == "HTTP 503: queue is full"
    del fake.faults["/v1/chat/completions"]
    fake.broken = True
    broken = ask_slowly(page, fake, "two")  # what has not been read when a connection breaks is gone
    assert broken.locator(".text").text_content() == "你"
    assert broken.get_by_role("alert").text_content() == "The answer broke off."
    fake.broken = False
    ask(page, "three")
    roles = [message["role"] for message in asked(fake)[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]  # a question without any answer is not repeated
    page.get_by_label("top_p").fill("7")
    page.get_by_role("textbox", name="Ask something").fill("four")
    page.keyboard.press("Enter")
    assert page.get_by_label("top_p").evaluate("input => input === document.activeElement")
    assert len(asked(fake)) == 3
    assert page.get_by_role("textbox", name="Ask something").input_value() == "four"


ERRORS = {
    '{"detail": "Not Found"}': "Not Found",
    '{"error": {"message": "too long", "type": "x"}}': "too long",
    '{"detail": [{"loc": ["body"]}]}': '[{"loc":["body"]}]',
    '{"error": {"code": 7}}': '{"code":7}',
    "{}": "{}",
    "null": "null",
    "<html>Bad Gateway</html>": "<html>Bad Gateway</html>",
}


def test_whatever_a_service_says_of_an_error_is_shown(fake, visit):
    page = visit()
    shown = {}
    for body in ERRORS:
        fake.faults["/v1/chat/completions"] = (400, body)
        shown[body] = ask(page, "one").get_by_role("alert").text_content().removeprefix("HTTP 400: ")
    assert shown == ERRORS


def test_a_service_that_does_not_name_its_model_is_not_waited_for(fake, visit):
    page = visit(
        script="window.fetch = (path, { signal } = {}) => new Promise((_, refuse) => {"
        "signal?.addEventListener('abort', () => refuse(signal.reason)); });"
    )
    start(page, "one")
    press(page, "^Stop$")
    wait_for_end(page)
    assert page.locator(".assistant .foot").text_content() == "stopped" and asked(fake) == []


def test_live_figures(fake, visit):
    page = visit()
    wait_until(page, "document.getElementById('waiting').textContent === '2'")
    assert page.locator("#running").text_content() == "0"
    assert page.locator("#kv").text_content() == "12.5%"
    throughputs = watch(page, "throughput")
    ask(page, "one")
    wait_until(page, f"{throughputs}.some((text) => Number(text) > 0)")
    assert page.locator("#unserved").is_hidden()
    fake.faults["/metrics"] = (404, "")
    wait_until(page, "document.getElementById('waiting').textContent === '–'")
    assert page.locator("#unserved").is_visible()


def test_two_languages(visit):
    page = visit(locale="zh-CN")
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    assert page.get_by_role("button", name="发送").is_visible()
    ask(page, "一")
    page.get_by_role("button", name="English").click()
    assert page.get_by_role("button", name="Send").is_visible()
    assert page.locator(".assistant .foot").text_content().startswith("3 tokens")
    reload(page)
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.get_by_role("button", name="Send").is_visible()
    page.get_by_role("button", name="中文").click()
    assert page.get_by_label("系统提示").is_visible()
    left = page.evaluate("""() => [...document.querySelectorAll('body *')]
        .flatMap((element) => [...element.attributes].map((attribute) => attribute.value).concat(
            element.children.length ? [] : [element.textContent]))
        .filter((text) => /undefined|null|NaN/.test(text) && text.length < 200)""")
    assert left == []


def test_light_and_dark(visit):
    page = visit(color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.get_by_role("button", name="Colours: Auto").click()
    light = page.evaluate(background)
    assert light != dark
    reload(page)
    assert page.evaluate(background) == light
    page.get_by_role("button", name="Colours: Light").click()
    assert page.evaluate(background) == dark
    page.get_by_role("button", name="Colours: Dark").click()
    page.emulate_media(color_scheme="light")
    wait_until(page, f"{background} === '{light}'")


def test_by_keyboard_alone(fake, visit):
    page = visit()
    box = page.get_by_role("textbox", name="Ask something")
    assert box.evaluate("element => element === document.activeElement")
    page.keyboard.type("two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    # An input method ends a word with Enter; that must not send.
    box.evaluate("e => e.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))")
    assert asked(fake) == []
    page.keyboard.press("Tab")
    page.keyboard.press("Space")  # the send button
    page.locator(".assistant .foot").wait_for()
    wait_for_end(page)
    assert asked(fake)[0]["messages"][0]["content"] == "two\nlines"
    assert box.evaluate("element => element === document.activeElement")
    page.locator("#skip").focus()
    reached = ["skip"]
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "document.activeElement.id || document.activeElement.name || document.activeElement.className"
            )
        )
        assert page.evaluate(OUTLINED), reached[-1]  # one sees where one is
    order = ["skip", "new-too", "open", "delete", "export-markdown", "log", "question", "system", "temperature"]
    order += ["seed", "stop", "raw", "reset", "theme", "language"]  # as it stands on the page, from left to right
    assert [name for name in reached[: reached.index("language") + 1] if name in order] == order
    page.locator("#skip").focus()
    page.keyboard.press("Enter")
    assert box.evaluate("element => element === document.activeElement")


OUTLINED = """() => {
    const { outlineStyle, boxShadow } = getComputedStyle(document.activeElement);
    return document.activeElement === document.body || outlineStyle !== "none" || boxShadow !== "none";
}"""


def test_what_happens_is_said(fake, visit):
    """For those who do not see the page: the answer when it is complete, and not each piece of it; a fault at once."""
    fake.pieces, fake.delay = ["one ", "two ", "three"], 0.1
    page = visit()
    assert page.locator("#log").get_attribute("aria-live") == "off"
    assert page.get_by_role("status").first.get_attribute("id") == "status"
    said = watch(page, "status")
    ask(page, "one")
    assert page.evaluate(said) == ["Answering…", "one two three"]
    fake.faults["/v1/chat/completions"] = (503, "{}")
    assert ask(page, "two").get_by_role("alert").is_visible()
    assert page.get_by_role("article", name="You").count() == page.get_by_role("article", name="TeleChat").count() == 2


def test_the_focus_stays_where_it_is(fake, visit):
    """At the end of an answer too, with a reader who went to an earlier one meanwhile."""
    page = visit()
    ask(page, "one")
    fake.pieces, fake.delay = ["x"] * 20, 0.02
    start(page, "two")
    copy = page.get_by_role("button", name="Copy").first
    copy.focus()
    wait_for_end(page)
    assert copy.evaluate("element => element === document.activeElement")


def test_the_focus_survives_the_examples(visit):
    page = visit()
    page.locator("#examples button").first.focus()
    page.keyboard.press("Space")
    page.locator(".assistant .foot").wait_for()
    assert page.evaluate("document.activeElement.id") == "question"


def test_everything_has_a_name(visit):
    page = visit()
    ask(page, "one")
    press(page, "^Edit$")
    snapshot = page.locator("body").aria_snapshot()
    kinds = "article|button|checkbox|complementary|form|link|log|main|navigation|region|spinbutton|textbox"
    controls = re.findall(rf"- ({kinds})\b(.*)", snapshot)
    assert len(controls) >= 30 and {kind for kind, _ in controls} >= set(kinds.split("|"))
    assert [control for control in controls if '"' not in control[1]] == []


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_a_narrow_screen(fake, visit, locale):
    fake.pieces = ["w" * 200, "\n", "宽" * 200]
    page = visit(locale=locale, viewport={"width": 360, "height": 640})
    ask(page, "W" * 300)
    send = page.locator("#send").bounding_box()
    assert send["y"] + send["height"] <= 640
    for toggle in (None, "#show-history", "#show-side"):
        if toggle:
            page.locator(toggle).click()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        shown = page.locator("button:visible, textarea:visible, input:visible, dd:visible, .text:visible")
        boxes = shown.evaluate_all("all => all.map((e) => [e.getBoundingClientRect(), e.outerHTML.slice(0, 200)])")
        assert len(boxes) >= 8
        assert [html for box, html in boxes if box["x"] < 0 or box["x"] + box["width"] > 360.5] == []


def test_the_panels_of_a_narrow_screen(fake, visit):
    page = visit(viewport={"width": 390, "height": 800})
    assert page.locator("#log").is_visible() and page.evaluate("document.activeElement.id") == "question"
    assert page.locator("nav, aside").filter(visible=True).count() == 0
    ask(page, "one")
    for toggle, panel in (("Conversations", "#history"), ("Settings", "#side")):
        button = page.get_by_role("button", name=toggle, exact=True)
        assert button.get_attribute("aria-expanded") == "false"
        button.click()
        assert page.locator(panel).is_visible() and button.get_attribute("aria-expanded") == "true"
        assert page.evaluate(f"document.querySelector('{panel}').contains(document.activeElement)")
        assert page.evaluate("document.getElementById('chat').inert")  # Tab does not get behind the panel
        page.keyboard.press("Escape")
        assert page.locator(panel).is_hidden() and button.evaluate("e => e === document.activeElement")
    fake.pieces, fake.delay = ["x"] * 1000, 0.02
    start(page, "two")
    page.get_by_role("button", name="Settings", exact=True).click()
    page.keyboard.press("Escape")  # for the panel, not for the answer
    assert page.locator("#side").is_hidden() and page.locator("[aria-busy=true]").count() == 1
    page.keyboard.press("Escape")
    wait_for_end(page)
    page.get_by_role("button", name="Conversations", exact=True).click()
    page.locator("#list .open").click()
    assert page.locator("#history").is_hidden() and texts(page)[:3] == ["one", "你好，世界", "two"]
    page.get_by_role("button", name="Settings", exact=True).click()
    page.set_viewport_size({"width": 1100, "height": 800})  # a tablet that is turned
    wait_until(page, "!document.getElementById('chat').inert")
    assert page.locator("nav, aside").filter(visible=True).count() == 2
