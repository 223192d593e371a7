from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemcut.errors import UsageError
from gemcut.families.base import Attention
from gemcut.families.heads import kept_kv_heads, kv_heads_after
from gemcut.plan import legal_head_counts, plan_heads
from gemcut.records import load_plan, save_plan
from gemcut.types import Scores


def attention(heads: int, kv_heads: int, *, full: bool = False, shares_kv: bool = False) -> Attention:
    return Attention(heads, kv_heads, 16, full, "q", "k", "v", "o", shares_kv)


def scores_of(values: object, *, layers: tuple[int, ...] | None = None, **more: object) -> Scores:
    array = np.asarray(values, np.float64)
    given = {"kind": "heads", "protected": None, **more}
    return Scores(
        criterion="loo",
        params={"tokens": 100},
        layers=layers or tuple(range(len(array))),
        values=array,
        model_fingerprint="m",
        statistics_fingerprint="s",
        corpus_hash="c",
        **given,
    )


def shapes_31b(layers: int = 6) -> dict[int, Attention]:
    return {i: attention(32, 4, full=True) if i % 6 == 5 else attention(32, 16) for i in range(layers)}


def random_scores(layers: int, heads: int, seed: int = 0) -> Scores:
    return scores_of(np.random.default_rng(seed).standard_normal((layers, heads)))


# ---------------------------------------------------------------- mask


def test_the_lowest_goes_and_every_drop_says_why() -> None:
    planned = plan_heads(scores_of([[5, 1, 2, 3]]), {0: attention(4, 2)}, drop=1)
    one = planned.plan.layers[0]
    assert one.keep == (0, 2, 3)
    assert one.drop == {1: "loo 1, rank 4 of 4, KV head 0 loses 1 of 2"}
    assert (planned.plan.kind, planned.plan.units, planned.dropped) == ("heads", 4, 1)
    assert planned.plan.params == {
        "mode": "mask", "drop": 1, "dropped": 1, "kept": 3, "score": {"tokens": 100}, "notes": [],
    }  # fmt: skip
    assert (planned.plan.criterion, planned.plan.corpus_hash, planned.plan.model_fingerprint) == ("loo", "c", "m")


def test_no_kv_head_pays_for_the_others() -> None:
    planned = plan_heads(scores_of([[0, 1, 8, 9]]), {0: attention(4, 2)}, drop=2)
    assert planned.plan.layers[0].drop == {
        0: "loo 0, rank 4 of 4, KV head 0 loses 1 of 2",
        2: "loo 8, rank 2 of 4, KV head 1 loses 1 of 2, 1 with lower scores stay (no KV head loses more than 1)",
    }


def test_equal_scores_drop_the_higher_index_first() -> None:
    assert plan_heads(scores_of([[1.0] * 4]), {0: attention(4, 1)}, drop=2).plan.layers[0].keep == (0, 1)


@given(kv=st.integers(1, 4), group=st.integers(1, 4), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_masks_are_spread_and_the_cheapest_of_those(kv: int, group: int, seed: int, data: st.DataObject) -> None:
    heads = kv * group
    count = data.draw(st.integers(0, heads - 1))
    scores = random_scores(2, heads, seed)
    planned = plan_heads(scores, dict.fromkeys(range(2), attention(heads, kv)), drop=count)
    most = -(-count // kv)
    for row, one in planned.plan.layers.items():
        assert len(one.drop) == count
        assert sorted((*one.keep, *one.drop)) == list(range(heads))
        lost = Counter(unit // group for unit in one.drop)
        assert all(n <= most for n in lost.values())
        values = scores.values[row]
        for gone in one.drop:  # no exchange makes it cheaper
            for kept in one.keep:
                if values[kept] < values[gone]:
                    assert kept // group != gone // group
                    assert lost[kept // group] == most


def test_some_layers_only() -> None:
    shapes = dict.fromkeys(range(4), attention(4, 2))
    planned = plan_heads(random_scores(4, 4), shapes, drop=0.25, layers=(2, 0, 2))
    assert sorted(planned.plan.layers) == [0, 2]
    all_layers = plan_heads(random_scores(4, 4), shapes, drop=0.25)
    assert planned.plan.layers[2] == all_layers.plan.layers[2]


@pytest.mark.parametrize(
    ("drop", "heads", "count", "notes"),
    [
        (0, 8, 0, ()),
        (0.0, 8, 0, ()),
        (0.125, 8, 1, ()),
        (0.125, 32, 4, ()),
        (3, 8, 3, ()),
        (3.0, 8, 3, ()),
        (0.7, 10, 7, ()),  # 0.7 * 10 is not 7 in floating point
        (0.1, 8, 1, ("0.1 of 8 heads is 0.8: 1 dropped per layer",)),
        (0.125, 4, 1, ("0.125 of 4 heads is 0.5: 1 dropped per layer",)),
        (0.2, 32, 6, ("0.2 of 32 heads is 6.4: 6 dropped per layer",)),
    ],
)
def test_shares_and_counts(drop: float, heads: int, count: int, notes: tuple[str, ...]) -> None:
    planned = plan_heads(random_scores(1, heads), {0: attention(heads, 2)}, drop=drop)
    assert planned.dropped == len(planned.plan.layers[0].drop) == count
    assert planned.notes == notes
    assert planned.plan.params["notes"] == list(notes)


@pytest.mark.parametrize(
    ("drop", "match"),
    [
        (0.05, "less than half a head"),
        (0.95, "no head would stay"),
        (8, "no head would stay"),
        (99, "no head would stay"),
        (-1, "not a number of heads"),
        (1.5, "not a number of heads"),
        (float("nan"), "not a number of heads"),
        (float("inf"), "not a number of heads"),
        (True, "not a number of heads"),
    ],
)
def test_shares_and_counts_that_mean_nothing(drop: float, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        plan_heads(random_scores(1, 8), {0: attention(8, 2)}, drop=drop)


def test_scores_and_layers_that_do_not_fit() -> None:
    shapes = dict.fromkeys(range(2), attention(8, 2))
    with pytest.raises(UsageError, match="another number of heads"):
        plan_heads(random_scores(2, 4), shapes, drop=1)
    with pytest.raises(UsageError, match="the model does not have"):
        plan_heads(random_scores(3, 8), shapes, drop=1)
    with pytest.raises(UsageError, match="the scores say nothing about") as caught:
        plan_heads(scores_of(np.ones((1, 8)), layers=(1,)), shapes, drop=1, layers=(0, 1))
    assert "layer 0" in str(caught.value)
    with pytest.raises(UsageError, match="no layer to cut"):
        plan_heads(random_scores(2, 8), shapes, drop=1, layers=())
    with pytest.raises(UsageError, match="not about heads"):
        plan_heads(scores_of(np.ones((2, 8)), kind="experts"), shapes, drop=1)
    with pytest.raises(UsageError, match="no such way"):
        plan_heads(random_scores(2, 8), shapes, drop=1, mode="free")  # type: ignore[arg-type]


def test_scores_of_a_joint_search_answer_one_question_only() -> None:
    shapes = dict.fromkeys(range(2), attention(8, 2))
    searched = replace(random_scores(2, 8), criterion="obs", params={"drop": 2, "mode": "mask"})
    assert plan_heads(searched, shapes, drop=0.25).dropped == 2
    with pytest.raises(UsageError, match="another cut") as caught:
        plan_heads(searched, shapes, drop=1)
    assert (caught.value.where, caught.value.got, caught.value.wanted) == ("obs, drop", 2, 1)
    with pytest.raises(UsageError, match="another cut"):
        plan_heads(searched, shapes, drop=2, mode="structural")


def test_protected_heads_go_last() -> None:
    protected = np.array([[True, True, False, False], [True, False, True, True]])
    scores = scores_of([[0, 1, 2, 3], [0, 1, 2, 3]], protected=protected)
    planned = plan_heads(scores, dict.fromkeys(range(2), attention(4, 1)), drop=2)
    assert sorted(planned.plan.layers[0].drop) == [2, 3]
    assert "2 with lower scores stay (no KV head loses more than 2, or protected)" in planned.plan.layers[0].drop[2]
    assert sorted(planned.plan.layers[1].drop) == [0, 1]
    assert planned.notes == ("layer 1: 1 protected heads released, lowest scores first",)


# ---------------------------------------------------------------- structural


def test_31b_at_24_heads() -> None:
    scores, shapes = random_scores(6, 32), shapes_31b()
    planned = plan_heads(scores, shapes, drop=0.25, mode="structural")
    assert planned.kv_heads == {**dict.fromkeys(range(5), (16, 12)), 5: (4, 4)}
    for layer, one in planned.plan.layers.items():
        assert len(one.keep) == 24
        lost = Counter(unit // shapes[layer].group for unit in one.drop)
        assert list(lost.values()) == [2] * 4  # 4 whole KV heads of 2, or 2 query heads of each of 4
        kv = kept_kv_heads(shapes[layer].group, one.keep, where="")
        assert len(kv) == planned.kv_heads[layer][1]
    sums = scores.values[0].reshape(16, 2).sum(axis=1)
    assert {unit // 2 for unit in planned.plan.layers[0].drop} == set(np.argsort(sums)[:4])
    worst = [8 * j + int(k) for j in range(4) for k in np.argsort(scores.values[5][8 * j : 8 * j + 8])[:2]]
    assert set(planned.plan.layers[5].drop) == set(worst)
    assert planned.plan.params["kv_heads"] == {"sliding": [16, 12], "full": [4, 4]}
    assert planned.notes == ("sliding layers keep 12 of 16 KV heads: a drafter trained for 16 no longer fits",)
    assert planned.plan.params["notes"] == list(planned.notes)


def test_a_plan_for_gguf_alone_leaves_layers_whole() -> None:
    scores, shapes = random_scores(6, 32), shapes_31b()
    planned = plan_heads(scores, shapes, drop=0.25, layers=(0, 5), mode="structural", gguf_only=True)
    assert sorted(planned.plan.layers) == [0, 5]
    assert planned.kv_heads == {0: (16, 12), 5: (4, 4)}
    assert planned.plan.params["gguf_only"] is True
    assert planned.notes == (), "layer 4 is the last sliding one, and a drafter reads its keys"
    last = plan_heads(scores, shapes, drop=0.25, layers=(4,), mode="structural", gguf_only=True)
    assert last.notes == ("sliding layers keep 12 of 16 KV heads: a drafter trained for 16 no longer fits",)
    mixed = {0: attention(8, 4), 1: attention(8, 2)}  # 6 heads: 3 of 4 KV heads here, 2 of 2 there
    ragged = plan_heads(random_scores(2, 8), mixed, drop=2, mode="structural", gguf_only=True)
    assert ragged.kv_heads == {0: (4, 3), 1: (2, 2)}
    with pytest.raises(UsageError, match="different numbers of KV heads"):
        plan_heads(random_scores(2, 8), mixed, drop=2, mode="structural")
    with pytest.raises(UsageError, match="for GGUF alone"):
        plan_heads(scores, shapes, drop=0.25, gguf_only=True)
    with pytest.raises(UsageError, match="every layer that is cut"):
        plan_heads(random_scores(2, 8), mixed, drop=3, layers=(0,), mode="structural", gguf_only=True)


def test_whole_kv_heads_say_why() -> None:
    planned = plan_heads(scores_of([[1, 2, 0, 9, 5, 5]]), {0: attention(6, 3)}, drop=2, mode="structural")
    assert planned.plan.layers[0].keep == (2, 3, 4, 5)
    assert planned.plan.layers[0].drop == {
        0: "KV head 0 leaves with its 2 query heads: sum 3, rank 3 of 3; loo 1, rank 5 of 6",
        1: "KV head 0 leaves with its 2 query heads: sum 3, rank 3 of 3; loo 2, rank 4 of 6",
    }


def test_whole_kv_heads_with_protected_query_heads_go_last() -> None:
    protected = np.zeros((1, 6), np.bool_)
    protected[0, 1] = True
    scores = scores_of([[1, 2, 0, 9, 5, 5]], protected=protected)
    planned = plan_heads(scores, {0: attention(6, 3)}, drop=2, mode="structural")
    assert sorted(planned.plan.layers[0].drop) == [2, 3]


@pytest.mark.parametrize(
    ("drop", "wanted", "hint"),
    [(0.1, "28 or 32", "--drop 4 or --drop 0"), (5, "24 or 28", "--drop 8 or --drop 4"), (30, "4 kept", "--drop 28")],
)
def test_illegal_counts_name_the_nearest_legal_ones(drop: float, wanted: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan_heads(random_scores(6, 32), shapes_31b(), drop=drop, mode="structural")
    assert wanted in str(caught.value)
    assert hint in str(caught.value)
    assert "query heads on" in str(caught.value)


@pytest.mark.parametrize(("kv", "group", "full_kv"), [(4, 2, 2), (4, 1, 1), (1, 4, 2), (3, 2, 1), (6, 4, 2)])
def test_every_legal_count_keeps_every_head_on_its_kv_head(kv: int, group: int, full_kv: int) -> None:
    heads = kv * group
    shapes = {0: attention(heads, kv), 1: attention(heads, full_kv, full=True)}
    scores = random_scores(2, heads)
    for kept in range(1, heads + 1):
        if kept not in legal_head_counts(shapes):
            with pytest.raises(UsageError):
                plan_heads(scores, shapes, drop=heads - kept, mode="structural")
            continue
        planned = plan_heads(scores, shapes, drop=heads - kept, mode="structural")
        for layer, one in planned.plan.layers.items():
            stay = kept_kv_heads(shapes[layer].group, one.keep, where="")
            assert len(stay) == kv_heads_after(shapes[layer], kept) == planned.kv_heads[layer][1]
            assert len(one.keep) == kept
        assert bool(planned.notes) == any(a != b for a, b in planned.kv_heads.values())


def test_one_kv_head_is_never_removed() -> None:
    planned = plan_heads(random_scores(1, 4), {0: attention(4, 1)}, drop=3, mode="structural")
    assert planned.kv_heads == {0: (1, 1)}
    assert planned.notes == ()


def test_structural_takes_every_layer() -> None:
    shapes = shapes_31b()
    with pytest.raises(UsageError, match="takes every layer") as caught:
        plan_heads(random_scores(6, 32), shapes, drop=4, layers=(0, 1, 3), mode="structural")
    assert "layer 2 too" in str(caught.value)
    with pytest.raises(UsageError, match="takes every layer"):
        plan_heads(random_scores(4, 32), shapes, drop=4, mode="structural")


def test_shared_keys_and_values_are_only_masked() -> None:
    shapes = {0: attention(8, 2), 1: attention(8, 2, shares_kv=True)}
    with pytest.raises(UsageError, match="read the keys and values of another") as caught:
        plan_heads(random_scores(2, 8), shapes, drop=2, mode="structural")
    assert "layer 1" in str(caught.value)
    assert sorted(plan_heads(random_scores(2, 8), shapes, drop=2).plan.layers) == [0, 1]


def test_layers_of_one_type_end_with_one_number_of_kv_heads() -> None:
    shapes = {0: attention(8, 4), 1: attention(8, 2)}
    with pytest.raises(UsageError, match="different numbers of KV heads"):
        plan_heads(random_scores(2, 8), shapes, drop=2, mode="structural")


@pytest.mark.parametrize("mode", ["mask", "structural"])
def test_a_plan_survives_the_disk(tmp_path: Path, mode: str) -> None:
    plan = plan_heads(random_scores(6, 32), shapes_31b(), drop=0.25, mode=mode).plan  # type: ignore[arg-type]
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
