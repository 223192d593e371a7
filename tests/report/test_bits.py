from __future__ import annotations

import re

from gemcut.report.bits import Cell, bits


def cells(layers: int) -> list[Cell]:
    out = [Cell("token_embd", None, 6.5625, "Q6_K", 1000)]
    for i in range(layers):
        out.append(Cell("ffn_down", i, 4.5 + i % 3, "Q4_K" if i % 3 == 0 else "Q6_K", 400))
        out.append(Cell("attn_q", i, 3.4375, "IQ3_S", 100))
        if i % 2 == 0:
            out.append(Cell("attn_v", i, 8.5, "Q8_0", 50))
    return out


def test_a_small_model_has_every_type_by_name() -> None:
    drawing = bits(cells(12), "solved for 5 MiB")
    assert drawing is not None
    assert len(re.findall("IQ3_S", drawing.svg)) == 12
    assert "solved for 5 MiB" in drawing.svg
    assert "token_embd Q6_K (6.56)" in drawing.svg
    order = [drawing.svg.index(f">{role}<") for role in ("attn_q", "attn_v", "ffn_down")]
    assert order == sorted(order)


def test_a_large_model_has_colours_alone() -> None:
    drawing = bits(cells(60), "31B")
    assert drawing is not None
    assert "IQ3_S" not in drawing.svg
    assert drawing.svg.count("<image") >= 1


def test_the_same_cells_give_the_same_bytes() -> None:
    assert bits(cells(12), "a") == bits(cells(12), "a")


def test_what_may_not_stand_in_a_picture_is_made_plain() -> None:
    drawing = bits([Cell("<script>", 0, 4.5, "Q4_K", 10), Cell("attn_q", 1, 4.5, "$x$", 10)], "<b>&")
    assert drawing is not None
    assert "<script>" not in drawing.svg
    assert "<b>" not in drawing.svg


def test_no_layer_no_picture() -> None:
    assert bits([Cell("token_embd", None, 6.5, "Q6_K", 10)], "a") is None
