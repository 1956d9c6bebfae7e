"""`service-config` as a function: a conf/config.json for a model directory, valid before it is returned."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from telechat_mindie import templates
from telechat_mindie.errors import ConfigError
from telechat_mindie.mindie import GENERATIONS
from telechat_mindie.service import ports, schema
from telechat_mindie.service.certificates import Certificate, https_certificates
from telechat_mindie.service.derive import Derived, derive
from telechat_mindie.service.options import ModelFacts, ServiceOptions
from telechat_mindie.service.overrides import set_value
from telechat_mindie.service.patch import patch
from telechat_mindie.service.schema.rules_generation import older_layout
from telechat_mindie.service.schema.settings import DEPLOY, READ_FROM_HOME
from telechat_mindie.service.schema.violations import typed_at, warning

TEMPLATE = "conf_config.json.j2"


@dataclass(frozen=True)
class RenderedConfig:
    """A conf/config.json and how it came about.

    Attributes:
        text: the file, to be written with mode 0640.
        config: its content.
        base: the content it was rendered over: MindIE's default, or the user's template.
        options: what was asked for.
        derived: the values decided on, in the order of decision.
        warnings: rules of MindIE that it only warns about, and settings that count in one place only.
        certificates: the files that HTTPS needs.
    """

    text: str
    config: dict[str, Any]
    base: dict[str, Any]
    options: ServiceOptions
    derived: tuple[Derived, ...]
    warnings: tuple[schema.Violation, ...]
    certificates: tuple[Certificate, ...]


def render_service_config(
    facts: ModelFacts, options: ServiceOptions, is_free: ports.IsFree = ports.is_free
) -> RenderedConfig:
    """Derive every value and render the file: over MindIE's default, or patched over `options.template`.

    A template keeps its key order, layout and line ends, its ports and httpsEnabled (until --port-base and
    --insecure-http say otherwise), and every value that does not follow from the model directory.

    Raises:
        InputError: an option does not fit the model directory or the host; see `derive`.
        ConfigError: the template cannot be read, or the result would violate a rule of MindIE.
    """
    generation, template = options.generation, options.template
    if template is None:
        base = schema.default_config(generation)
        derived = derive(facts, options, base, is_free)
        filled = copy.deepcopy(base)
        for entry in derived:
            set_value(filled, entry.location, entry.value)
        text = templates.render(TEMPLATE, config=filled)
    else:
        base_text = schema.read_text(template)
        base = schema.parse(base_text, where=template)
        if older := older_layout(base):
            raise ConfigError(
                "has the layout of another MindIE", where=template, found=older.found, advice=older.repair
            )
        derived = derive(facts, options, base, is_free)
        text = patch(base_text, {entry.location: entry.value for entry in derived}, where=template)
    where = template or "the rendered file"
    config = schema.parse(text, where)
    accepted = schema.accept(config, generation, where)
    warnings = (*accepted, *_without_effect(derived, generation), *_beyond_plain(config, facts))
    certificates = https_certificates(config, generation, options.mindie_home)
    return RenderedConfig(text, config, base, options, derived, warnings, certificates)


def _beyond_plain(config: dict[str, Any], facts: ModelFacts) -> Iterator[schema.Violation]:
    """A maxSeqLen that the daemon takes, and that the backend computes wrong."""
    here, plain = (*DEPLOY, "maxSeqLen"), facts.plain_length
    length = typed_at(config, here)
    if plain is not None and length is not None and length > plain:
        expected = f"at most {plain}: atb_llm has no dynamic NTK"
        yield warning(here, "plain-length", expected, length, f"Set it to {plain}: longer answers are not the model's.")


def _without_effect(derived: tuple[Derived, ...], generation: str) -> Iterator[schema.Violation]:
    """What the user set and MindIE reads elsewhere, unless the file becomes its home's conf/config.json."""
    if not GENERATIONS[generation].is_public:
        return
    for entry in derived:
        if entry.location[:1] in READ_FROM_HOME and entry.origin == "flag":
            repair = "`launch`, MIES_CONFIG_JSON_PATH and --config-file name another, where it has no effect."
            expected = "it in the conf/config.json of MindIE's home, which alone is read for it"
            yield warning(entry.location, "other-file", expected, entry.value, repair)
