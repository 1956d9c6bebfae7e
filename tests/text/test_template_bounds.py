"""What a chat template may take: time, characters, and no more of either for being written in a strange way."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from telechat_mindie.errors import InputError
from telechat_mindie.text import chat_template as chat
from telechat_mindie.text.time_limit import run_within

LONG = "{% set long = 'a' * 6 * 10 ** 7 %}"
DOUBLED = (
    "{{% set n = namespace(x='abc') %}}{{% for i in range(25) %}}{{% set n.x = {} %}}{{% endfor %}}"
    "{{{{ n.x | length }}}}"
)


def render(template: str, content: str = "你好") -> str:
    return chat.unmask(chat.render(template, [{"role": "user", "content": content}]))


@pytest.mark.parametrize(
    "template",
    [
        "{% for x in range(99999) %}{% for y in range(99999) %}{% endfor %}{% endfor %}",
        "{% for x in messages[0].content %}{% for y in messages[0].content %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(30) }}",
        "{% set n = namespace(l=[0]) %}{% for i in range(99) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}",
        "{% for x in range(99999) %}{{ range(99999) | map('string') | join | length }}{% endfor %}",
    ],
)
def test_time(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_SECONDS", 1.0)
    began = time.process_time()
    with pytest.raises(InputError, match=r"^chat template: takes more than 1 seconds$"):
        render(template, "a" * 100_000)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 9 }}",
        "{{ 10 ** 9 * ['a'] }}",
        "{{ 2 ** 9999999999 }}",
        "{{ (2 ** 65000) * (2 ** 65000) }}",
        "{{ ('f' * 10 ** 6) | int(base=16) // 3 }}",
        "{% for x in range(99999) %}{{ 'abcdefghij' * 999 }}{% endfor %}",
        DOUBLED.format("n.x ~ n.x"),
        DOUBLED.format("n.x + n.x"),
        DOUBLED.format("'%s%s' % (n.x, n.x)"),
        DOUBLED.format("'{}{}'.format(n.x, n.x)"),
        DOUBLED.format("[n.x, n.x] | join"),
        DOUBLED.format("''.join([n.x, n.x])"),
        DOUBLED.format("n.x | replace('a', 'aa') | replace('b', 'bb') | replace('c', 'cc')"),
        "{% set n = namespace(l=[0]) %}{% for i in range(25) %}{% set n.l = n.l + n.l %}{% endfor %}",
        "{% set x %}{% for x in range(99999) %}{{ 'abcdefghij' * 999 }}{% endfor %}{% endset %}",
        "{% macro f() %}{% for x in range(99999) %}{{ 'abcdefghij' * 999 }}{% endfor %}{% endmacro %}{% set x = f() %}",
        "{{ 'a'.center(2 * 10 ** 8) }}",
        "{{ messages[0].content.center(2 * 10 ** 8) }}",
        "{{ 'a'.ljust(2 * 10 ** 8, '<') }}",
        "{{ 'a'['rjust'](2 * 10 ** 8) }}",
        "{{ 'a'.zfill(2 * 10 ** 8) }}",
        "{{ ('\t' * 1000).expandtabs(10 ** 6) }}",
        "{{ ('a' * 10 ** 5).replace('a', 'b' * 10 ** 5) }}",
        "{{ ('a' * 10 ** 5).join(['b'] * 10 ** 4) }}",
        "{{ '%200000000d' % 1 }}",
        "{{ '%*d' % (200000000, 1) }}",
        "{{ '%(a).200000000f' % {'a': 1} }}",
        "{{ '{:200000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 200000000) }}",
        "{{ '{a:>200000000}'.format_map({'a': 1}) }}",
        LONG + "{{ '{0}{0}'.format(long) }}",
        LONG + "{{ [long, long] }}",
        LONG + "{{ [long, long] | tojson }}",
        LONG + "{{ long ~ long }}",
        "{{ messages | tojson(indent=100000000) }}",
        "{{ ([1] * 10 ** 5) | tojson(indent=1000) }}",
        "{{ 'a' | center(200000000) }}",
        "{{ 'a' | center(width=200000000) }}",
        "{{ ('\n' * 1000) | indent(200000000) }}",
        "{{ ('a\n' * 10 ** 4) | indent('b' * 10 ** 5) }}",
        "{{ '%200000000d' | format(1) }}",
        "{{ [1] | batch(10 ** 9, 'x') | list }}",
        "{{ 1 | round(10 ** 9, 'ceil') }}",
        "{{ ('a b ' * 10 ** 4) | wordwrap(1, wrapstring='b' * 10 ** 5) }}",
        "{{ strftime_now('%200000000Y' * 10 ** 5) }}",
    ],
)
def test_size(template: str) -> None:
    began = time.process_time()
    with pytest.raises(InputError, match=r"^chat template: makes too long a (text|number)"):
        render(template)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "template", ["{{ 'a'.encode() }}", "{{ (1).to_bytes(9) }}", "{{ 'a'['translate']({97: 'bb'}) }}"]
)
def test_bytes_are_no_text(template: str) -> None:
    with pytest.raises(InputError, match="is unsafe"):
        render(template)


def test_what_fits_is_as_ever() -> None:
    for template, text in (
        ("{{ '%-5s|%s' % ('a', [1]) }}", "a    |[1]"),
        ("{{ '{:>3}{x!r}'.format(7, x='y') }}", "  7'y'"),
        ("{{ '{a}'.format_map({'a': 1700000000}) }}", "1700000000"),
        ("{{ ['a', 'b'] | join(', ') }}{{ messages | join(' ', attribute='role') }}", "a, buser"),
        ("{{ ', '.join(['a', 'b'] | map('upper')) }}", "A, B"),
        ("{{ 'a'.center(3) }}{{ 'a' | center(3) }}", " a  a "),
        ("{{ 'a\nb' | indent(2) }}", "a\n  b"),
        ("{{ {'b': [1, 'x']} | tojson(indent=1) }}", '{\n "b": [\n  1,\n  "x"\n ]\n}'),
        ("{{ [1, 2, 3] | batch(2) | list }}", "[[1, 2], [3]]"),
        ("{{ 2.567 | round(2) }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 10 }}", "2.57331024"),
        ("{% autoescape true %}{{ '<' ~ ('<' | safe) }}{% endautoescape %}", "&lt;<"),
        ("{{ 1 ~ none ~ nothing ~ true }}", "1NoneTrue"),
    ):
        assert render(template) == text


class TestTimeLimit:
    def test_results_and_errors_are_the_functions(self) -> None:
        assert run_within(1, lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            run_within(1, lambda: 1 // 0)  # type: ignore[arg-type, return-value]

    def test_nothing_that_is_caught_stops_it(self) -> None:
        def stubborn() -> None:
            while True:
                try:
                    time.perf_counter()
                except Exception:
                    continue

        with pytest.raises(TimeoutError):
            run_within(0.05, stubborn)

    def test_a_limit_within_a_limit_is_the_outer_one(self) -> None:
        def inner() -> list[int | None]:
            return [threading.get_ident(), run_within(0.001, lambda: sum(range(10**6)) and threading.get_ident())]

        outer, own = run_within(5, inner)
        assert outer == own != threading.get_ident()
        with pytest.raises(TimeoutError):
            run_within(0.05, lambda: run_within(100, lambda: [None for _ in iter(int, 1)]))

    def test_waiting_is_no_processor_time(self) -> None:
        assert run_within(0.1, lambda: time.sleep(0.5) or "done") == "done"

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # dropped, so stopped once more
    def test_what_stops_one_reaches_no_other(self) -> None:
        """Two thousand that end at about the limit, in several threads: each gives its result or is refused, and what
        the callers do between them is never interrupted."""
        outcomes: list[bool] = []

        def callers() -> None:
            for turn in range(500):
                spins = turn % 20 * 100
                try:
                    outcomes.append(run_within(1e-4, lambda spins=spins: sum(1 for _ in range(spins))) == spins)
                except TimeoutError:
                    outcomes.append(False)
                for _ in range(100):
                    pass

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            threads = [threading.Thread(target=callers) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        assert len(outcomes) == 2000
        assert set(outcomes) == {True, False}
        assert not [thread for thread in threading.enumerate() if thread.name == "time limit"]
