"""The schema of MindIE's conf/config.json, by generation: types, ranges, defaults, and the rules between fields.

Importable on its own: pydantic and the standard library, no framework.

What is known of each generation, and from where:

- `3.0.0.beta`: everything, from the C++ of MindIE-LLM v3.0.0.beta.2 (v3.0.0.beta.1 differs in a few ATB features).
- `3.0`: likewise, from v3.0.0 (v3.0.0.beta.3 has the same file).
- `2.0` to `2.3`: files that public projects embed, and MindIE 2.3's parameter reference. The source is closed; rules
  are those of 3.0.0.beta where both have the field, and errors only where a document or its own file has them too.
- `1.0`: the files that the MindSpore project documents for 1.0.RC3 and 1.0.0. The source is closed here too.

`docs/mindie-conf.md` says the same for users, with the differences in a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from telechat_mindie import mindie
from telechat_mindie.errors import ConfigError
from telechat_mindie.service import DEFAULT_GENERATION
from telechat_mindie.service.schema import rules_backend, rules_generation, rules_model, rules_plugin, rules_server
from telechat_mindie.service.schema.files import default_config, json_schema, load, parse, read_text
from telechat_mindie.service.schema.service import model_of
from telechat_mindie.service.schema.settings import Settings
from telechat_mindie.service.schema.structure import check_structure
from telechat_mindie.service.schema.violations import Violation, json_path

__all__ = [
    "DEFAULT_GENERATION",
    "GENERATIONS",
    "Violation",
    "accept",
    "default_config",
    "json_path",
    "json_schema",
    "load",
    "parse",
    "read_text",
    "validate",
]

GENERATIONS = tuple(mindie.GENERATIONS)
"""The names that `--mindie` takes, oldest first."""

RULES = (
    *rules_generation.RULES,
    *rules_server.RULES,
    *rules_backend.RULES,
    *rules_model.RULES,
    *rules_plugin.RULES,
)


SHOWN_ERRORS = 5


def validate(data: Mapping[str, Any], generation: str) -> list[Violation]:
    """Every violation in the content of a conf/config.json at once, errors first.

    Values are judged one by one, then the rules between fields on the values that are sound; so a fault is told once,
    and no fault hides another. `data` is not changed.

    Raises:
        InputError: the generation is not one of GENERATIONS.
    """
    model_of(generation)
    if older := rules_generation.older_layout(data):
        return [older]
    by_location = check_structure(generation, data, default_config(generation))
    violations = [violation for found in by_location.values() for violation in found]
    unsound = {location for location, found in by_location.items() if any(v.rule != "unknown-key" for v in found)}
    settings = Settings.of(generation, data, unsound)
    for rule in RULES:
        violations.extend(rule(settings))
    if not mindie.GENERATIONS[generation].is_public:
        violations = [rules_generation.as_far_as_known(violation, generation) for violation in violations]
    return sorted(violations, key=lambda violation: violation.severity)


def accept(data: Mapping[str, Any], generation: str, where: object) -> tuple[Violation, ...]:
    """The violations that MindIE passes over, where it would start with the file.

    Raises:
        ConfigError: it would not; the first five reasons are named.
        InputError: the generation is unknown.
    """
    violations = validate(data, generation)
    if errors := [str(violation) for violation in violations if violation.severity == "error"]:
        more = f" And {len(errors) - SHOWN_ERRORS} more." if len(errors) > SHOWN_ERRORS else ""
        advice = " ".join(errors[:SHOWN_ERRORS]) + more
        raise ConfigError(f"would not be accepted by MindIE {generation}", where=where, advice=advice)
    return tuple(violations)
