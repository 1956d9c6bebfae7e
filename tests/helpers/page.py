"""The chat page in a real browser, as its tests drive it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import threading
import time

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE = 30  # seconds, for what a busy machine does late


@contextlib.contextmanager
def open_browser():
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)} is on PATH")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=FLAGS)
        yield browser
        browser.close()


class Visits:
    """Opens the page; at the end it must have loaded nothing from elsewhere and raised nothing.

    Visits with the same options share a context, which costs a second: what the browser remembers of an address is
    cleared at the end, since a later service may get it again.

    Args:
        contexts: of the browser, by their options.
        url: of the service.
    """

    def __init__(self, browser, contexts, url):
        self._browser, self._contexts, self._url = browser, contexts, url
        self._pages, self._served = [], set()
        self.faults, self.urls = [], []

    def __call__(self, url=None, *, script=None, **options):
        options = {"locale": "en-US", "viewport": {"width": 1100, "height": 720}, **options}
        key = json.dumps(options)
        if key not in self._contexts:
            self._contexts[key] = self._browser.new_context(**options)
            self._contexts[key].set_default_timeout(1000 * PATIENCE)
        page = self._contexts[key].new_page()
        self._pages.append(page)
        self._served.add(url or self._url)
        if script is not None:
            page.add_init_script(script)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("console", self._on_console)
        page.on("request", lambda request: self.urls.append(request.url))
        page.goto(url or self._url)
        wait_for_scripts(page)
        return page

    def _on_console(self, message):
        if message.type == "warning" or "Security" in message.text:
            self.faults.append(message.text)

    def close(self):
        for page in self._pages:
            session = page.context.new_cdp_session(page)
            for origin in self._served:
                session.send("Storage.clearDataForOrigin", {"origin": origin, "storageTypes": "all"})
            page.close()
        assert self.faults == []
        assert [url for url in self.urls if not url.startswith((*self._served, "data:", "blob:"))] == []


def wait_until(page, condition):
    """For an expression of the page, or a function here.

    Playwright's own wait_for_function polls by an eval in the page, which the page's policy forbids.
    """
    deadline = time.monotonic() + PATIENCE
    while not (condition() if callable(condition) else page.evaluate(condition)):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(20)


def wait_for_scripts(page):
    """A page's own event of loading does not wait for them, as they wait for the database."""
    page.locator("#examples button").first.wait_for(state="attached")


def reload(page):
    page.reload()
    wait_for_scripts(page)


def watch(page, name):
    """Begin to collect each text that the element `name` gets; the expression of those that it had gives them."""
    page.evaluate(f"""() => {{
        const element = document.getElementById("{name}");
        window.seen = [];
        new MutationObserver(() => seen.push(element.textContent)).observe(element, {{ childList: true }});
    }}""")
    return "window.seen"


def wait_for_end(page):
    wait_until(
        page, "document.querySelector('[aria-busy=true]') === null && document.getElementById('send').offsetParent"
    )


def question_box(page):
    return page.locator("#question")


def start(page, question):
    """Ask by keyboard and give the answer's element as soon as there is one."""
    count = page.locator(".assistant").count()
    question_box(page).fill(question)
    page.keyboard.press("Enter")
    answer = page.locator(".assistant").nth(count)
    answer.wait_for()
    return answer


def ask(page, question):
    """Ask, and give the answer's element once it is complete."""
    answer = start(page, question)
    wait_for_end(page)
    return answer


def ask_slowly(page, fake, question):
    """As `ask`, with a rest of 0.2 seconds at least behind the first piece. It is longer than what came before, so that
    the answer has a speed however busy the machine is."""
    fake.hold = threading.Event()
    began = time.monotonic()
    answer = start(page, question)
    answer.locator(".text:not(:empty)").wait_for()
    page.wait_for_timeout(200 + 1000 * (time.monotonic() - began))
    fake.hold.set()
    wait_for_end(page)
    return answer


def press(place, name):
    place.get_by_role("button", name=re.compile(name)).click()


def asked(fake):
    return fake.bodies("/v1/chat/completions")


def texts(page):
    """Of the messages that are shown."""
    return page.locator(".turn .text").all_text_contents()
