"""The modules imported and the tokenizer run in a clean process, with a time-out."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from telechat_mindie.findings import Finding, error, ok, warning
from telechat_mindie.installing import install_here
from telechat_mindie.model_dir.manifest import REBUILD
from telechat_mindie.model_dir.parts import Parts
from telechat_mindie.service.check.options import CheckOptions
from telechat_mindie.text.control_tokens import CONTROL_IDS
from telechat_mindie.text.settings import template_file
from telechat_mindie.text.trial import QUESTION


def check_by_running(parts: Parts, importable: list[str], options: CheckOptions) -> Iterator[Finding]:
    """The modules of the yaml imported, the tokenizer, and the prompt that it makes of a chat."""
    outcome = _run(parts, importable, options)
    if isinstance(outcome, Finding):
        yield outcome
        return
    for name, failure in outcome["imports"].items():
        yield error(
            "module",
            parts.path,
            f"{name} cannot be imported in a fresh process: {failure}",
            "Install what is missing in the Python that runs MindIE.",
        )
    if not outcome["imports"]:
        yield ok("modules", parts.path, f"{len(importable)} modules and the runner, imported in a fresh process")
    yield from _tokenizer(parts, outcome["tokenizer"])


def _run(parts: Parts, importable: list[str], options: CheckOptions) -> dict[str, Any] | Finding:
    """What `probe` says, or the finding that it said nothing."""
    command = [sys.executable, "-m", "telechat_mindie.service.check.probe", str(parts.path), *importable]
    # No bytecode: a __pycache__ in the model directory would be one more file for MindIE to judge.
    environment = {**options.environment, "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryDirectory() as folder:  # not the caller's, from which Python would import
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=options.timeout,
            )
        except subprocess.TimeoutExpired:
            return error(
                "module-timeout",
                parts.path,
                f"its modules were not imported within {options.timeout:g} s",
                "Look at the load of the machine and at the file system that Python is installed on.",
            )
        except (OSError, ValueError) as failure:
            return error("module", parts.path, f"no fresh process could be started: {failure}")
    try:
        outcome = json.loads(done.stdout.decode(errors="replace").strip().rpartition("\n")[2])
    except ValueError:
        outcome = None
    if not isinstance(outcome, dict):
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        return error(
            "module",
            parts.path,
            f"a fresh process cannot run this package: exit code {done.returncode}, {last or 'no message'}",
            f"Install it in the Python that runs MindIE: {install_here()}",
        )
    return outcome


def _tokenizer(parts: Parts, made: dict[str, Any]) -> Iterator[Finding]:
    where = parts.path / "tokenizer.model"
    if "error" in made:
        yield error("tokenizer", where, made["error"], REBUILD)
        return
    vocab_size = parts.config.vocab_size if parts.config else None
    highest = max(made["plain"] + made["chat"])
    if vocab_size is not None and max(made["pieces"], highest + 1) > vocab_size:
        yield error(
            "vocabulary",
            where,
            f"has {made['pieces']} pieces and gave the id {highest}, and the model's embedding has {vocab_size} rows",
            "Take tokenizer.model and the weights from the same checkpoint.",
        )
        return
    user, bot = CONTROL_IDS["<_user>"], CONTROL_IDS["<_bot>"]
    template = template_file(parts.path) or parts.path / "tokenizer_config.json"
    turns = [token for token in made["chat"] if token in (user, bot)]
    if made["with_tools"]:
        yield warning(
            "chat-tools",
            template,
            f"its chat template makes no prompt of a request with tools: {made['with_tools']}",
            "Requests without tools are not affected. Compare it with the one of the checkpoint.",
        )
    if turns[-2:] != [user, bot]:  # what may follow <_bot> is how a thinking model's answer begins
        yield warning(
            "chat-prompt",
            template,
            f"its chat template makes {made['prompt']!r} of a question, which has no <_bot> after a <_user>",
            "Compare it with the one of the checkpoint; a TeleChat2 answers after <_bot>.",
        )
    elif QUESTION not in made["decoded"]:
        yield error(
            "tokenizer", where, f"a question comes back as {made['decoded']!r}", "Take it from the checkpoint again."
        )
    else:
        yield ok("tokenizer", where, f"{made['pieces']} pieces; a chat becomes {made['prompt']!r}")
