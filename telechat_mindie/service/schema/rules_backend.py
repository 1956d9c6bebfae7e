"""Rules between devices, lengths, batches and memory. Sources as in `base`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from telechat_mindie.service.schema.settings import BACKEND, DEPLOY, SCHEDULE, Rule, Settings, model_location
from telechat_mindie.service.schema.violations import NOTHING, Location, Violation, Words, error, warning

BATCH: Location = (*SCHEDULE, "maxBatchSize")
PREFILL_TOKENS: Location = (*SCHEDULE, "maxPrefillTokens")
LENGTH: Location = (*DEPLOY, "maxSeqLen")


class AtMost(NamedTuple):
    """A number that another one bounds."""

    field: Location
    bound: Location
    rule: str
    repair: str
    report: Callable[..., Violation] = error
    less: int = 0  # how far it must stay below the bound
    given: bool = False  # only where the file names it; MindIE lowers its own default


AT_MOST = (
    # schedule_config.cpp:261
    AtMost((*SCHEDULE, "maxPreemptCount"), BATCH, "preempt-batch", "Lower it; 0 turns preemption off."),
    # A prefill batch is at most a decode batch (schedule_config.cpp:268); 0 stands for that (:80).
    AtMost((*SCHEDULE, "maxPrefillBatchSize"), BATCH, "prefill-batch", "Lower it, or write 0 for maxBatchSize."),
    # Long partial prefills are among all partial ones (schedule_config.cpp:282), the default of 8 included.
    AtMost(
        (*SCHEDULE, "maxLongPartialPrefills"),
        (*SCHEDULE, "maxNumPartialPrefills"),
        "partial-prefills",
        "Set both, this one not above the other.",
    ),
    AtMost((*SCHEDULE, "maxN"), BATCH, "answers-batch", "Lower it.", given=True),  # v3.0.0 schedule_config.cpp
    # Prompts end one token before maxSeqLen (src/llm_manager_v2/impl/llm_manager_impl.cpp:1535, doc:113).
    AtMost(
        (*DEPLOY, "maxInputTokenLen"),
        LENGTH,
        "input-length",
        "Lower it by the tokens that an answer shall have; MindIE takes maxSeqLen - 1.",
        warning,
        less=1,
    ),
    # Answers end at maxIterTimes and at maxSeqLen (doc:152).
    AtMost((*SCHEDULE, "maxIterTimes"), LENGTH, "answer-length", "Lower it; every answer ends at maxSeqLen.", warning),
)


def at_most(settings: Settings) -> Iterator[Violation]:
    """The rows of AT_MOST."""
    for row in AT_MOST:
        value, bound = settings.get(row.field), settings.get(row.bound)
        if row.given and not settings.given(*row.field):
            continue
        if value is not None and bound is not None and value > bound - row.less:
            name = f"{row.bound[-1]} - {row.less}" if row.less else row.bound[-1]
            yield row.report(row.field, row.rule, f"at most {bound - row.less}, which is {name}", value, row.repair)


def instances(settings: Settings) -> Iterator[Violation]:
    """One list of devices an instance (backend_config.cpp:164), and one instance over several machines (doc:89)."""
    number, rows = settings.backend.get("modelInstanceNumber"), settings.backend.get("npuDeviceIds")
    if number is not None and rows is not None and len(rows) != number:
        repair = "Give each instance a list of its own, or change modelInstanceNumber."
        yield error(
            (*BACKEND, "npuDeviceIds"), "instances", f"{number} lists, as modelInstanceNumber says", rows, repair
        )
    if settings.backend.get("multiNodesInferEnabled") is True and number not in (None, 1):
        here, repair = (*BACKEND, "modelInstanceNumber"), "Set it to 1; start a daemon for each further instance."
        yield error(here, "multi-node-instances", "1, since multiNodesInferEnabled is true", number, repair)


def devices(settings: Settings) -> Iterator[Violation]:
    """Each list has worldSize different devices (backend_config.cpp:169-174, 221-226)."""
    rows = settings.backend.get("npuDeviceIds") or []
    world_size = settings.models[0].get("worldSize") if settings.models else None
    for index, row in enumerate(rows):
        here = (*BACKEND, "npuDeviceIds", index)
        if len(set(row)) != len(row):
            yield error(here, "device-repeated", "each device once", row, "List every device of the instance once.")
        elif world_size is not None and len(row) != world_size:
            repair = "Change the list or worldSize; worldSize is the tp that the model directory was built for."
            yield error(here, "world-size", f"{world_size} devices, as worldSize says", row, repair)
        for other, earlier in enumerate(rows[:index]):
            if shared := sorted(set(row) & set(earlier)):
                # MindIE does not compare the lists; two instances then load their weights onto one card.
                repair = "Give each instance devices of its own."
                yield warning(here, "device-shared", f"no device of instance {other}", shared, repair)


def layerwise_nodes(settings: Settings) -> Iterator[Violation]:
    """The switch makes the port compulsory, even where it is false (backend_config.cpp:147-150)."""
    here = (*BACKEND, "layerwiseDisaggregated")
    switch, port = "layerwiseDisaggregatedMultiNodesInferEnabled", "layerwiseDisaggregatedMultiNodesCtrlPort"
    if settings.given(*here, switch) and not settings.given(*here, port):
        repair = f'Add "{port}": 10003, or remove {switch}.'
        yield error((*here, port), "compulsory", f"a port, since {switch} is there", NOTHING, repair)


def one_model(settings: Settings) -> Iterator[Violation]:
    """templateType Standard serves exactly one model (model_deploy_config.cpp:47-53); Mix reads the first entry at
    least (backend_config.cpp:168)."""
    count, template = len(settings.models), settings.schedule.get("templateType")
    if "ModelConfig" in settings.deploy and (count == 0 or (count > 1 and template == "Standard")):
        here, repair = (*DEPLOY, "ModelConfig"), "Keep the entry of the model to serve."
        yield error(here, "one-model", "one entry", Words(f"{count} entries"), repair)


def preemption(settings: Settings) -> Iterator[Violation]:
    """Preempted requests need host memory (config_manager_impl.cpp:351)."""
    count = settings.schedule.get("maxPreemptCount")
    repair = "Set cpuMemSize to the GB of host memory for swapped KV blocks, or maxPreemptCount to 0."
    for index, entry in enumerate(settings.models):
        if count and entry.get("cpuMemSize") == 0:
            expected = f"1 GB or more, since maxPreemptCount is {count}"
            yield error(model_location(index, "cpuMemSize"), "preempt-needs-cpu", expected, 0, repair)


def prefill_tokens(settings: Settings) -> Iterator[Violation]:
    """A prefill holds the longest prompt (config_manager_impl.cpp:355, not with Mix, where prompts are cut)."""
    tokens, prompt = settings.get(PREFILL_TOKENS), settings.deploy.get("maxInputTokenLen")
    if tokens is not None and prompt is not None and tokens < prompt:
        if settings.schedule.get("templateType") == "Standard":
            repair = "Raise it to maxInputTokenLen, better to maxSeqLen."
            yield error(
                PREFILL_TOKENS, "prefill-tokens", f"at least {prompt}, which is maxInputTokenLen", tokens, repair
            )
    elif tokens is not None and settings.generation == "1.0" and not 5120 <= tokens <= 409600:
        # The range of 1.0 in the MindSpore project's docs r2.6.0, usage/mindie_deployment.md; public examples for
        # the same release go below it and start.
        repair = "Keep to the range that MindIE 1.0 documents."
        yield warning(PREFILL_TOKENS, "documented-range", "5120 to 409600", tokens, repair)


def answer_room(settings: Settings) -> Iterator[Violation]:
    """Answers end at maxIterTimes (doc:152), which should leave no room of maxSeqLen unused."""
    total, prompt = settings.get(LENGTH), settings.deploy.get("maxInputTokenLen")
    answer = settings.schedule.get("maxIterTimes")
    if total is not None and prompt is not None and answer is not None and prompt + answer < total:
        expected = f"at least {total - prompt}, to fill maxSeqLen behind the longest prompt"
        repair = "Raise it: answers are cut there, though maxSeqLen has room for more."
        yield warning((*SCHEDULE, "maxIterTimes"), "answer-room", expected, answer, repair)


def block_size(settings: Settings) -> Iterator[Violation]:
    """A KV block is 128 tokens or another multiple of 16 (doc:144)."""
    here, repair = (*SCHEDULE, "cacheBlockSize"), "Set it to the block_size that the model directory was built with."
    size = settings.get(here)
    if size is not None and size % 16:
        yield warning(here, "block-size", "a multiple of 16, best 128", size, repair)


RULES: tuple[Rule, ...] = (
    at_most,
    instances,
    devices,
    layerwise_nodes,
    one_model,
    preemption,
    prefill_tokens,
    answer_room,
    block_size,
)
