from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.score.synthetic_stats import make_statistics, write_statistics

from gemcut.errors import CheckpointError, UsageError
from gemcut.records.linears import load_linears
from gemcut.records.statistics import StatisticsIndex, load_statistics_index

Tensors = dict[str, np.ndarray]


def sums(module: str, seed: int = 0, units: int | None = None, columns: int = 5) -> Tensors:
    rng = np.random.default_rng(seed)
    shape = (2, columns) if units is None else (2, units, columns)
    out: Tensors = {
        "n": rng.integers(1, 9, shape[:-1]).astype(np.float64), "a2": rng.random(shape), "a4": rng.random(shape),
        "amax": rng.random(shape[1:], np.float32),
    }  # fmt: skip
    return {f"linear.{module}.{key}": value for key, value in out.items()}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., tuple[Path, StatisticsIndex]]:
    """A statistics folder whose first layer has exactly these tensors."""

    def make(tensors: Tensors, aliases: str = "{}") -> tuple[Path, StatisticsIndex]:
        folder = tmp_path / "s"
        write_statistics(make_statistics(np.random.default_rng(1)), folder)
        save_file(tensors, folder / "layer-000.safetensors", metadata={"aliases": aliases})
        return folder, load_statistics_index(folder)

    return make


def test_plain_and_grouped_linears(write: Callable[..., tuple[Path, StatisticsIndex]]) -> None:
    tensors = sums("mlp.up_proj") | sums("experts.down_proj", 1, units=3)
    folder, index = write(tensors, json.dumps({"mlp.gate_proj": "mlp.up_proj"}))
    found = load_linears(folder, index, 0)
    assert sorted(found) == ["experts.down_proj", "mlp.gate_proj", "mlp.up_proj"]
    assert found["mlp.gate_proj"] is found["mlp.up_proj"]
    up, down = found["mlp.up_proj"], found["experts.down_proj"]
    assert (up.grouped, up.a2.shape, up.n.shape, up.columns) == (False, (2, 1, 5), (2, 1), 5)
    assert (down.grouped, down.a2.shape, down.amax.shape) == (True, (2, 3, 5), (3, 5))
    np.testing.assert_array_equal(up.a4[:, 0], tensors["linear.mlp.up_proj.a4"])
    np.testing.assert_array_equal(down.a2, tensors["linear.experts.down_proj.a2"])


def spoil(key: str, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"linear.x.{key}"].flat[1] = value

    return change


def drop(tensors: Tensors) -> None:
    del tensors["linear.x.a4"]


def reshape(tensors: Tensors) -> None:
    tensors["linear.x.a4"] = tensors["linear.x.a4"][:, :-1].copy()


def retype(tensors: Tensors) -> None:
    tensors["linear.x.a2"] = tensors["linear.x.a2"].astype(np.float32)


@pytest.mark.parametrize(
    "change",
    [
        spoil("a2", np.nan), spoil("a4", np.inf), spoil("a2", -1), spoil("n", -1), spoil("n", 1.5), spoil("n", 0),
        spoil("amax", np.nan), drop, reshape, retype,
    ],
)  # fmt: skip
def test_impossible_sums_are_refused(
    write: Callable[..., tuple[Path, StatisticsIndex]], change: Callable[[Tensors], None]
) -> None:
    tensors = sums("x")
    change(tensors)
    with pytest.raises(CheckpointError):
        load_linears(*write(tensors), 0)


@pytest.mark.parametrize("aliases", ["[", "[]", '{"y": 1}', '{"y": "z"}', '{"x": "x"}', "[" * 100_000])
def test_damaged_aliases_are_refused(write: Callable[..., tuple[Path, StatisticsIndex]], aliases: str) -> None:
    with pytest.raises(CheckpointError):
        load_linears(*write(sums("x"), aliases), 0)


def test_hash_layer_and_absence(write: Callable[..., tuple[Path, StatisticsIndex]]) -> None:
    folder, index = write(sums("x"))
    with pytest.raises(UsageError, match="no such layer"):
        load_linears(folder, index, 99)
    with pytest.raises(CheckpointError, match="not what was recorded"):
        load_linears(folder, index, 0, check_hash=True)  # the fixture wrote another file over it
    with pytest.raises(UsageError, match="no sums of linear layers"):
        load_linears(folder, index, 1)
    (folder / "layer-000.safetensors").unlink()
    with pytest.raises(CheckpointError):
        load_linears(folder, index, 0)
