"""The table of types against the library that stores them, and the sizes that follow."""

from __future__ import annotations

import pytest

from gemcut.errors import UsageError
from gemcut.ggml.types import BLOCKS, GgmlType, fits, parse_type, tensor_bytes


def test_every_type_has_a_block() -> None:
    assert set(BLOCKS) == set(GgmlType)


def test_sizes_agree_with_the_format_s_own_package() -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    known = {GgmlType[one.name] for one in GGMLQuantizationType if one.name in GgmlType.__members__}
    assert len(known) >= 30
    for one in known:
        assert GGML_QUANT_SIZES[GGMLQuantizationType(one.value)] == tuple(BLOCKS[one])


def test_bytes_of_a_tensor() -> None:
    assert tensor_bytes(GgmlType.Q4_K, (3, 5, 512)) == 3 * 5 * 2 * 144
    assert not fits(GgmlType.Q4_K, 704)
    with pytest.raises(UsageError, match="704 columns"):
        tensor_bytes(GgmlType.Q4_K, (8, 704))


def test_names_in_any_case() -> None:
    assert parse_type(" iq4_xs") is GgmlType.IQ4_XS
    with pytest.raises(UsageError, match="Q4_K_M"):
        parse_type("Q4_K_M")
