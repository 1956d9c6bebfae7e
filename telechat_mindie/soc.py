"""Which chips the Ascend path is not made for, by the names that MindSpore and CANN give them, and where CANN is.

Atlas 300I Duo, 300I Pro and 200I (310 family) and the first Atlas 300T/800 training cards (910 before the A2 series)
want their key/value cache in the NZ layout, [blocks, ceil(kv heads * head_dim / 16), block_size, 16], and know no
bfloat16 (MindIE-LLM v3.0.0.beta.2 mindie_llm/text_generator/utils/kvcache_settings.py; mindformers r1.6.0
version_control.py, need_nz). Atlas 800I A2 (Ascend910B1 to B4) and A3 (Ascend910_93..) are what it is made for.
"""

from __future__ import annotations

import re

CANN_HOME_VARIABLE = "ASCEND_HOME_PATH"
"""CANN's home, under which the kernel library looks for the chip's description; it fails without one."""

SOURCE_CANN = "source /usr/local/Ascend/ascend-toolkit/set_env.sh"

ADVICE = "Use Atlas 800I A2 or A3 cards (Ascend910B1 to B4, Ascend910_93)."

_FAMILIES = {"310": "Atlas 300I and 200I", "910": "the first Atlas 300T and 800 training cards"}

_REFUSED = re.compile(r"(?:ascend)?(?:(310)\w*|(910)(?:a|b|premiuma|proa|prob)?)", re.IGNORECASE)
"""What CANN and npu-smi call them: Ascend310P3, Ascend910A, Ascend910PremiumA, 910ProB. A bare 910B is the first
generation's as well: those of the A2 series have a digit after it."""

_MINDSPORE_A2 = ("ascend910b", "910b")
"""What MindSpore calls the A2 series, whatever its digit; it has lower case names of its own ("ascend310p",
"ascend910", "ascend910b", "ascend910_93"), shorter ones before 2.3."""


def refused_family(chip: str) -> str | None:
    """The family of cards with this chip, where the Ascend path cannot run on it, else None.

    Args:
        chip: as CANN names it, and npu-smi mostly: "Ascend910B4", "310P3". npu-smi's bare "Ascend910" is a 910C too.
    """
    found = _REFUSED.fullmatch(chip.strip())
    return _FAMILIES[found[1] or found[2]] if found else None


def refused_by_mindspore(version: str) -> str | None:
    """`refused_family` of what MindSpore's context calls an Ascend SoC version."""
    return None if version in _MINDSPORE_A2 else refused_family(version)
