"""docs/environment.md against the code: every variable that is read, set or checked, and no other."""

from __future__ import annotations

import ast
import re

from helpers import ROOT

PAGE = ROOT / "docs" / "environment.md"
TEMPLATES = ROOT / "model_dir_template"

VARIABLE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+|PYTHON[A-Z]+|GLOG_v|CXX|HOME|PATH")

OTHERS = {
    # words in capitals that are no variables
    "BAD_CERTIFICATE",  # TLS's names of faults
    "CERTIFICATE_EXPIRED",
    "CERTIFICATE_REQUIRED",
    "CERTIFICATE_REVOKED",
    "CERTIFICATE_UNKNOWN",
    "UNKNOWN_CA",
    "UNSUPPORTED_CERTIFICATE",
    "DYNAMIC_NTK",  # a way to extend RoPE
    "EMPTY_DICT",  # pickle's instructions
    "EMPTY_LIST",
    "EMPTY_TUPLE",
    "LONG_BINGET",
    "LONG_BINPUT",
    "EPOCH_STEP",  # what stands for a value in a message
    "MODEL_PATH",
    "MS_SCHED",  # values of MS_ROLE
    "MS_WORKER",
    "MINDIE_IMAGE",  # an argument of a Dockerfile
    "BASH_SOURCE",  # the shell's own
    "CAUSAL_LM",  # a kind of task, to peft
}


def words_of_the_code() -> set[str]:
    """Texts of the package that look like a variable, but for names that it gives to constants of its own."""
    texts, constants = set(), set()
    for path in (ROOT / "telechat_mindie").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and VARIABLE.fullmatch(node.value):
                texts.add(node.value)
        for node in tree.body:
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AnnAssign)
                else []
            )
            constants |= {target.id for target in targets if isinstance(target, ast.Name)}
    return texts - constants


def words_of_the_templates() -> set[str]:
    found = set()
    for path in TEMPLATES.glob("*.j2"):
        found |= set(re.findall(r"(?:export |\$\{?)([A-Z][A-Z0-9_]+)", path.read_text(encoding="utf-8")))
    return found


def words_of_the_page() -> set[str]:
    cells = re.findall(r"^\| (`.*?`) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_the_page_names_every_variable_and_no_other():
    used = (words_of_the_code() | words_of_the_templates()) - OTHERS
    assert sorted(used - words_of_the_page()) == [], "not in docs/environment.md"
    assert sorted(words_of_the_page() - used) == [], "no longer in the code"


def test_the_code_asks_for_no_variable_that_the_pattern_misses():
    """Calls of os.environ and os.getenv with a text, whatever it looks like."""
    asked = set()
    for path in (ROOT / "telechat_mindie").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        asked |= set(re.findall(r"""environ(?:ment)?(?:\.get\(|\.setdefault\(|\.pop\(|\[)\s*["'](\w+)["']""", text))
        asked |= set(re.findall(r"""getenv\(\s*["'](\w+)["']""", text))
    for path in (ROOT / "telechat_mindie" / "model" / "kernels" / "native").iterdir():
        asked |= set(re.findall(r'getenv\("(\w+)"', path.read_text(encoding="utf-8")))
    assert len(asked) > 10 and sorted(asked - words_of_the_page()) == []


def test_nothing_is_excused_that_is_gone():
    assert sorted(OTHERS - words_of_the_code() - words_of_the_templates()) == []
