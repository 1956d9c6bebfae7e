"""Rules between devices, lengths, batches and memory. Sources as in `base`."""

from __future__ import annotations

from collections.abc import Iterator

from telechat_mindie.service.schema.settings import BACKEND, DEPLOY, SCHEDULE, Rule, Settings, model_location
from telechat_mindie.service.schema.violations import Violation, error, show, warning


def instances(settings: Settings) -> Iterator[Violation]:
    """One list of devices an instance (backend_config.cpp:164), and one instance over several machines (doc:89)."""
    number, rows = settings.backend.get("modelInstanceNumber"), settings.backend.get("npuDeviceIds")
    if number is not None and rows is not None and len(rows) != number:
        yield error(
            (*BACKEND, "npuDeviceIds"),
            "instances",
            expected=f"{number} lists, as modelInstanceNumber says",
            found=show(rows),
            repair="Give each instance a list of its own, or change modelInstanceNumber.",
        )
    if settings.backend.get("multiNodesInferEnabled") is True and number not in (None, 1):
        yield error(
            (*BACKEND, "modelInstanceNumber"),
            "multi-node-instances",
            expected="1, since multiNodesInferEnabled is true",
            found=show(number),
            repair="Set it to 1; start a daemon for each further instance.",
        )


def devices(settings: Settings) -> Iterator[Violation]:
    """Each list has worldSize different devices (backend_config.cpp:169-174, 221-226)."""
    rows = settings.backend.get("npuDeviceIds") or []
    world_size = settings.models[0].get("worldSize") if settings.models else None
    for index, row in enumerate(rows):
        here = (*BACKEND, "npuDeviceIds", index)
        if len(set(row)) != len(row):
            yield error(
                here,
                "device-repeated",
                expected="each device once",
                found=show(row),
                repair="List every device of the instance once.",
            )
        elif world_size is not None and len(row) != world_size:
            yield error(
                here,
                "world-size",
                expected=f"{world_size} devices, as worldSize says",
                found=show(row),
                repair="Change the list or worldSize; worldSize is the tp that the model directory was built for.",
            )
        for other, earlier in enumerate(rows[:index]):
            if shared := sorted(set(row) & set(earlier)):
                # MindIE does not compare the lists; two instances then load their weights onto one card.
                yield warning(
                    here,
                    "device-shared",
                    expected=f"no device of instance {other}",
                    found=show(shared),
                    repair="Give each instance devices of its own.",
                )


def one_model(settings: Settings) -> Iterator[Violation]:
    """templateType Standard serves exactly one model (model_deploy_config.cpp:47-53); Mix reads the first entry at
    least (backend_config.cpp:168)."""
    if "ModelConfig" not in settings.deploy:
        return
    count, template = len(settings.models), settings.schedule.get("templateType")
    if count == 0 or (count > 1 and template == "Standard"):
        yield error(
            (*DEPLOY, "ModelConfig"),
            "one-model",
            expected="one entry",
            found=f"{count} entries",
            repair="Keep the entry of the model to serve.",
        )


def preemption(settings: Settings) -> Iterator[Violation]:
    """Preempted requests are at most a batch (schedule_config.cpp:261) and need host memory
    (config_manager_impl.cpp:351)."""
    count, batch = settings.schedule.get("maxPreemptCount"), settings.schedule.get("maxBatchSize")
    if count is None or count == 0:
        return
    if batch is not None and count > batch:
        yield error(
            (*SCHEDULE, "maxPreemptCount"),
            "preempt-batch",
            expected=f"at most {batch}, which is maxBatchSize",
            found=show(count),
            repair="Lower it; 0 turns preemption off.",
        )
    for index, entry in enumerate(settings.models):
        if entry.get("cpuMemSize") == 0:
            yield error(
                model_location(index, "cpuMemSize"),
                "preempt-needs-cpu",
                expected=f"1 GB or more, since maxPreemptCount is {count}",
                found="0",
                repair="Set cpuMemSize to the GB of host memory for swapped KV blocks, or maxPreemptCount to 0.",
            )


def prefill_batch(settings: Settings) -> Iterator[Violation]:
    """A prefill batch is at most a decode batch (schedule_config.cpp:268); 0 stands for that (:80)."""
    prefill, batch = settings.schedule.get("maxPrefillBatchSize"), settings.schedule.get("maxBatchSize")
    if prefill is not None and batch is not None and prefill > batch:
        yield error(
            (*SCHEDULE, "maxPrefillBatchSize"),
            "prefill-batch",
            expected=f"at most {batch}, which is maxBatchSize",
            found=show(prefill),
            repair="Lower it, or write 0 for maxBatchSize.",
        )


def prefill_tokens(settings: Settings) -> Iterator[Violation]:
    """A prefill holds the longest prompt (config_manager_impl.cpp:355, not with Mix, where prompts are cut)."""
    tokens, prompt = settings.schedule.get("maxPrefillTokens"), settings.deploy.get("maxInputTokenLen")
    if tokens is not None and prompt is not None and tokens < prompt:
        if settings.schedule.get("templateType") == "Standard":
            yield error(
                (*SCHEDULE, "maxPrefillTokens"),
                "prefill-tokens",
                expected=f"at least {prompt}, which is maxInputTokenLen",
                found=show(tokens),
                repair="Raise it to maxInputTokenLen, better to maxSeqLen.",
            )
    elif tokens is not None and settings.generation == "1.0" and not 5120 <= tokens <= 409600:
        # The range of 1.0 in the MindSpore project's docs r2.6.0, usage/mindie_deployment.md; public examples for
        # the same release go below it and start.
        yield warning(
            (*SCHEDULE, "maxPrefillTokens"),
            "documented-range",
            expected="5120 to 409600",
            found=show(tokens),
            repair="Keep to the range that MindIE 1.0 documents.",
        )


def lengths(settings: Settings) -> Iterator[Violation]:
    """Prompts end one token before maxSeqLen (src/llm_manager_v2/impl/llm_manager_impl.cpp:1535, doc:113), answers at
    maxIterTimes and at maxSeqLen (doc:152)."""
    total, prompt = settings.deploy.get("maxSeqLen"), settings.deploy.get("maxInputTokenLen")
    answer = settings.schedule.get("maxIterTimes")
    if total is None:
        return
    if prompt is not None and prompt >= total:
        yield warning(
            (*DEPLOY, "maxInputTokenLen"),
            "input-length",
            expected=f"at most {total - 1}, one token less than maxSeqLen",
            found=show(prompt),
            repair="Lower it by the tokens that an answer shall have; MindIE takes maxSeqLen - 1.",
        )
    if answer is not None and answer > total:
        yield warning(
            (*SCHEDULE, "maxIterTimes"),
            "answer-length",
            expected=f"at most {total}, which is maxSeqLen",
            found=show(answer),
            repair="Lower it; every answer ends at maxSeqLen.",
        )
    if prompt is not None and answer is not None and prompt + answer < total:
        yield warning(
            (*SCHEDULE, "maxIterTimes"),
            "answer-room",
            expected=f"at least {total - prompt}, to fill maxSeqLen behind the longest prompt",
            found=show(answer),
            repair="Raise it: answers are cut there, though maxSeqLen has room for more.",
        )


def block_size(settings: Settings) -> Iterator[Violation]:
    """A KV block is 128 tokens or another multiple of 16 (doc:144)."""
    size = settings.schedule.get("cacheBlockSize")
    if size is not None and size % 16:
        yield warning(
            (*SCHEDULE, "cacheBlockSize"),
            "block-size",
            expected="a multiple of 16, best 128",
            found=show(size),
            repair="Set it to the block_size that the model directory was built with.",
        )


def partial_prefills(settings: Settings) -> Iterator[Violation]:
    """Long partial prefills are among all partial ones (schedule_config.cpp:282), the default of 8 included."""
    most, long = settings.schedule.get("maxNumPartialPrefills"), settings.schedule.get("maxLongPartialPrefills")
    if most is not None and long is not None and long > most:
        yield error(
            (*SCHEDULE, "maxLongPartialPrefills"),
            "partial-prefills",
            expected=f"at most {most}, which is maxNumPartialPrefills",
            found=show(long),
            repair="Set both, the second not above the first.",
        )


RULES: tuple[Rule, ...] = (
    instances,
    devices,
    one_model,
    preemption,
    prefill_batch,
    prefill_tokens,
    lengths,
    block_size,
    partial_prefills,
)
