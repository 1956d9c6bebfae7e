"""The chips that are refused, by each of their names."""

from __future__ import annotations

import pytest

from telechat_mindie.soc import refused_by_mindspore, refused_family


@pytest.mark.parametrize(
    "chip", ["Ascend310P3", "310P3", "Ascend310B4", "Ascend310", "Ascend910A", "910ProB", "Ascend910PremiumA", "910B"]
)
def test_chips_whose_cache_is_nz(chip: str) -> None:
    assert refused_family(chip)


@pytest.mark.parametrize(
    "chip", ["Ascend910B1", "910B4", "910B4-1", "Ascend910B2C", "Ascend910_9391", "Ascend910_93", ""]
)
def test_chips_that_it_is_made_for(chip: str) -> None:
    assert refused_family(chip) is None


def test_mindspores_own_names() -> None:
    refused = ["ascend310", "ascend310p", "ascend310b", "ascend910", "310p", "910a"]
    assert all(refused_by_mindspore(version) for version in refused)
    assert not any(refused_by_mindspore(version) for version in ["ascend910b", "ascend910_93", "910b", ""])
