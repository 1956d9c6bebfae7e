"""What the chat page makes of an answer's Markdown, be it friendly or not, in a real browser."""

from __future__ import annotations

import random

import pytest
from helpers.fake_mindie import FakeMindie
from helpers.page import Visits, ask, press, reload

SHOW = """async ([texts, isOver]) => {
    const { MarkdownView } = await import("/page/markdown.js");
    const place = document.createElement("div");
    document.getElementById("log").append(place);
    const view = new MarkdownView(place);
    for (const text of texts) view.put(text, isOver && text === texts.at(-1));
    const bare = place.cloneNode(true);
    for (const element of bare.querySelectorAll("button")) element.remove();
    for (const element of bare.querySelectorAll("*")) {
        for (const name of ["tabindex", "title", "rel", "target", "role", "data-label", "aria-label", "data-word"]) {
            element.removeAttribute(name);
        }
    }
    place.remove();
    return bare.innerHTML;
}"""


@pytest.fixture(scope="module")
def page(browser, contexts):
    """One page for all tests that only call its renderer."""
    with FakeMindie(has_page=True) as fake:
        visits = Visits(browser, contexts, fake.url)
        yield visits()
        visits.close()


def rendered(page, text, *begins):
    """The elements of a text, bare of what is for reading aloud; shown after its `begins`, as it grew."""
    return page.evaluate(SHOW, [[*begins, text], True])


CODE = '<div class="code"><div class="title"><span>{}</span></div><pre><code>{}</code></pre></div>'
CASES = {
    "# A\n\n## B": "<h3>A</h3><h4>B</h4>",
    "a\n-": "<p>a<br>-</p>",  # on its way to a list; no heading
    "a\n- b": "<p>a</p><ul><li>b</li></ul>",
    "a\nb": "<p>a<br>b</p>",
    "**a** *b* ~~c~~ `d`": "<p><strong>a</strong> <em>b</em> <del>c</del> <code>d</code></p>",
    "**“强调”**的话，**注意：**请": "<p><strong>“强调”</strong>的话，<strong>注意：</strong>请</p>",
    "**a *b* c**": "<p><strong>a <em>b</em> c</strong></p>",
    "- a\n- b\n  1. c": "<ul><li>a</li><li>b<ol><li>c</li></ol></li></ul>",
    "3. a\n4. b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "- [x] a\n- [ ] b": "<ul><li>☑ a</li><li>☐ b</li></ul>",
    "> a\n\n---": "<blockquote><p>a</p></blockquote><hr>",
    "```python\nx < 1\n```": CODE.format("python", "x &lt; 1"),
    "```\n# no heading\n": CODE.format("", "# no heading"),
    "| a | b |\n|--:|:-:|\n| 1<br>2 | `x` |": (
        '<div class="wide"><table><thead><tr><th class="right">a</th><th class="center">b</th></tr></thead>'
        '<tbody><tr><td class="right">1<br>2</td><td class="center"><code>x</code></td></tr></tbody></table></div>'
    ),
    "[a](https://b.cn/?c&d) <mailto:e@f.cn>": (
        '<p><a href="https://b.cn/?c&amp;d">a</a> <a href="mailto:e@f.cn">mailto:e@f.cn</a></p>'
    ),
    "[a][1]\n\n[1]: https://b.cn": '<p><a href="https://b.cn">a</a></p>',
    "![a](https://b.cn/c.png)": '<p><a href="https://b.cn/c.png"><span>Image</span> a</a></p>',
    "&lt;b&gt; &amp;amp; &#20320;&#x597d; &hellip; &unknown; \\* A&B": (
        "<p>&lt;b&gt; &amp;amp; 你好 … &amp;unknown; * A&amp;B</p>"
    ),
    "<b>a</b>": "<p>&lt;b&gt;a&lt;/b&gt;</p>",
    # Formulas stay as they are written, with all that Markdown would take for its own.
    "当 $a_1 * b_2 * c$ 时": '<p>当 <span class="math">$a_1 * b_2 * c$</span> 时</p>',
    "\\(x_1\\) 与 $\\frac{a}{b}$": (
        '<p><span class="math">\\(x_1\\)</span> 与 <span class="math">$\\frac{a}{b}$</span></p>'
    ),
    "故\n$$\na_1\n- b\n= c\n$$\n得": '<p>故</p><div class="math">$$\na_1\n- b\n= c\n$$</div><p>得</p>',
    "a \\(x \\\\(y) \\) b \\[p \\\\[4pt] q \\] \\(c": (
        '<p>a <span class="math">\\(x \\\\(y) \\)</span> b <span class="math">\\[p \\\\[4pt] q \\]</span> (c</p>'
    ),
    "\\[\nx \\\\\ny\n\\]": '<div class="math">\\[\nx \\\\\ny\n\\]</div>',
    "1. a\n\n   $$b_1$$\n": '<ol><li><p>a</p><div class="math">$$b_1$$</div></li></ol>',
    "$5 and $6, *so* $7": "<p>$5 and $6, <em>so</em> $7</p>",
    "`$a$` $$": "<p><code>$a$</code> $$</p>",
}


def test_markdown_becomes_elements(page):
    assert {text: rendered(page, text) for text in CASES} == CASES


FRAGILE = (  # a line changes what the block before it is, or belongs to it after all, once it is complete
    "- a\n  1. b\n**c** d\n\ne",
    "1. a\n\n2. b\n\nc",
    "a\nb | c\n-|-$\n\nd",
    "```\na\n```b\n```\n\nc",
    "[a][1]\n\nb\n\n[1]: https://b.cn/c\n\nd",
    "a\n4. b\n- [ ] c\n\nd",
)


def test_a_text_that_grows_ends_as_the_whole_one(page):
    """Whatever stands already must not depend on what comes: all cases and random mixtures of them, cut anywhere."""
    draw = random.Random(7)
    marks = """=== ``` --- ~~~ $$ $ \\[ \\] \\( > - 1. * <pre> <!-- [x]:y |"""
    pieces = [*CASES, *marks.split(), "a|b\n-|-", "    code", "  ", "\n", "\r\n"]
    mixtures = (
        "".join(draw.choice(pieces) + draw.choice(["", "\n", "\n\n"]) for _ in range(draw.randint(1, 12)))
        for _ in range(60)
    )
    for text in (*FRAGILE, *mixtures):
        step = 1 if text in FRAGILE else draw.choice([1, 1, 3, 10])
        begins = [text[:end] for end in range(0, len(text), step)]
        assert rendered(page, text, *begins) == rendered(page, text), text


def test_only_the_last_block_is_read_again(page):
    """In a long answer the work of each piece depends on the last block alone, and what stands is left alone."""
    read, kept, length = page.evaluate("""async () => {
        const { Lexer } = await import("/page/vendor/marked/marked.esm.js");
        const { MarkdownView } = await import("/page/markdown.js");
        const place = document.createElement("div");
        const view = new MarkdownView(place);
        const { lex } = Lexer.prototype;
        let read = 0;
        Lexer.prototype.lex = function (text) { read += text.length; return lex.call(this, text); };
        let text = "";
        for (let number = 0; number < 1000; number++) {
            text += number % 3 ? `word **${number}** and \\`more\\` of it\\n\\n` : `- item ${number}\\n- another\\n\\n`;
            view.put(text, false);
            if (number === 3) place.firstChild.isFirst = place.children[1].isFirst = true;
        }
        Lexer.prototype.lex = lex;
        return [read, place.firstChild.isFirst && place.children[1].isFirst, text.length];
    }""")
    assert kept and read < 4 * length


@pytest.mark.parametrize("opening", ["\\(", "x\\[", "\\\\\\("])
def test_formulas_that_never_end_take_no_time(page, opening):
    """Each would be read to the end: a paragraph of them took a hundred times as long as one of as many escapes."""
    times = page.evaluate(
        """async (opening) => {
            const { MarkdownView } = await import("/page/markdown.js");
            const take = (piece) => {
                const text = piece.repeat(16000);
                const begin = performance.now();
                new MarkdownView(document.createElement("div")).put(text, false);
                return performance.now() - begin;
            };
            take("\\\\!");
            return [take("\\\\!"), take(opening)];
        }""",
        opening,
    )
    assert times[1] < 15 * times[0], times


def test_a_long_listing_grows_in_its_place(page):
    assert page.evaluate("""async () => {
        const { MarkdownView } = await import("/page/markdown.js");
        const place = document.createElement("div");
        const view = new MarkdownView(place);
        view.put("```py\\na", false);
        const { firstChild } = place;
        for (let length = 1; length < 40000; length += 4000) view.put("```py\\n" + "a".repeat(length), false);
        view.put("```py\\n" + "a".repeat(40000) + "\\n```\\nb", true);
        return place.textContent === "pyCopy code" + "a".repeat(40000) + "b" && place.children.length === 2
            && firstChild.isConnected === place.isConnected && firstChild.className === "code";
    }""")


def test_drawing_takes_a_quarter_of_the_time_at_most(page):
    draws, last = page.evaluate("""async () => {
        const { everyFrame } = await import("/page/elements.js");
        let draws = 0;
        let last = null;
        const slow = everyFrame((value = null) => {
            draws += 1;
            last = value;
            for (const end = performance.now() + 50; performance.now() < end;);
        });
        for (const end = performance.now() + 1000; performance.now() < end;) {
            slow.ask();
            await new Promise((resolve) => setTimeout(resolve, 1));
        }
        const drawn = draws;
        slow.ask();
        slow.end("end");
        await new Promise((resolve) => setTimeout(resolve, 300));
        return [drawn, draws === drawn + 1 && last];
    }""")
    assert 1 <= draws <= 6
    assert last == "end"  # and nothing after it


HOSTILE = [
    "<script>window.pwned = 1</script>",
    "<script src=/pwned></script>",
    "<img src=/pwned onerror=window.pwned=1>",
    '<img src="/pwned"\nonerror="window.pwned = 1">',
    "<svg onload=window.pwned=1><script>window.pwned=1</script></svg>",
    '<svg><a xlink:href="javascript:window.pwned=1"><text>x</text></a></svg>',
    "<math><mtext><style><img src=/pwned onerror=window.pwned=1></style></mtext></math>",
    "<!-- --><img src=/pwned onerror=window.pwned=1> <!-->",
    "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "<style>@import '/pwned'; * { background: url(/pwned) }</style>",
    "<base href='https://pwned.example/'><meta http-equiv=refresh content='0;url=/pwned'>",
    "<form action=/pwned><button autofocus onfocus=window.pwned=1>x</button></form>",
    "<details open ontoggle=window.pwned=1><summary>x</summary></details>",
    "[a](javascript:window.pwned=1)",
    "[a](JaVaScRiPt:window.pwned=1)",
    "[a](&#106;avascript:window.pwned=1)",
    "[a](&#x6A;avascript&colon;window.pwned=1)",
    "[a](java\tscript:window.pwned=1)",
    "[a](<java\nscript:window.pwned=1>)",
    "[a](%6aavascript:window.pwned=1)",
    "[a](\x01javascript:window.pwned=1)",
    "[a](vbscript:window.pwned=1)",
    "[a](data:text/html,<script>window.pwned=1</script>)",
    "[a](data:text/html;base64,PHNjcmlwdD5wd25lZD0xPC9zY3JpcHQ+)",
    "[a](//pwned.example/)",
    "[a](/stopService)",
    "[a](file:///etc/passwd) [b](blob:x) [c](https:pwned) [d](https&colon;//x)",
    "<javascript:window.pwned=1>",
    "![a](javascript:window.pwned=1)",
    "![a](data:image/svg+xml,<svg onload=window.pwned=1>)",
    "![a](https://pwned.example/x.png)",
    '![a](x"onerror="window.pwned=1)',
    '[a](https://x.cn/"onmouseover="window.pwned=1 "t\\" onclick=window.pwned=1")',
    "[a]: javascript:window.pwned=1\n\n[a]",
    "[![a](/pwned)](javascript:window.pwned=1)",
    "**[*<img src=/pwned onerror=window.pwned=1>*](javascript:window.pwned=1)**",
    "> - 1. | <img src=/pwned onerror=window.pwned=1> | [a](javascript:window.pwned=1) |\n> |-|-|",
    "```<img src=/pwned onerror=window.pwned=1>\n</code></pre><script>window.pwned=1</script>\n```",
    "`</code><script>window.pwned=1</script>`",
    "$</span><script>window.pwned=1</script>$ $$<img src=/pwned onerror=window.pwned=1>$$",
    "# <img src=/pwned onerror=window.pwned=1> {onclick=window.pwned=1}",
    "&lt;img src=/pwned onerror=window.pwned=1&gt; &#60;script&#62;window.pwned=1&#60;/script&#62;",
    "<<script>script>window.pwned=1<</script>/script>",
    "<a href='https://x.cn' onclick=window.pwned=1>x</a>",
    "<br onclick=window.pwned=1>",
    "__proto__ [constructor][__proto__]\n\n[__proto__]: https://x.cn",
    "\u202e<script>\u2066window.pwned=1</script>\u0000",
    "> " * 3000 + "deep",
    "[" * 3000 + "](" * 3000,
    "*a " * 3000,
]
ALLOWED = """p br hr strong em del code pre h3 h4 h5 h6 ul ol li blockquote a span div table thead tbody tr th td button
    class title target rel tabindex role type start aria-label data-label data-word
    article details summary hidden aria-busy"""


def test_hostile_answers_stay_text(fake, visit):
    """At every step of their coming: only harmless elements, and links to the web or to mail alone."""
    page = visit()
    page.evaluate("""() => {
        window.seen = new Set();
        const look = (node) => {
            if (node.nodeType !== Node.ELEMENT_NODE) return;
            seen.add(node.localName);
            for (const { name, value } of node.attributes) seen.add(name === "href" ? `href ${value}` : name);
            node.childNodes.forEach(look);
        };
        new MutationObserver((changes) => changes.forEach((change) => change.addedNodes.forEach(look)))
            .observe(document.getElementById("log"), { childList: true, subtree: true });
    }""")
    fake.pieces = [piece for text in HOSTILE for piece in (text[: len(text) // 2], f"{text[len(text) // 2 :]}\n\n")]
    answer = ask(page, "one")
    assert "window.pwned" in answer.locator(".text").text_content()
    for text in HOSTILE:
        page.evaluate(SHOW, [[text[:end] for end in range(0, min(len(text), 300), 2)] + [text], True])
    for link in answer.locator(".text a").all():
        assert link.get_attribute("rel") == "noopener noreferrer nofollow" and link.get_attribute("target") == "_blank"
    seen = set(page.evaluate("[...seen]"))
    links = {name for name in seen if name.startswith("href ")}
    assert seen - links - set(ALLOWED.split()) == set()
    assert all(link.startswith(("href https://", "href mailto:", "href http://")) for link in links), links
    assert len(links) >= 3  # the harmless ones came through
    page.wait_for_timeout(100)
    assert page.evaluate("window.pwned") is None
    reload(page)  # from what the browser kept
    page.locator("#list .open").click()
    assert "window.pwned" in page.locator(".assistant .text").text_content()
    assert (
        page.locator("#log").evaluate("log => log.querySelectorAll('img, script, svg, style, iframe, form').length")
        == 0
    )
    assert page.evaluate("window.pwned") is None
    assert [url for url in visit.urls if "pwned" in url] == []


def test_the_page_cannot_make_markup_of_text(visit):
    """The policy's trusted types: a mistake in the page would end in an error, not in an injection."""
    page = visit()
    for script in (
        "document.body.innerHTML = '<b>x</b>'",
        "document.body.insertAdjacentHTML('beforeend', '<b>x</b>')",
        "new DOMParser().parseFromString('<b>x</b>', 'text/html')",
        "document.createElement('iframe').srcdoc = 'x'",
        "document.createElement('script').text = 'x'",
        "trustedTypes.createPolicy('x', {})",
    ):
        message = page.evaluate(
            f"() => {{ try {{ {script}; return 'done'; }} catch (error) {{ return error.message; }} }}"
        )
        assert "Trusted" in message or "olicy" in message, script
    visit.faults.clear()  # each was said on the console


def test_code_and_answers_are_copied(fake, visit):
    fake.pieces, fake.thoughts = ["**a**\n\n```py\nx = 1\n", "y = 2\n```\n"], ["thought"]
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    answer = ask(page, "one")
    press(answer, "Copy code")
    assert page.evaluate("navigator.clipboard.readText()") == "x = 1\ny = 2"
    assert answer.get_by_role("button", name="Copied").is_visible()
    assert page.locator("#status").text_content() == "Copied"
    press(answer, "^Copy$")
    assert page.evaluate("navigator.clipboard.readText()") == "**a**\n\n```py\nx = 1\ny = 2\n```\n"
    press(page.locator(".user"), "^Copy$")
    assert page.evaluate("navigator.clipboard.readText()") == "one"


def test_copying_works_where_browsers_have_the_old_way_only(fake, visit):
    fake.pieces = ["a", " <b>\n"]
    page = visit(script="Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    press(ask(page, "one"), "^Copy$")
    assert page.evaluate("document.activeElement.textContent") == "Copied"
    page.locator("#question").focus()
    page.keyboard.press("Control+V")
    assert page.locator("#question").input_value() == "a <b>\n"
