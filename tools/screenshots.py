"""Take the pictures of the chat page for docs/images: desktop, phone and dark.

`serve` runs on telechat2-nano, whose answers and figures are real. The conversation that is shown has an answer that
stands in this file, with what nano does not write: a thought, a listing, a table, a formula. It has no count of tokens.

    python tools/screenshots.py [--output docs/images]

Needs Chromium on PATH, and fonts with Chinese characters.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Browser, Page, Route, sync_playwright

from telechat_mindie.model_dir.build import build
from telechat_mindie.nano import write_checkpoint

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MOST_BYTES = 150_000  # of a picture


@dataclass(frozen=True)
class Picture:
    """A window and who sits before it."""

    name: str
    width: int  # CSS pixels
    height: int
    language: str
    colours: str = "light"
    scale: float = 1.0  # pixels per CSS pixel


PICTURES = (
    Picture("desktop", 1280, 800, "en-US"),
    Picture("dark", 1280, 800, "zh-CN", colours="dark"),
    Picture("phone", 390, 844, "zh-CN", scale=1.5),
)
SAMPLES = {
    "en-US": (
        "How large is the KV cache of one token?",
        "Two matrices per layer, keys and values.",
        """For each layer the cache holds **one key and one value** of every KV head:

$$B = 2 \\cdot n_{layers} \\cdot n_{kv} \\cdot d_{head} \\cdot size$$

| layers | KV heads | head dim | bytes per token |
|---:|---:|---:|---:|
| 30 | 32 | 128 | 491,520 |
| 48 | 8 | 128 | 196,608 |

```python
def kv_bytes(layers: int, heads: int, dim: int, size: int = 2) -> int:
    return 2 * layers * heads * dim * size
```
""",
    ),
    "zh-CN": (
        "一个 token 的 KV 缓存有多大？",
        "每层有键和值两个矩阵。",
        """每一层为每个 KV 头保存**一个键和一个值**：

$$B = 2 \\cdot n_{layers} \\cdot n_{kv} \\cdot d_{head} \\cdot size$$

| 层数 | KV 头 | 头维度 | 每 token 字节 |
|---:|---:|---:|---:|
| 30 | 32 | 128 | 491,520 |
| 48 | 8 | 128 | 196,608 |

```python
def kv_bytes(layers: int, heads: int, dim: int, size: int = 2) -> int:
    return 2 * layers * heads * dim * size
```
""",
    ),
}
QUESTIONS = ("红烧肉怎么做？", "生抽与老抽的区别？")  # nano can answer these


@contextlib.contextmanager
def running_server() -> Iterator[str]:
    """The URL of `serve` on telechat2-nano."""
    with tempfile.TemporaryDirectory(prefix="telechat-screenshots-") as folder:
        write_checkpoint(Path(folder, "checkpoint"))
        build(Path(folder, "nano"), Path(folder, "checkpoint"))
        command = [sys.executable, "-m", "telechat_mindie", "serve", f"{folder}/nano", "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
            try:
                lines = iter(server.stdout or ())
                line = next((line for line in lines if "Daemon start success!" in line), "")
                if not line:
                    raise SystemExit(f"error: the server ended with exit code {server.wait()}")
                reader = threading.Thread(target=list, args=(lines,), daemon=True)  # lest its pipe fills
                reader.start()
                yield line.partition(" at ")[2].split(",")[0].strip()
                server.terminate()
                reader.join()
            finally:
                server.kill()


def answer_with(thought: str, text: str) -> str:
    """The events of a chat's answer."""
    deltas: tuple[tuple[dict[str, str], str | None], ...] = (
        ({"reasoning_content": thought}, None),
        ({"content": text}, None),
        ({}, "stop"),
    )
    choices = ({"index": 0, "delta": delta, "finish_reason": reason} for delta, reason in deltas)
    return "".join(f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in choices) + "data: [DONE]\n\n"


def ask(page: Page, question: str) -> None:
    page.locator("#question").fill(question)
    page.locator("#question").press("Enter")
    page.locator(".turn.assistant:not([aria-busy])").last.wait_for()
    page.locator("#send").wait_for()


def take(browser: Browser, url: str, picture: Picture, output: Path) -> Path:
    context = browser.new_context(
        locale=picture.language,
        color_scheme="dark" if picture.colours == "dark" else "light",
        viewport={"width": picture.width, "height": picture.height},
        device_scale_factor=picture.scale,
    )
    page = context.new_page()
    page.goto(url)
    question, *parts = SAMPLES[picture.language]
    events = answer_with(*parts)

    def answer(route: Route) -> None:
        route.fulfill(content_type="text/event-stream", body=events)

    page.route("**/v1/chat/completions", answer)
    ask(page, question)
    page.unroute("**/v1/chat/completions")
    for real in QUESTIONS:
        page.locator("#new, #new-too").filter(visible=True).click()
        ask(page, real)
    page.wait_for_timeout(2500)  # for the curve, which has a point a second
    page.locator("#list .open").last.evaluate("button => button.click()")  # on a phone it stands behind a button
    page.locator("#log").evaluate("log => { log.scrollTop = 0; }")
    page.mouse.move(0, 0)
    path = output / f"page-{picture.name}.png"
    page.screenshot(path=path)
    context.close()
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "docs" / "images")
    arguments = parser.parse_args()
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        raise SystemExit(f"error: none of {', '.join(BROWSERS)} is on PATH: install Chromium")
    arguments.output.mkdir(parents=True, exist_ok=True)
    with running_server() as url, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=["--headless", "--no-sandbox"])
        for picture in PICTURES:
            path = take(browser, url, picture, arguments.output)
            size = path.stat().st_size
            print(f"{path}  {size / 1000:.0f} kB")
            if size > MOST_BYTES:
                raise SystemExit(f"error: {path} has {size} bytes, expected at most {MOST_BYTES}: make it smaller")
        browser.close()


if __name__ == "__main__":
    main()
