"""Which matrices are taken, what stays and why, and ignore lists that mean the same to every reader."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import pytest

from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.errors import CheckpointError, UsageError
from gemcut.export.nvfp4.choice import Choice, choose, exclude_wildcards
from gemcut.export.nvfp4.run import other_linears
from gemcut.export.nvfp4.served import check_served, ignored, served_name
from tiny import add_vision, make_tiny

PREFIX = "model.language_model.layers"


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(add_vision(make_tiny(tmp_path_factory.mktemp("tiny") / "moe")))


def check(model: Checkpoint, choice: Choice, ignore: tuple[str, ...] | None = None) -> None:
    modules = [matrix.module for group in choice.chosen for matrix in group.matrices]
    linears = model.family.linears()
    check_served(ignore or choice.ignore, choice.all, modules, other_linears(model, choice), linears)


@pytest.mark.parametrize(("targets", "modules"), [("mlp", 18), ("mlp+experts", 18 + 6 * 8 * 3), ("all", 18 + 144 + 23)])
def test_targets(moe: Checkpoint, targets: str, modules: int) -> None:
    choice = choose(moe, targets)  # type: ignore[arg-type]
    assert sum(len(group.matrices) for group in choice.chosen) == modules
    check(moe, choice)
    linears = moe.family.linears()
    wildcards = exclude_wildcards(moe, choice.all, choice.chosen, linears)
    check(moe, choice, tuple("re:" + fnmatch.translate(one) for one in wildcards))
    for one in choice.ignore:
        assert one == "lm_head" or re.compile(one.removeprefix("re:"))


def test_attention_is_ignored_also_where_v_is_missing_and_the_module_itself_is_not(moe: Checkpoint) -> None:
    ignore = choose(moe, "mlp").ignore
    full = "language_model.model.layers.5.self_attn"
    assert f"{PREFIX}.5.self_attn.v_proj.weight" not in moe.tensors
    assert all(ignored(f"{full}.{name}", ignore) for name in ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"))
    assert not ignored(full, ignore)
    assert ignored("language_model.model.layers.5.moe.experts.3.gate_proj", ignore)


def test_a_literal_list_fails_the_rule_of_fused_modules(moe: Checkpoint) -> None:
    choice = choose(moe, "mlp+experts")
    literal = [m.module for g in choice.all if g.part == "attention" for m in g.matrices]
    rest = [one for one in choice.ignore if "self_attn" not in one]
    with pytest.raises(CheckpointError, match="quantised in part") as error:
        check(moe, choice, (*rest, *literal))
    assert error.value.where == "language_model.model.layers.5.self_attn.qkv_proj"
    absent = f"{PREFIX}.5.self_attn.v_proj"
    check(moe, choice, (*rest, *literal, absent))


def test_lists_that_forget_or_take_too_much(moe: Checkpoint) -> None:
    choice = choose(moe, "mlp+experts")
    with pytest.raises(CheckpointError, match="nothing says so"):
        check(moe, choice, tuple(one for one in choice.ignore if "router" not in one))
    with pytest.raises(CheckpointError, match="quantised module is ignored"):
        check(moe, choice, (*choice.ignore, "re:.*mlp.*"))


def test_names_are_vllms(moe: Checkpoint) -> None:
    linears = moe.family.linears()
    assert served_name(f"{PREFIX}.3.experts.7.up_proj", linears) == (
        "language_model.model.layers.3.moe.experts.7.up_proj"
    )
    assert served_name("model.vision_tower.encoder", linears) == "vision_tower.encoder"
    assert served_name("model.layers.0.mlp.up_proj", linears) == "model.layers.0.mlp.up_proj"


def test_patterns_leave_whole_groups_and_say_so(moe: Checkpoint) -> None:
    choice = choose(moe, "mlp+experts", (r"layers\.[02]\.mlp\.(gate|up)_proj",))
    assert choice.left == dict.fromkeys(
        (f"{PREFIX}.{layer}.mlp.{name}" for layer in (0, 2) for name in ("gate_proj", "up_proj")),
        r"matches layers\.[02]\.mlp\.(gate|up)_proj",
    )
    assert r"re:.*\.layers\.(?:0|2)\.mlp\.(?:gate_proj|up_proj|gate_up_proj)$" in choice.ignore
    check(moe, choice)


def test_one_expert_that_stays_keeps_its_layer(moe: Checkpoint) -> None:
    choice = choose(moe, "mlp+experts", (r"layers\.4\.experts\.1\.",))
    assert len([name for name in choice.left if ".layers.4.experts." in name]) == 24
    assert choice.left[f"{PREFIX}.4.experts.0.up_proj"] == "other experts of the layer stay"
    check(moe, choice)


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        (r"gate_proj", "a part of what servers fuse"),
        (r"no_such", "matches nothing"),
        (r"self_attn", "matches nothing"),  # not targeted
        (r".", "nothing is left"),
        (r"(", "not a regular expression"),
    ],
)
def test_patterns_that_cannot_be_meant(moe: Checkpoint, pattern: str, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        choose(moe, "mlp", (pattern,))


def test_widths_that_blocks_do_not_divide(tmp_path: Path) -> None:
    model = open_checkpoint(make_tiny(tmp_path / "odd", "moe", moe_intermediate_size=24))
    choice = choose(model, "mlp+experts")
    assert {name.rpartition(".")[2] for name in choice.left} == {"gate_proj", "up_proj", "down_proj"}
    assert choice.left[f"{PREFIX}.0.experts.0.down_proj"] == "a width of 24 is not a multiple of 16"
    assert all(group.part == "mlp" for group in choice.chosen)
    check(model, choice)
    with pytest.raises(UsageError, match="a width of 24"):
        choose(model, "mlp+experts", narrow="refuse")


def test_a_model_without_experts(tmp_path: Path) -> None:
    model = open_checkpoint(make_tiny(tmp_path / "text", "dense-text"))
    choice = choose(model, "mlp+experts")
    assert {group.part for group in choice.chosen} == {"mlp"}
    check(model, choice)
