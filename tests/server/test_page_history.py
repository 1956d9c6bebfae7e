"""What the chat page keeps and lets the user change: conversations, their branches, settings; in a real browser."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.page import ask, ask_slowly, asked, press, reload, start, texts, wait_for_end, wait_for_scripts, wait_until


def titles(page):
    return page.locator("#list .open").all_text_contents()


def contents(fake):
    """Of the messages of the last request."""
    return [message["content"] for message in asked(fake)[-1]["messages"]]


def test_conversations_are_kept(fake, visit):
    fake.thoughts = ["想"]
    page = visit()
    foot = ask(page, "one\nmore").locator(".foot").text_content()
    ask(page, "two")
    press(page, "^New chat$")
    ask(page, "three")
    assert titles(page) == ["three", "one"]
    assert page.locator("#list [aria-current=true]").text_content() == "three"
    reload(page)
    wait_until(page, "document.querySelectorAll('#list li').length === 2")
    assert titles(page) == ["three", "one"] and texts(page) == []
    press(page.locator("#list"), "^one$")
    assert texts(page) == ["one\nmore", "你好，世界", "two", "你好，世界"]
    assert page.locator(".foot:visible").first.text_content() == foot and "tok" in foot
    assert page.locator(".thought div").first.text_content() == "想"
    assert page.evaluate("document.activeElement.id") == "question"
    ask(page, "four")
    assert contents(fake) == ["one\nmore", "你好，世界", "two", "你好，世界", "four"]
    assert titles(page) == ["one", "three"]  # the last used first


def test_a_deletion_can_be_undone(visit):
    page = visit()
    for question in ("one", "two"):
        press(page, "^New chat$")
        ask(page, question)
    press(page, "^Delete: two$")
    assert titles(page) == ["one"] and texts(page) == []
    notice = page.locator("#notice")
    assert "Deleted: two" in notice.text_content()
    assert page.evaluate("document.activeElement.id") == "undo"
    page.keyboard.press("Enter")
    assert titles(page) == ["two", "one"] and texts(page)[0] == "two" and notice.is_hidden()
    press(page, "^Delete: one$")
    assert texts(page)[0] == "two"  # the one that is shown stays
    press(notice, "^Close$")
    reload(page)
    wait_until(page, "document.querySelectorAll('#list li').length === 1")
    assert titles(page) == ["two"]
    ask(page, "three")
    press(page, "^Delete all$")
    assert titles(page) == [] and page.get_by_role("button", name="Delete all").is_hidden()
    press(notice, "^Undo$")
    assert titles(page) == ["three", "two"] and texts(page)[0] == "three"
    reload(page)
    wait_until(page, "document.querySelectorAll('#list li').length === 2")


def test_a_conversation_that_is_deleted_while_it_grows_stays_deleted(fake, visit):
    fake.pieces, fake.delay = ["x"] * 500, 0.02
    page = visit()
    start(page, "one")
    wait_until(page, "document.querySelector('.assistant .text').textContent.length >= 3")
    press(page, "^Delete: one$")
    press(page.locator("#notice"), "^Close$")
    fake.pieces, fake.delay = ["short"], 0
    ask(page, "two")
    assert titles(page) == ["two"] and texts(page) == ["two", "short"]
    reload(page)
    wait_until(page, "document.querySelectorAll('#list li').length === 1")
    assert titles(page) == ["two"]


def test_a_question_can_be_edited(fake, visit):
    page = visit()
    ask(page, "one")
    fake.pieces = ["first"]
    ask(page, "two")
    fake.pieces = ["second"]
    edited = page.locator(".user").nth(1)
    press(edited, "^Edit$")
    box = edited.get_by_role("textbox", name="Edit the question")
    assert box.input_value() == "two" and box.evaluate("element => element === document.activeElement")
    box.fill("other")
    page.keyboard.press("Escape")  # leaves it as it is
    assert texts(page) == ["one", "你好，世界", "two", "first"]
    press(edited, "^Edit$")
    box.fill("three")
    page.keyboard.press("Enter")
    wait_for_end(page)
    assert contents(fake) == ["one", "你好，世界", "three"]
    assert texts(page) == ["one", "你好，世界", "three", "second"]
    versions = page.get_by_role("group", name="Version")
    assert versions.text_content() == "‹2/2›"
    press(versions, "Previous version")
    assert texts(page) == ["one", "你好，世界", "two", "first"]
    assert versions.text_content() == "‹1/2›"
    assert versions.get_by_role("button", name="Next version").evaluate("e => e === document.activeElement")
    ask(page, "four")  # goes on from the branch that is shown
    assert contents(fake) == ["one", "你好，世界", "two", "first", "four"]
    reload(page)
    page.locator("#list .open").click()
    assert texts(page)[2:] == ["two", "first", "four", "second"]
    press(versions, "Next version")
    assert texts(page)[2:] == ["three", "second"]


def test_an_answer_can_be_asked_for_again(fake, visit):
    fake.pieces = ["first"]
    page = visit()
    ask(page, "one")
    ask(page, "two")
    fake.pieces = ["second"]
    page.get_by_label("Temperature").fill("1.5")
    press(page.locator(".assistant").nth(0), "^Regenerate$")
    wait_for_end(page)
    assert texts(page) == ["one", "second"] and contents(fake) == ["one"] and asked(fake)[-1]["temperature"] == 1.5
    press(page, "Previous version")
    assert texts(page) == ["one", "first", "two", "first"]  # what followed is still there
    fake.faults["/v1/chat/completions"] = (503, '{"error": "queue is full"}')
    press(page, "^New chat$")
    ask(page, "three")
    del fake.faults["/v1/chat/completions"]
    press(page.locator(".assistant"), "^Regenerate$")
    wait_for_end(page)
    assert contents(fake) == ["three"] and page.get_by_role("alert").filter(visible=True).count() == 0


def test_a_raw_completion(fake, visit):
    fake.pieces = ["<think>no ", "**thought**\n", "</think>"]
    page = visit()
    ask(page, "one")
    page.get_by_label("Raw completion").check()
    assert page.get_by_label("System prompt").is_disabled()
    assert page.locator("#question").get_attribute("placeholder") == "Text to go on with"
    page.get_by_label("Max tokens").fill("9")
    answer = ask(page, "  def f(x):\n")
    assert fake.bodies("/v1/completions") == [
        {"model": "fake", "prompt": "  def f(x):\n", "max_tokens": 9, "stream": True},
    ]
    assert answer.locator(".text").inner_html() == "&lt;think&gt;no **thought**\n&lt;/think&gt;"
    assert answer.locator(".foot").text_content().startswith("3 tokens")
    assert page.locator(".user .who").last.text_content() == "Prompt"
    press(page, "^中文$")
    assert page.locator("#question").get_attribute("aria-label") == "输入要续写的文本"
    page.get_by_label("原文续写").uncheck()
    ask(page, "two")  # the raw one is no part of the chat
    assert contents(fake) == ["two"]  # nor is a question whose answer was all thought
    press(page.locator(".assistant").nth(1), "^重新生成$")
    wait_for_end(page)
    assert len(fake.bodies("/v1/completions")) == 2  # as it was asked


def test_a_conversation_becomes_a_file(fake, visit):
    fake.thoughts, fake.pieces = ["想"], ["**a**", "\n- b"]
    page = visit()
    assert page.get_by_role("button", name="Export as JSON").is_disabled()
    page.get_by_label("Seed").fill("3")
    page.get_by_label("System prompt").fill("short")
    ask(page, "酱油/a: <b>?")
    press(page.locator(".assistant"), "^Regenerate$")
    wait_for_end(page)
    files = {}
    for kind in ("Markdown", "JSON"):
        with page.expect_download() as download:
            press(page, f"^Export as {kind}$")
        files[kind] = (download.value.suggested_filename, Path(download.value.path()).read_text(encoding="utf-8"))
    assert files["Markdown"] == (
        "酱油-a-b.md",
        "# 酱油/a: <b>?\n\n## You\n\n酱油/a: <b>?\n\n## TeleChat\n\n<think>\n想\n</think>\n\n**a**\n- b\n",
    )
    press(page, "^New chat$")
    ask(page, "𠀀" * 90)
    assert titles(page)[0] == "𠀀" * 80  # whole characters
    with page.expect_download() as download:
        press(page, "^Export as JSON$")
    assert download.value.suggested_filename == "𠀀" * 60 + ".json"
    name, text = files["JSON"]
    document = json.loads(text)
    assert name == "酱油-a-b.json" and document["shown"] == 2
    question, first, second = document["nodes"]
    assert question == {"id": 0, "parent": None, "role": "user", "content": "酱油/a: <b>?", "isRaw": False}
    assert (first["parent"], second["parent"], second["content"], second["thought"]) == (0, 0, "**a**\n- b", "想")
    assert second["request"] == {"system": "short", "seed": 3}
    assert (second["model"], second["tokens"], second["reason"]) == ("fake", 3, "stop")


KEPT = "import('/page/store.js').then(({ openStore }) => openStore())"


def test_an_answer_that_a_reload_cut_off_is_kept(fake, visit):
    fake.pieces, fake.delay = ["x"] * 1000, 0.02
    page = visit()
    start(page, "one")
    wait_until(page, KEPT + ".then(({ kept: [kept] }) => kept?.nodes[1].content.length >= 10)")
    reload(page)
    page.locator("#list .open").click()
    assert len(texts(page)[1]) >= 10
    assert page.locator(".assistant .foot").text_content().endswith("stopped")


def test_another_conversation_stops_the_answer(fake, visit):
    page = visit()
    ask(page, "one")
    press(page, "^New chat$")
    fake.pieces, fake.delay = ["x"] * 1000, 0.02
    start(page, "two")
    wait_until(page, "document.querySelector('.assistant .text').textContent.length >= 3")
    press(page.locator("#list"), "^one$")
    assert texts(page) == ["one", "你好，世界"] and page.get_by_role("button", name="Send").is_visible()
    press(page.locator("#list"), "^two$")
    assert texts(page)[1].startswith("xxx")
    assert page.locator(".assistant .foot").text_content().endswith("stopped")


def test_settings_are_kept_and_put_back(fake, visit):
    page = visit()
    page.get_by_label("top_k").fill("7")
    page.get_by_label("Stop strings").fill("END")
    page.get_by_label("Raw completion").check()
    reload(page)
    ask(page, "one")
    assert fake.bodies("/v1/completions")[0].items() >= {"top_k": 7, "stop": ["END"]}.items()
    press(page, "^Reset to defaults$")
    ask(page, "two")
    assert asked(fake) == [{"model": "fake", "messages": [{"role": "user", "content": "two"}], "stream": True}]
    reload(page)
    assert page.get_by_label("top_k").input_value() == "" and not page.get_by_label("Raw completion").is_checked()


def test_a_page_that_is_left_at_once_has_kept_all(visit):
    """What it asked of the browser must not depend on being there for the answer."""
    page = visit()
    ask(page, "one")
    for number in range(3):
        with page.expect_navigation():
            page.evaluate(
                """async (number) => {
                const { openStore } = await import("/page/store.js");
                const store = await openStore();
                store.put({ ...store.kept[0], title: `title ${number}`, more: "x".repeat(1e6) });
                location.reload();
            }""",
                number,
            )
        wait_for_scripts(page)
        assert titles(page) == [f"title {number}"]


def test_what_the_browser_kept_need_not_be_conversations(visit):
    page = visit()
    ask(page, "one")
    page.evaluate("""async () => {
        const { openStore } = await import("/page/store.js");
        const { kept: [kept], put } = await openStore();
        const [question, answer] = kept.nodes;
        const changes = [
            { nodes: [{ ...question, parent: 1 }, answer] }, // a circle
            { nodes: [question, { ...answer, parent: 1 }] },
            { nodes: [question, { ...answer, content: 7 }] },
            { nodes: [question, { ...answer, role: "system" }] },
            { nodes: [question, { ...answer, id: 0 }] },
            { nodes: [question, null] }, { nodes: null }, { shown: 2 }, { shown: undefined },
            { title: {} }, { changed: "x" },
        ];
        const records = changes.map((change, id) => ({ ...kept, id, ...change }));
        const title = "<img src=/pwned onerror=window.pwned=1>";
        for (const record of [...records, { id: 77 }, { ...kept, id: '"] *', title }]) await put(record);
    }""")
    reload(page)
    hostile = "<img src=/pwned onerror=window.pwned=1>"
    assert sorted(titles(page)) == [hostile, "one"]
    page.locator("#list .open", has_text="pwned").click()
    assert texts(page) == ["one", "你好，世界"]
    page.get_by_role("button", name="Delete all").click()
    assert titles(page) == [] and page.locator("#history img").count() == 0


UNKEPT = "This browser cannot keep them: gone with the page."


def test_a_browser_without_space(visit):
    page = visit(
        script="""IDBObjectStore.prototype.put = () => { throw new DOMException("full", "QuotaExceededError"); };"""
    )
    assert page.locator("#kept").text_content() == "Kept in this browser alone."
    ask(page, "one")
    assert page.locator("#kept").text_content() == UNKEPT
    press(page, "^New chat$")
    press(page.locator("#list"), "^one$")
    assert texts(page) == ["one", "你好，世界"]


def test_a_browser_that_finds_no_space_at_the_end(visit):
    """It may take what it has no space for, and undo it only then."""
    page = visit(
        script="""const { put } = IDBObjectStore.prototype;
        IDBObjectStore.prototype.put = function (value) {
            const request = put.call(this, value);
            request.addEventListener("success", () => this.transaction.abort());
            this.transaction.commit = () => {};
            return request;
        };"""
    )
    ask(page, "one")
    wait_until(page, f"document.getElementById('kept').textContent === '{UNKEPT}'")


def test_a_browser_that_keeps_nothing(fake, visit):
    page = visit(
        script="""indexedDB.open = () => { throw new DOMException("no", "SecurityError"); };
        Object.defineProperty(window, "localStorage", { get() { throw new DOMException("no", "SecurityError"); } });"""
    )
    assert page.locator("#kept").text_content() == UNKEPT
    ask(page, "one")
    press(page, "^New chat$")
    ask(page, "two")
    press(page.locator("#list"), "^one$")
    assert texts(page) == ["one", "你好，世界"]


def test_an_answer_that_comes_at_once_has_no_speed(fake, visit):
    """As through a proxy that holds events back, or on a busy machine: a thousand tokens in no time are no speed."""
    page = visit()
    pieces = [{"delta": {"content": "a"}}, {"delta": {"content": "b"}, "finish_reason": "stop"}]
    events = [{"choices": [{"index": 0, **piece}], "usage": {"completion_tokens": 1000}} for piece in pieces]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"

    def hold(route):
        page.wait_for_timeout(200)
        route.fulfill(content_type="text/event-stream", body=body)

    page.route("**/v1/chat/completions", hold)
    foot = ask(page, "one").locator(".foot").text_content()
    assert foot.startswith("1000 tokens") and "tok/s" not in foot


def test_tokens_are_those_that_the_service_counted(fake, visit):
    """Never the number of events, which may hold several tokens or parts of one."""
    fake.pieces, fake.usage = ["a", "b", "c"], False
    page = visit()
    foot = ask_slowly(page, fake, "one").locator(".foot").text_content()
    assert "token" in foot and "tokens" not in foot and "tok/s" not in foot  # First token ... ms
    assert page.locator("#speed").text_content() == "–"
    fake.usage = True
    foot = ask_slowly(page, fake, "two").locator(".foot").text_content()
    tokens, _, speed = foot.split(" · ")
    assert tokens == "3 tokens" and 0 < float(speed.removesuffix(" tok/s")) <= 2 / 0.2
