"""What the tests of the chat page share: one browser, and a service that answers as a test wants."""

from __future__ import annotations

import pytest
from helpers.fake_mindie import FakeMindie
from helpers.page import Visits, open_browser


@pytest.fixture(scope="module")  # no longer: while it is there, no other event loop runs in this process
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def contexts():
    """Of the browser, by their options."""
    return {}


@pytest.fixture
def fake():
    with FakeMindie(has_page=True) as fake:
        yield fake


@pytest.fixture
def visit(browser, contexts, fake):
    """`visit(locale=...)` opens the page of `fake`."""
    visits = Visits(browser, contexts, fake.url)
    yield visits
    visits.close()
