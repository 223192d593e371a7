"""Rows that are measured on: the same numbers as sums of them, apart by class, and nothing left on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gemcut.errors import CheckpointError
from gemcut.records.heal import ClassResidual
from gemcut.surgery.heal.solve import CHUNK_ROWS, Moments
from gemcut.surgery.heal.unseen import ClassSums, Residuals, Rows, by_class

H, K = 6, 10
CLASSES = ("code", "math", "story")


def batches(dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, ...]]:
    """x, root, target, class of three batches; the second is longer than a chunk and has no row of class 2."""
    g = torch.Generator().manual_seed(0)
    out = []
    for rows, classes in ((7, 3), (CHUNK_ROWS + 5, 2), (1, 3)):
        x = torch.randn(rows, K, generator=g).to(dtype)
        target = torch.randn(rows, H, generator=g).double()
        of = torch.randint(0, classes, (rows,), generator=g)
        out.append((x, torch.rand(rows, generator=g).double() + 0.5, target, of))
    return out


def filled(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Rows, Moments, dict[str, Moments]]:
    rows = Rows(folder, H, K, dtype, CLASSES)
    whole, apart = Moments.zeros(H, K), {name: Moments.zeros(H, K) for name in CLASSES}
    for x, root, target, of in batches(dtype):
        rows.add(x, root, target, of)
        whole.add(x, root, target)
        for i, name in enumerate(CLASSES):
            apart[name].add(x[of == i], root[of == i], target[of == i])
    return rows, whole, apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_measure_what_their_sums_measure(tmp_path: Path, dtype: torch.dtype) -> None:
    rows, whole, apart = filled(tmp_path, dtype)
    weight = torch.randn(H, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = rows.measure(weight)
    assert found.whole == pytest.approx(whole.residual(weight), rel=1e-6)
    assert found.by_class == {name: pytest.approx(one.residual(weight), rel=1e-6) for name, one in apart.items()}
    assert rows.samples == {name: one.n for name, one in apart.items()}
    sums = ClassSums.of(apart)
    assert sums.measure(weight).whole == pytest.approx(found.whole, rel=1e-6)
    assert sums.measure(weight).by_class == {name: one.residual(weight) for name, one in apart.items()}
    assert sums.samples == rows.samples
    again = Moments.zeros(H, K)
    rows.into(again)
    assert again.n == whole.n
    torch.testing.assert_close(again.g, whole.g, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(again.c, whole.c, rtol=1e-6, atol=1e-6)  # targets lie on disk as float32
    rows.close()


def test_a_perfect_fit_reads_zero_where_sums_only_round(tmp_path: Path) -> None:
    rows = Rows(tmp_path, H, K, torch.float32, CLASSES[:1])
    x, weight = torch.randn(50, K), torch.eye(H, K, dtype=torch.float64)
    rows.add(x, torch.ones(50).double(), x[:, :H].double(), torch.zeros(50, dtype=torch.int64))
    assert rows.measure(weight).whole == 0
    assert rows.measure(torch.zeros(H, K)).whole == pytest.approx(1.0)


def test_no_file_has_a_name(tmp_path: Path) -> None:
    rows, _, _ = filled(tmp_path)
    assert not list(tmp_path.iterdir())
    rows.close()


def test_a_class_without_a_token_is_not_there(tmp_path: Path) -> None:
    rows = Rows(tmp_path, H, K, torch.float32, CLASSES)
    x = torch.ones(2, K)
    rows.add(x, torch.ones(2).double(), torch.ones(2, H).double(), torch.tensor([2, 2]))
    found = rows.measure(torch.zeros(H, K))
    assert list(found.by_class) == ["story"]
    assert by_class(found, Residuals(0.5, {"story": 0.5}), rows.samples) == {"story": ClassResidual(1.0, 0.5, 2)}


def test_a_number_that_is_none_is_seen(tmp_path: Path) -> None:
    rows = Rows(tmp_path, H, K, torch.float32, CLASSES)
    x, target = torch.ones(1, K), torch.ones(1, H).double()
    rows.add(x, torch.ones(1).double(), target, torch.tensor([0]))
    assert rows.finite()
    target[0, 3] = 1e39  # no float32
    rows.add(x, torch.ones(1).double(), target, torch.tensor([0]))
    assert not rows.finite()


def test_rows_that_ended_early_are_an_error(tmp_path: Path) -> None:
    rows, _, _ = filled(tmp_path)
    rows._file.truncate(1000)
    with pytest.raises(CheckpointError, match="ended early"):
        rows.measure(torch.zeros(H, K))
