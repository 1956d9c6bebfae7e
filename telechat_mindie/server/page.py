"""The chat page's files, which the business port serves, and what a browser lets them do.

They need no build step and load nothing from elsewhere. `static/vendor/` holds what others wrote, unchanged, beside its
licence; the first lines of a file name its version. It is marked, which reads Markdown.
"""

from __future__ import annotations

import functools
from pathlib import Path

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Content-Security-Policy of the page: its own files, and requests to this server. The last two directives leave no way
to make markup or code of a text, such as `innerHTML`: all that the page shows of an answer, it builds node by node."""

PAGE_HEADERS = {
    "Content-Security-Policy": PAGE_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
}  # of what a browser asks for, by its ending


@functools.cache
def page_files() -> dict[str, tuple[bytes, str]]:
    """The path on the server of each file, with its content and its media type. `/` is the page itself."""
    static = Path(__file__).with_name("static")
    files = {}
    for file in sorted(static.rglob("*")):
        if kind := _TYPES.get(file.suffix):
            name = file.relative_to(static).as_posix()
            path = "/" if name == "index.html" else f"/page/{name}"
            files[path] = file.read_bytes(), f"{kind}; charset=utf-8"
    return files
