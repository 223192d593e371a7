from __future__ import annotations

from pathlib import Path

import pytest

from export.mix.goldens import layout
from gemcut.errors import UsageError
from gemcut.export.mix.overrides import decided, parse_overrides, read_overrides
from gemcut.export.mix.stock import stock_types
from gemcut.ggml.types import GgmlType


def test_first_match_wins_and_case_is_no_matter() -> None:
    model = layout("demo dense")
    overrides = parse_overrides([r"BLK\.3\.ATTN_K=Q8_0", "attn_k=q6_k"])
    types = stock_types("Q4_K_M", model, imatrix=False, overrides=overrides)
    assert types["blk.3.attn_k.weight"] is GgmlType.Q8_0
    assert types["blk.4.attn_k.weight"] is GgmlType.Q6_K
    plain = stock_types("Q4_K_M", model, imatrix=False)
    assert plain | decided(model, overrides) == types


def test_the_shape_still_has_its_say() -> None:
    model = layout("demo moe")
    types = stock_types("Q4_K_M", model, imatrix=False, overrides=parse_overrides(["ffn_down_exps=q2_k"]))
    assert types["blk.0.ffn_down_exps.weight"] is GgmlType.Q4_0  # rows of 64


@pytest.mark.parametrize(
    ("lines", "hint"),
    [
        (["attn_vv=q8_0"], "names look like"),
        (["attn_norm=q8_0"], "names look like"),
        (["attn_k=q8_0", r"blk\.0\.attn_k=q6_k"], "an earlier pattern"),
    ],
)
def test_a_pattern_that_binds_nothing_is_refused(lines: list[str], hint: str) -> None:
    model, overrides = layout("demo dense"), parse_overrides(lines)
    with pytest.raises(UsageError, match="binds nothing") as refused:
        stock_types("Q4_K_M", model, imatrix=False, overrides=overrides)
    assert hint in str(refused.value.hint)
    with pytest.raises(UsageError, match="binds nothing"):
        decided(model, overrides)


def test_a_variant_has_decided_its_ends() -> None:
    with pytest.raises(UsageError, match="binds nothing"):
        stock_types("Q4_K_L", layout("31B"), imatrix=False, overrides=parse_overrides(["token_embd=q6_k"]))


def test_overrides_of_a_file_type_that_quantises_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="binds nothing"):
        stock_types("BF16", layout("31B"), imatrix=False, overrides=parse_overrides(["attn_k=q6_k"]))


@pytest.mark.parametrize("name", ["IQ3_M", "iq3_xs", "IQ2_M", "Q4_K_M", "Q4_K_L"])
def test_file_types_are_no_tensor_types(name: str) -> None:
    with pytest.raises(UsageError, match="a mix of types for a whole file") as refused:
        parse_overrides([f"attn_k={name}"])
    assert f"-t {name.upper()}" in str(refused.value.hint)


@pytest.mark.parametrize("line", ["attn_k", "=q4_k", "attn_k=", "attn_k=q4_k_xx", "attn_(k=q4_k", "attn_k=i32"])
def test_lines_that_say_nothing_are_refused(line: str) -> None:
    with pytest.raises(UsageError, match=r"line 1|--tensor-type"):
        parse_overrides([line])


def test_a_file_may_have_comments(tmp_path: Path) -> None:
    path = tmp_path / "types.txt"
    path.write_text("# all keys\nattn_k=q6_k  ffn_down=q5_k # and these\n\n  # none\nattn_[qv]=q4_k\n")
    assert read_overrides(path) == ("attn_k=q6_k", "ffn_down=q5_k", "attn_[qv]=q4_k")
    found = [(one.pattern.pattern, one.kind) for one in parse_overrides(path.read_text().splitlines())]
    assert found == [("attn_k", GgmlType.Q6_K), ("ffn_down", GgmlType.Q5_K), ("attn_[qv]", GgmlType.Q4_K)]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_overrides(tmp_path / "none.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        read_overrides(tmp_path / "bytes.txt")
    (tmp_path / "bad.txt").write_text("attn_k=q6_k\nffn_down=IQ3_M\n")
    with pytest.raises(UsageError) as refused:
        read_overrides(tmp_path / "bad.txt")
    assert refused.value.where == "bad.txt, line 2"
