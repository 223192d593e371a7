"""From a finished heal to a cut checkpoint: mask and structural, verified byte by byte, and heals that do not fit."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.surgery.heal_demo import head_plan, make_corpus

from gemcut.checkpoint.gather import check_edits
from gemcut.checkpoint.read import Checkpoint, open_checkpoint
from gemcut.checkpoint.verify import verify
from gemcut.checkpoint.write import write_checkpoint
from gemcut.errors import CheckpointError, UsageError
from gemcut.records.heal import HEAL_FILE, load_heal
from gemcut.stream.model import StreamedModel
from gemcut.surgery import config_for, cut_for_gguf, edits_for
from gemcut.surgery.heal.edits import heal_edits
from gemcut.surgery.heal.settings import HealSettings
from gemcut.surgery.heal.stream import heal
from gemcut.types import Mask, Plan, Replace, Take
from tiny import make_tiny

SETTINGS = HealSettings(dtype="float32", batch_tokens=256)
# two of four query heads: one of each KV head of the sliding layers
DROP = dict.fromkeys(range(6), (1, 2))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(make_tiny(tmp_path_factory.mktemp("edits") / "dense", "dense"))


@pytest.fixture(scope="module")
def plan(base: Checkpoint) -> Plan:
    return head_plan(base, DROP)


@pytest.fixture(scope="module")
def healed(base: Checkpoint, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("healed") / "heal"
    heal(base, plan, make_corpus(), out, settings=SETTINGS)
    return out


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    with StreamedModel.open(checkpoint, dtype="float32") as model:
        hidden = model.embed(torch.from_numpy(make_corpus(3, seed=9).items[0].ids.copy())[None])
        for i in range(model.n_layers):
            with model.layer(i) as layer:
                hidden = model.run_layer(layer, hidden)
        return model.head(hidden)


def test_a_healed_mask_is_written_and_verified(base: Checkpoint, plan: Plan, healed: Path, tmp_path: Path) -> None:
    edits = heal_edits(healed, edits_for(plan, base))
    for one in load_heal(healed / HEAL_FILE).layers:
        assert isinstance(edits[one.tensor], Replace)
        assert edits[one.tensor].then is None
    report = write_checkpoint(base, edits, base.config, tmp_path / "out")
    out = open_checkpoint(tmp_path / "out")
    checked = verify(out, base, edits=edits, config=base.config)
    assert checked.layers_changed == tuple(range(6))
    facts = {fact.name: fact for fact in report.manifest.tensors}
    for one in load_heal(healed / HEAL_FILE).layers:
        assert facts[one.tensor].found == "values"
        assert facts[one.tensor].blake3_after == one.blake3
        assert out.read(one.tensor).tobytes() == base_bytes(healed / str(one.file), one.tensor)
    with pytest.raises(CheckpointError, match="not as planned"):
        verify(out, base, edits=edits_for(plan, base))


def base_bytes(path: Path, name: str) -> bytes:
    return load_file(path)[name].view(torch.uint8).numpy().tobytes()


def test_a_structural_cut_of_the_healed_weights_computes_the_same(
    base: Checkpoint, plan: Plan, healed: Path, tmp_path: Path
) -> None:
    masked = heal_edits(healed, edits_for(plan, base))
    write_checkpoint(base, masked, base.config, tmp_path / "masked")
    structural = dataclasses.replace(plan, params={"mode": "structural"})
    edits = heal_edits(healed, edits_for(structural, base))
    config = config_for(structural, base)
    write_checkpoint(base, edits, config, tmp_path / "small")
    small = open_checkpoint(tmp_path / "small")
    verify(small, base, edits=edits, config=config)
    for one in load_heal(healed / HEAL_FILE).layers:
        assert isinstance(edits[one.tensor].then, Take)
        assert small.ref(one.tensor).shape == (64, 2 * one.head_dim)
    assert small.text_config["num_attention_heads"] == 2
    whole = open_checkpoint(tmp_path / "masked")
    torch.testing.assert_close(logits(small), logits(whole), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(small), logits(base), atol=1e-2)


def test_layers_healed_whole_are_written_whatever_stays_of_the_plan(base: Checkpoint, tmp_path: Path) -> None:
    """Layers 1 and 4 lose heads, 2, 3 and 5 are refitted whole; then the plan is reduced to layer 1."""
    plan, settings = head_plan(base, {1: (1, 2), 4: (1, 2)}), dataclasses.replace(SETTINGS, heal_all=True)
    report = heal(base, plan, make_corpus(), tmp_path / "heal", settings=settings)
    used = set(report.used)
    assert {1, 4} < used <= {1, 2, 3, 4, 5}
    reduced = dataclasses.replace(plan, layers={1: plan.layers[1]})
    for some, changed in ((plan, used), (reduced, used - {4})):
        edits, out = edits_for(some, base, tmp_path / "heal"), tmp_path / f"out-{len(some.layers)}"
        write_checkpoint(base, edits, base.config, out)
        assert verify(open_checkpoint(out), base, edits=edits, config=base.config).layers_changed == tuple(
            sorted(changed)
        )


def test_a_plan_for_gguf_alone_is_healed_and_read_without_being_written(base: Checkpoint, tmp_path: Path) -> None:
    """Heads leave layers 1 and 4 only: no folder holds that, and the healed columns are the masked cut's."""
    some = {1: (1, 2), 4: (1, 2)}
    plan = head_plan(base, some)
    ragged = dataclasses.replace(plan, params={**plan.params, "mode": "structural", "gguf_only": True})
    heal(base, ragged, make_corpus(), tmp_path / "heal", settings=SETTINGS)
    with pytest.raises(UsageError, match="every layer"):
        edits_for(ragged, base, tmp_path / "heal")
    found = cut_for_gguf(base, ragged, tmp_path / "heal")
    used = [one.layer for one in load_heal(tmp_path / "heal" / HEAL_FILE).layers if one.used]
    assert used
    for layer in used:
        name = next(n for n in base.tensors if n.endswith(f"layers.{layer}.self_attn.o_proj.weight"))
        assert found.ref(name).shape[1] == base.ref(name).shape[1] // 2
        edit = found.edits[name]
        assert isinstance(edit, Replace)
        stored = load_file(edit.path)
        width = base.ref(name).shape[1] // 4
        healed_columns = torch.cat([stored[name][:, :width], stored[name][:, 3 * width :]], 1).contiguous()
        assert found.read(name).tobytes() == healed_columns.view(torch.uint8).numpy().tobytes()


def test_unused_layers_keep_the_cut_alone(base: Checkpoint, tmp_path: Path) -> None:
    plan = head_plan(base, {0: (1,)})
    heal(base, plan, make_corpus(), tmp_path / "heal", settings=dataclasses.replace(SETTINGS, ridges=(1e9,)))
    edits = edits_for(plan, base)
    assert heal_edits(tmp_path / "heal", edits) == edits


def test_a_heal_of_another_plan_is_refused(base: Checkpoint, plan: Plan, healed: Path) -> None:
    other = edits_for(head_plan(base, {**DROP, 4: (0, 2)}), base)
    with pytest.raises(CheckpointError, match="another plan") as caught:
        heal_edits(healed, other)
    assert "layer 4" in str(caught.value)
    fewer = edits_for(head_plan(base, {layer: gone for layer, gone in DROP.items() if layer != 2}), base)
    with pytest.raises(CheckpointError, match="another plan"):
        heal_edits(healed, fewer)


def test_changed_or_missing_tensors_are_refused(base: Checkpoint, plan: Plan, healed: Path, tmp_path: Path) -> None:
    edits = edits_for(plan, base)
    copy = Path(shutil.copytree(healed, tmp_path / "copy"))
    path = copy / "layer-003.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-7] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="not what was recorded") as caught:
        heal_edits(copy, edits)
    assert "layers.3" in str(caught.value)
    path.unlink()
    with pytest.raises(CheckpointError):
        heal_edits(copy, edits)
    with pytest.raises(UsageError, match="there is no heal"):
        heal_edits(tmp_path, edits)


def test_edits_fit_the_checkpoint(base: Checkpoint, plan: Plan, healed: Path) -> None:
    edits = heal_edits(healed, edits_for(plan, base))
    check_edits(base.tensors, edits)
    masks = [edit for edit in edits.values() if isinstance(edit, Mask)]
    assert {(mask.axis, len(mask.index)) for mask in masks} == {(0, 32), (0, 64)}  # q_proj rows, as the plan has them
    assert len(masks) == 6
