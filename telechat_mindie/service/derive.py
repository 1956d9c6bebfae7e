"""The values of conf/config.json that follow from a model directory and its host, each with where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from telechat_mindie.errors import InputError
from telechat_mindie.kv_budget import FULL_BATCH, CacheShape, CardBudget
from telechat_mindie.mindie import ATB, ATB_UNKNOWN, GENERATIONS, MS, SERVER_PORTS
from telechat_mindie.service import ports
from telechat_mindie.service.options import ModelFacts, ServiceOptions, device_groups
from telechat_mindie.service.overrides import MODEL_ENTRY, parse_override
from telechat_mindie.service.schema.rules_generation import missing_keys
from telechat_mindie.service.schema.settings import BACKEND, DEPLOY, SCHEDULE, SERVER
from telechat_mindie.service.schema.violations import Location

Origin = Literal["checkpoint", "flag", "computed", "template", "MindIE default"]

INPUT_SHARE = 0.75
"""Of maxSeqLen, for the prompt: 6144 of 8192, as in TeleChat2's README (mindformers r1.6.0
research/telechat2/README.md:645-646)."""

SHIPPED_PREFILL_BATCH, SHIPPED_PREFILL_TOKENS = 50, 8192
"""maxPrefillBatchSize and maxPrefillTokens of every generation's default."""


@dataclass(frozen=True, slots=True)
class Derived:
    """A value that `service-config` decided on."""

    location: Location
    value: Any
    origin: Origin
    reason: str


class _Ledger:
    """Takes each value down as it is decided, and lets `--set` win over it."""

    def __init__(self, overrides: dict[Location, Any]) -> None:
        self.overrides = overrides
        self.entries: list[Derived] = []

    def settle(self, location: Location, value: Any, origin: Origin, reason: str) -> Any:
        """Note a value and return the one that holds: the user's own, where `--set` names the location."""
        if location in self.overrides:
            value, origin, reason = self.overrides.pop(location), "flag", "--set"
        self.entries.append(Derived(location, value, origin, reason))
        return value

    def close(self) -> tuple[Derived, ...]:
        """All entries, with the overrides of values that nothing else decides at the end."""
        for location in list(self.overrides):
            self.settle(location, None, "flag", "--set")
        return tuple(self.entries)


def derive(
    facts: ModelFacts, options: ServiceOptions, base: Mapping[str, Any], is_free: ports.IsFree = ports.is_free
) -> tuple[Derived, ...]:
    """Every value that differs, or may differ, from the file that is rendered over.

    Args:
        facts: of the model directory.
        options: of the user.
        base: the content of the file: MindIE's default, or the user's template.
        is_free: tells whether a port can be bound.

    Raises:
        InputError: an option is malformed, the devices do not fit tp and instances, a length exceeds the model's, or
            the memory of a card does not hold the weights and one request of maxSeqLen.
    """
    if facts.backend == ATB and not GENERATIONS[options.generation].is_public:
        raise InputError(
            ATB_UNKNOWN,
            where=f"--mindie {options.generation}",
            expected=" or ".join(name for name, row in GENERATIONS.items() if row.is_public),
            advice="Build a directory for backendType ms for it: telechat-mindie build without --backend.",
        )
    ledger = _Ledger(dict(parse_override(text, options.generation) for text in options.overrides))
    _server(ledger, options, base, is_free)
    _devices(ledger, facts, options)
    max_seq_len = _lengths(ledger, facts, options)
    block_size = _model(ledger, facts)
    _memory(ledger, facts, options, max_seq_len, block_size)
    for location, value in missing_keys(options.generation, base):
        ledger.settle(location, value, "MindIE default", "absent before, and missed by this MindIE")
    return ledger.close()


def _server(ledger: _Ledger, options: ServiceOptions, base: Mapping[str, Any], is_free: ports.IsFree) -> None:
    if options.insecure_http:
        ledger.settle((*SERVER, "httpsEnabled"), False, "flag", "--insecure-http")
    elif options.template is None:
        ledger.settle((*SERVER, "httpsEnabled"), True, "MindIE default", "--insecure-http turns it off")
    # The ports of a template are the user's own choice until --port-base says otherwise.
    if options.template is not None and options.port_base is None:
        return
    wanted = options.port_base if options.port_base is not None else base["ServerConfig"]["port"]
    others = (("BackendConfig", "multiNodesInferPort"), ("ServerConfig", "interCommPort"))
    avoid = [section[name] for key, name in others if isinstance(section := base.get(key), dict) and name in section]
    first = ports.free_run(wanted, 3, avoid, is_free)
    origin: Origin
    if first != wanted:
        origin, reason = "computed", f"the next three free ports from {wanted} on"
    elif options.port_base is not None:
        origin, reason = "flag", f"--port-base {wanted}"
    else:
        origin, reason = "MindIE default", "--port-base gives others"
    for offset, name in enumerate(SERVER_PORTS):
        ledger.settle((*SERVER, name), first + offset, origin, reason)


def _devices(ledger: _Ledger, facts: ModelFacts, options: ServiceOptions) -> None:
    tp, instances = facts.tp, options.instances
    if not 1 <= instances <= 10:
        raise InputError("is not a number of instances", where=f"--instances {instances}", expected="1 to 10")
    rows = device_groups(options.devices, tp, instances, "--instances")
    origin: Origin = "computed" if options.devices is None else "flag"
    reason = f"the first {tp * instances}" if options.devices is None else f"--devices {options.devices}"
    ledger.settle((*BACKEND, "modelInstanceNumber"), instances, "flag" if instances > 1 else "computed", "--instances")
    ledger.settle((*BACKEND, "npuDeviceIds"), rows, origin, f"{reason}, tp {tp} an instance")
    why = "the tp that the directory was built for" if facts.backend == MS else "cards of an instance"
    ledger.settle((*MODEL_ENTRY, "worldSize"), tp, "checkpoint" if facts.backend == MS else origin, why)


def _lengths(ledger: _Ledger, facts: ModelFacts, options: ServiceOptions) -> int:
    """Settle the lengths and return maxSeqLen."""
    wanted = facts.default_length if options.max_seq_len is None else options.max_seq_len
    if not 2 <= wanted <= facts.max_seq_len:
        raise InputError(
            "is not a length that the model directory serves",
            where=f"--max-seq-len {wanted}",
            expected=f"2 to {facts.max_seq_len}",
            advice="Build the directory with a greater --max-seq-len for more.",
        )
    origin: Origin = "checkpoint" if options.max_seq_len is None else "flag"
    max_seq_len = int(ledger.settle((*DEPLOY, "maxSeqLen"), wanted, origin, "tokens of prompt and answer"))

    prompt = options.max_input_len
    if prompt is not None and not 1 <= prompt < max_seq_len:
        raise InputError(
            "leaves no room for an answer",
            where=f"--max-input-len {prompt}",
            expected=f"1 to {max_seq_len - 1}, below maxSeqLen",
        )
    origin, reason = "flag", "--max-input-len"
    if prompt is None:
        prompt = max(1, int(max_seq_len * INPUT_SHARE))
        origin, reason = "computed", f"{INPUT_SHARE:.0%} of maxSeqLen, the rest is for the answer"
    prompt = ledger.settle((*DEPLOY, "maxInputTokenLen"), prompt, origin, reason)

    # MindIE raises a lower value by itself to min(maxSeqLen, maxInputTokenLen + maxIterTimes), and says so only in
    # its log (MindIE-LLM v3.0.0.beta.2 src/llm_manager_v2/impl/llm_manager_impl.cpp:585-592).
    tokens = max(SHIPPED_PREFILL_TOKENS, max_seq_len)
    ledger.settle(
        (*SCHEDULE, "maxPrefillTokens"), tokens, "computed", f"{SHIPPED_PREFILL_TOKENS}, or maxSeqLen if longer"
    )
    # maxSeqLen - 1 is the most that 1.0 documents (mindspore docs r2.6.0, usage/mindie_deployment.md), and all that a
    # prompt of one token leaves.
    ledger.settle(
        (*SCHEDULE, "maxIterTimes"), max_seq_len - 1, "computed", "maxSeqLen - 1, so that it never cuts an answer"
    )
    return max_seq_len


def _model(ledger: _Ledger, facts: ModelFacts) -> int:
    """Settle what names the model and return cacheBlockSize."""
    ledger.settle((*MODEL_ENTRY, "modelName"), facts.model_name, "checkpoint", "the model directory's name")
    ledger.settle((*MODEL_ENTRY, "modelWeightPath"), facts.model_path, "flag", "MODEL_PATH")
    why, reason = "a directory for MindSpore", "block_size of the directory's yaml"
    if facts.backend == ATB:
        why, reason = "a directory for atb_llm", "what MindIE ships"
    ledger.settle((*MODEL_ENTRY, "backendType"), facts.backend, "checkpoint", why)
    return int(ledger.settle((*SCHEDULE, "cacheBlockSize"), facts.block_size, "checkpoint", reason))


def _memory(ledger: _Ledger, facts: ModelFacts, options: ServiceOptions, max_seq_len: int, block_size: int) -> None:
    """Settle npuMemSize and the batches from what a card has left (`kv_budget`).

    maxBatchSize = KV blocks / blocks of a typical request (MindIE-LLM v3.0.0.beta.2 docs/zh/user_guide/user_manual/
    service_parameter_configuration.md:151), at most what MindIE ships.
    """
    if options.request_tokens < 1:
        raise InputError("must be positive", where="--request-tokens", found=options.request_tokens)
    budget = CardBudget.of(options.device_mem_gb, facts.weight_bytes_per_rank, facts.vocab_size, options.reserve_gb)
    location = (*MODEL_ENTRY, "npuMemSize")
    if facts.backend == ATB:
        size = ledger.settle(location, -1, "MindIE default", "the worker takes what is left, as MindIE ships it")
    elif options.dynamic_kv:
        size = ledger.settle(location, -1, "flag", "--dynamic-kv: the worker takes what is left")
    else:
        size = ledger.settle(location, budget.cache, "computed", str(budget))
    shape = CacheShape(facts.kv_bytes_per_token_per_rank, block_size)
    blocks = budget.room(shape, max_seq_len, size).blocks
    typical = shape.blocks_for(min(options.request_tokens, max_seq_len))
    batch = ledger.settle(
        (*SCHEDULE, "maxBatchSize"),
        max(1, min(FULL_BATCH, blocks // typical)),
        "computed",
        f"{blocks} KV blocks / {typical} for a request of {options.request_tokens} tokens, at most {FULL_BATCH}",
    )
    ledger.settle(
        (*SCHEDULE, "maxPrefillBatchSize"),
        min(SHIPPED_PREFILL_BATCH, batch),
        "computed",
        f"{SHIPPED_PREFILL_BATCH}, or maxBatchSize if smaller",
    )
