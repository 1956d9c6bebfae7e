"""What people give in the place of a TeleChat2 checkpoint, by which sign it is known, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from telechat_mindie.errors import TelechatMindieError


@dataclass(frozen=True, slots=True)
class Foreign:
    """One row of the table.

    Attributes:
        sign: where it shows: in the name of a "file" of a folder without weights of ours, of a "rank file" among
            several, of a "tensor", in a "dtype", or in a "config" as `key=value`.
        pattern: what the whole of it matches.
        what: what it is, as a clause about the file.
        advice: what to do, as a sentence.
    """

    sign: str
    pattern: str
    what: str
    advice: str


WEIGHT_SUFFIXES = (".safetensors", ".bin", ".ckpt")
"""Of files that hold weights here."""

BESIDE_WEIGHTS = (".json", ".model", ".yaml", ".yml", ".py", ".md", ".txt", ".jinja")
"""Of files that lie beside them, and that somebody may name in the place of their folder."""

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""What peft calls an adapter's weights, which may lie beside a model's."""

_GPTQ, _AWQ = "is quantised by GPTQ", "is quantised by AWQ"
_W8A8 = "is quantised to int8 by msmodelslim (W8A8, W8A8SC, W8A16)"
_FP8, _BNB = "is quantised to fp8", "is quantised by bitsandbytes"
IS_ADAPTER = "is a LoRA adapter, not a model"
NOT_A_MODEL = "Name the model that it was trained on as --checkpoint, and the adapter as --adapter."
_ORIGINAL = "Take the float16, bfloat16 or float32 checkpoint that it was made from; nothing is dequantised here."
_ATB_TAKES_IT = (
    "Take the float16, bfloat16 or float32 checkpoint that it was made from: no kernel for MindSpore here computes "
    "with it. `build --backend atb` passes W8A8 and W8A8SC on to MindIE 3.0 as they are."
)
ANOTHER_ARCHITECTURE = "Only TeleChat2, TeleChat2.5 and T1 are built here; use an engine that has this architecture."

TABLE = (
    Foreign("file", r"adapter_config\.json|adapter_model\.(safetensors|bin)", IS_ADAPTER, NOT_A_MODEL),
    Foreign("file", r".*\.(zip|7z|rar|tar|tgz|tar\.\w+)", "is an archive", "Unpack it, and name the folder it gives."),
    Foreign("file", r".*\.gguf", "is in llama.cpp's format GGUF", _ORIGINAL),
    Foreign("file", r"quant_model_description.*\.json|quant_model_weight.*", _W8A8, _ATB_TAKES_IT),
    Foreign("file", r"quantize_config\.json", _GPTQ, _ORIGINAL),
    Foreign("file", r"quant_config\.json", _AWQ, _ORIGINAL),
    Foreign(
        "file",
        r"(bf16_|fp16_)?zero_pp_rank_.*|global_step\d+|zero_to_fp32\.py|mp_rank_\d+_model_states\.pt",
        "holds the ranks of a DeepSpeed run",
        "Join them with `python zero_to_fp32.py . pytorch_model.bin`, which DeepSpeed puts beside them, and put the "
        "result beside config.json.",
    ),
    Foreign(
        "file",
        r"iter_\d+|latest_checkpointed_iteration\.txt|model_optim_rng\.pt|mp_rank_\d+(_\d+)*|.*\.distcp",
        "holds the ranks of a Megatron run",
        "Export it in the Hugging Face format with the converter of the Megatron that trained it.",
    ),
    Foreign(
        "file",
        r".*\.(pt|pth)",
        "is a torch file that is not named as a checkpoint's",
        "Name it pytorch_model.bin where it is one state dict; ranks of a run have to be joined first.",
    ),
    Foreign(
        "rank file",
        r"(.*_)?rank_\d+([-_].*)?\.(ckpt|safetensors)",
        "holds several ranks of a mindformers run side by side",
        "Name the run's strategy files with --strategy output/strategy; ranks of tensor parallelism alone may lie in "
        "folders rank_0, rank_1.",
    ),
    Foreign(
        "tensor", r".*(\.lora_[AB]\.|mindpet_delta_lora).*", "holds LoRA weights that were not merged", NOT_A_MODEL
    ),
    Foreign("tensor", r".*\.(qweight|qzeros|g_idx)", "is quantised by GPTQ or AWQ", _ORIGINAL),
    Foreign("tensor", r".*\.(SCB|weight_format|weight\.(nested_)?(absmax|quant_map|quant_state\..*))", _BNB, _ORIGINAL),
    Foreign("tensor", r".*\.(deq_scale|quant_bias|input_offset|weight_offset)", _W8A8, _ATB_TAKES_IT),
    Foreign("tensor", r".*\.(weight_scale(_inv)?|input_scale)", _FP8, _ORIGINAL),
    Foreign(
        "tensor",
        r"(model\.)?layers\.\d+\.self_attn\.(q|k|v|o|qkv|q_a|kv_a)_proj.*",
        "has the layers of another family (Llama, Qwen, DeepSeek, TeleChat3)",
        ANOTHER_ARCHITECTURE,
    ),
    Foreign(
        "tensor",
        r"transformer\.(wte|h\.\d+\.attn)\..*",
        "has the layers of GPT-2 or TeleChat-52B",
        ANOTHER_ARCHITECTURE,
    ),
    Foreign(
        "tensor",
        r"(.*\.)?(language_model|encoder|decoder|self_attention)\.(layers|embedding|encoder|output_layer|linear_\w+)\..*",
        "has the names of Megatron or of mindformers' mcore models",
        "Export it in the Hugging Face format with the converter of the framework that trained it.",
    ),
    Foreign("dtype", r"F8_.*", _FP8, _ORIGINAL),
    Foreign(
        "config",
        r"(model_type|architectures)=telechat3.*",
        "is TeleChat3, another architecture (36B: Llama with YaRN; 105B: latent attention)",
        ANOTHER_ARCHITECTURE,
    ),
    Foreign("config", r"use_mup=true|mup_.*", "is TeleChat-52B, a GPT-2 with muP", ANOTHER_ARCHITECTURE),
    # https://github.com/Tele-AI/Telechat models/7B and models/12B_8bit: no TeleChat2 has these vocabularies.
    Foreign(
        "config",
        r"vocab_size=(160256|120000) without base_seqlen",
        "is a TeleChat of the first generation (1B, 7B, 12B), with other tokens and another rotary extension",
        ANOTHER_ARCHITECTURE,
    ),
    Foreign("config", r"quantization_config\.quant_method=gptq.*", _GPTQ, _ORIGINAL),
    Foreign("config", r"quantization_config\.quant_method=(auto)?awq", _AWQ, _ORIGINAL),
    Foreign("config", r"quantization_config\.quant_method=.*fp8.*", _FP8, _ORIGINAL),
    Foreign("config", r"quantization_config\.(quant_method=bitsandbytes|load_in_[48]bit=true)", _BNB, _ORIGINAL),
    Foreign(
        "config", r"quantize=w\d+a\d+.*|quantization_config\.quant_method=(ascend|msmodelslim)", _W8A8, _ATB_TAKES_IT
    ),
    Foreign("config", r"quantization_config\..*", "is quantised", _ORIGINAL),
)
"""The first row that fits names what was given."""


def find_foreign(sign: str, seen: Iterable[str]) -> tuple[Foreign, str] | None:
    """The first row of that sign that fits one of what was seen, and that one."""
    listed = list(seen)
    for row in TABLE:
        if row.sign == sign:
            matches = re.compile(row.pattern).fullmatch
            if (found := next(filter(matches, listed), None)) is not None:
                return row, found
    return None


def refuse_foreign(
    sign: str, seen: Iterable[str], where: object, error: type[TelechatMindieError] = TelechatMindieError
) -> None:
    """Raises `error`, which names what was seen, where a row of that sign fits one of them."""
    if (match := find_foreign(sign, seen)) is not None:
        row, found = match
        raise error(row.what, where=where, found=found, advice=row.advice)
