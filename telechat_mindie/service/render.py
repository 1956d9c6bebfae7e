"""`service-config` as a function: a conf/config.json for a model directory, valid before it is returned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from telechat_mindie import templates
from telechat_mindie.errors import ConfigError
from telechat_mindie.service import ports, schema
from telechat_mindie.service.certificates import Certificate, https_certificates
from telechat_mindie.service.derive import Derived, derive
from telechat_mindie.service.options import ModelFacts, ServiceOptions
from telechat_mindie.service.overrides import set_value
from telechat_mindie.service.patch import patch

TEMPLATE = "conf_config.json.j2"
SHOWN_ERRORS = 5


@dataclass(frozen=True)
class RenderedConfig:
    """A conf/config.json and how it came about.

    Attributes:
        text: the file, to be written with mode 0640.
        config: its content.
        base: the content it was rendered over: MindIE's default, or the user's template.
        options: what was asked for.
        derived: the values decided on, in the order of decision.
        warnings: rules of MindIE that it only warns about.
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
    template = options.template
    base_text = None if template is None else schema.read_text(template)
    base = schema.default_config(options.generation) if base_text is None else schema.parse(base_text, where=template)
    derived = derive(facts, options, base, is_free)
    if base_text is None:
        config = schema.default_config(options.generation)
        for entry in derived:
            set_value(config, entry.location, entry.value)
        text = templates.render(TEMPLATE, config=config)
    else:
        text = patch(base_text, {entry.location: entry.value for entry in derived}, where=template)
    config = schema.parse(text, where=template or "the rendered file")
    violations = schema.validate(config, options.generation)
    errors = [violation for violation in violations if violation.severity == "error"]
    if errors:
        more = f" And {len(errors) - SHOWN_ERRORS} more." if len(errors) > SHOWN_ERRORS else ""
        raise ConfigError(
            f"would not be accepted by MindIE {options.generation}",
            where=template or "the rendered file",
            advice=" ".join(str(violation) for violation in errors[:SHOWN_ERRORS]) + more,
        )
    certificates = https_certificates(config, options.generation, options.mindie_home)
    return RenderedConfig(text, config, base, options, derived, tuple(violations), certificates)
