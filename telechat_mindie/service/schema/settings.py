"""What the rules between fields read: the values that are sound by themselves, defaults filled in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_origin

from telechat_mindie.service.schema.base import MindieObject
from telechat_mindie.service.schema.service import MODELS
from telechat_mindie.service.schema.structure import child_model
from telechat_mindie.service.schema.violations import MISSING, Location, Violation, value_at

SERVER: Location = ("ServerConfig",)
BACKEND: Location = ("BackendConfig",)
DEPLOY: Location = (*BACKEND, "ModelDeployConfig")
SCHEDULE: Location = (*BACKEND, "ScheduleConfig")

READ_FROM_HOME: tuple[Location, ...] = (("LogConfig",), ("EnableDynamicAdjustTimeoutConfig",))
"""What 3.0.0.beta and later read of their home's own conf/config.json, whatever file the daemon was started with.

Both are polled there: src/utils/log/log_level_dynamic_handler.cpp:25-38 and src/config_manager/
config_dynamic_handler.cpp:84-128 of MindIE-LLM v3.0.0.beta.2. Of closed generations it is not known.
"""


def model_location(index: int, *rest: str | int) -> Location:
    """Where the ModelConfig entry `index`, or something in it, stands."""
    return (*DEPLOY, "ModelConfig", index, *rest)


@dataclass(frozen=True)
class Settings:
    """A conf/config.json without its unsound values, so that one fault is told once.

    A value that fails its own check, or is compulsory and missing, is simply absent from the dicts: rules ask with
    `.get` and keep silent where an operand is None.
    """

    generation: str
    raw: Mapping[str, Any]
    sound: dict[str, Any]
    server: dict[str, Any]
    backend: dict[str, Any]
    deploy: dict[str, Any]
    schedule: dict[str, Any]
    models: list[dict[str, Any]]

    @classmethod
    def of(cls, generation: str, data: Mapping[str, Any], unsound: Collection[Location]) -> Settings:
        """Collect the sound values of `data`; `unsound` holds the locations that violate the structure."""
        sound = _sound(MODELS[generation], data, unsound, ())
        backend = sound.get("BackendConfig", {})
        deploy = backend.get("ModelDeployConfig", {})
        server, schedule = sound.get("ServerConfig", {}), backend.get("ScheduleConfig", {})
        return cls(generation, data, sound, server, backend, deploy, schedule, deploy.get("ModelConfig", []))

    def get(self, location: Location) -> Any:
        """The sound value at a location, None where there is none."""
        return value_at(self.sound, location)

    def given(self, *location: str | int) -> bool:
        """Whether the file itself has a value at the location."""
        return value_at(self.raw, location, MISSING) is not MISSING

    def serves_with(self, backend: str) -> bool:
        """Whether an entry of ModelConfig has this backendType."""
        return any(entry.get("backendType") == backend for entry in self.models)


def _sound(
    model: type[MindieObject], data: Mapping[str, Any], unsound: Collection[Location], location: Location
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        here = (*location, name)
        if name not in data:
            if not field.is_required():
                default = field.default
                values[name] = default.model_dump() if isinstance(default, MindieObject) else default
            continue
        if here in unsound:
            continue
        child = child_model(field)
        if child is None:
            if not any(place[: len(here)] == here for place in unsound):  # no item of a list is unsound
                values[name] = data[name]
        elif get_origin(field.annotation) is list:
            values[name] = [
                _sound(child, item, unsound, (*here, index)) if (*here, index) not in unsound else {}
                for index, item in enumerate(data[name])
            ]
        else:
            values[name] = _sound(child, data[name], unsound, here)
    return values


Rule = Callable[[Settings], Iterable[Violation]]
"""A rule between fields: the violations of it that a file has."""
