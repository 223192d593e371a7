"""`gemcut.load` as a user calls it: demo checkpoints in both schemes, held against an independent dequantiser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import gemcut
from gemcut.checkpoint import open_checkpoint
from gemcut.errors import CheckpointError, MissingError, UsageError
from gemcut.export.nvfp4.convert import convert, plan_conversion
from gemcut.export.nvfp4.run import Settings, prepare, write_nvfp4
from gemcut.nvfp4.decode import dequantise
from gemcut.observe.run import observe
from gemcut.stream import whole
from gemcut.stream.corpus import load_corpus
from gemcut.stream.rendering import open_tokenizer
from observed import EVEN, statistics
from tiny import add_vision, make_tiny

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo"
KINDS = {"dense": ("mlp", "all"), "moe": ("mlp", "mlp+experts", "all")}
CASES = [(kind, targets) for kind, words in KINDS.items() for targets in words]


def export(model: Path, out: Path, settings: Settings, stats: Path | None = None) -> Path:
    write_nvfp4(prepare(open_checkpoint(model), settings, stats), out)
    return out


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        out |= load_file(path)
    return out


def dequantised(folder: Path, out: Path, dtype: torch.dtype) -> Path:
    """The folder as plain weights, by tables that share nothing with any loader; experts fused again."""
    stored, new = tensors_in(folder), {}
    apart: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
    for name, tensor in stored.items():
        module = name.removesuffix(".weight_packed")
        if module != name:
            scales, scale = stored[f"{module}.weight_scale"], float(stored[f"{module}.weight_global_scale"])
            weight = torch.from_numpy(dequantise(tensor.numpy(), scales.view(torch.uint8).numpy(), scale)).to(dtype)
            if found := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)", module):
                apart.setdefault(found[1], {})[int(found[2]), found[3]] = weight
            else:
                new[f"{module}.weight"] = weight
        elif not re.search(r"(weight|global|\.[kv])_scale$", name):
            new[name] = tensor.to(dtype)
    for path, one in apart.items():
        numbers = sorted({e for e, _ in one})
        new[f"{path}.gate_up_proj"] = torch.stack(
            [torch.cat([one[e, "gate_proj"], one[e, "up_proj"]]) for e in numbers]
        )
        new[f"{path}.down_proj"] = torch.stack([one[e, "down_proj"] for e in numbers])
    out.mkdir()
    save_file(new, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return out


def stock(folder: Path, dtype: torch.dtype) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def divergence(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KLD of logits [B, S, V] in nats."""
    a, b = one.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((a.exp() * (a - b)).sum(-1).mean())


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A quick look at the demo models: what activations are at most."""
    place = tmp_path_factory.mktemp("stats")
    for kind in KINDS:
        corpus = load_corpus(DEMO / "corpus" / "calibration.jsonl", DEMO / kind, max_tokens=4000)
        observe(open_checkpoint(DEMO / kind), corpus, place / kind)
    return {kind: place / kind for kind in KINDS}


@pytest.fixture(scope="module")
def texts() -> torch.Tensor:
    """Two texts that no statistics have seen, [2, 96]."""
    tokenizer = open_tokenizer(DEMO / "dense").inner
    lines = [json.loads(line) for line in (DEMO / "corpus" / "heldout.jsonl").read_text().splitlines()]
    rows = [tokenizer.encode(line["text"], add_special_tokens=False) for line in lines if "text" in line]
    return torch.tensor([[2, *row[:95]] for row in rows if len(row) >= 95][:2])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "targets"), CASES)
def test_weights_alone_are_what_the_tables_say(kind: str, targets: str, texts: torch.Tensor, tmp_path: Path) -> None:
    folder = export(DEMO / kind, tmp_path / "out", Settings("NVFP4A16", targets))  # type: ignore[arg-type]
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        model = gemcut.load(folder, dtype=name)
        assert model.dtype == dtype
        other = stock(dequantised(folder, tmp_path / name, dtype), dtype)
        model.set_experts_implementation("eager")  # what is still fused: in the same order of sums
        assert torch.equal(logits(model, texts), logits(other, texts))
        prompt = texts[:1, :24]
        told = [m.generate(input_ids=prompt, max_new_tokens=12, do_sample=False) for m in (model, other)]
        assert torch.equal(*told)
    base = logits(stock(DEMO / kind, torch.float32), texts)
    assert 0 < divergence(base, logits(gemcut.load(folder, dtype="float32"), texts)) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_activations_in_four_bits_are_near(
    kind: str, texts: torch.Tensor, stats: dict[str, Path], tmp_path: Path
) -> None:
    base = logits(stock(DEMO / kind, torch.float32), texts)
    found = {}
    for scheme, kv in (("NVFP4A16", "none"), ("NVFP4", "none"), ("NVFP4", "bound")):
        settings = Settings(scheme, "all", kv=kv, max_borrowed=0.9)  # type: ignore[arg-type]
        model = gemcut.load(export(DEMO / kind, tmp_path / scheme / kv, settings, stats[kind]), dtype="float32")
        found[scheme, kv] = logits(model, texts)
        text = model.generate(input_ids=texts[:1, :24], max_new_tokens=16, do_sample=False)[0, 24:]
        assert len(set(text.tolist())) > 4  # no loop, no pad tokens
    weights, four, cache = (divergence(base, one) for one in found.values())
    assert weights < four < 4 * weights
    assert not torch.equal(found["NVFP4", "none"], found["NVFP4", "bound"])  # keys and values are rounded, too
    assert cache < 1.5 * four


@pytest.mark.parametrize("kind", ["dense", "moe", "dense-text", "moe-text"])
@pytest.mark.parametrize("scheme", ["NVFP4A16", "NVFP4"])
def test_tiny_ones_of_every_kind(kind: str, scheme: str, tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base", kind)  # type: ignore[arg-type]
    stats = statistics(tmp_path / "s", open_checkpoint(base), EVEN)
    folder = export(base, tmp_path / "out", Settings(scheme, "all"), stats)  # type: ignore[arg-type]
    ids = torch.arange(10, 40)[None]
    model = gemcut.load(folder)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    found = logits(model, ids)
    same = torch.equal(
        found, logits(stock(dequantised(folder, tmp_path / "plain", torch.bfloat16), torch.bfloat16), ids)
    )
    assert same == (scheme == "NVFP4A16")
    assert torch.isfinite(found).all()


def test_plain_folders_and_shipped_ones(tmp_path: Path) -> None:
    ids = torch.arange(10, 40)[None]
    for kind in ("dense-text", "moe"):
        folder = make_tiny(tmp_path / kind, kind)  # type: ignore[arg-type]
        for dtype in (torch.bfloat16, torch.float32):
            model = gemcut.load(folder, dtype=str(dtype).removeprefix("torch."))
            model.set_experts_implementation("eager")
            assert torch.equal(logits(model, ids), logits(stock(folder, dtype), ids))
    assert gemcut.load("demo:dense").dtype == torch.bfloat16


def test_with_a_vision_tower_and_an_image(tmp_path: Path) -> None:
    base = add_vision(make_tiny(tmp_path / "base", "moe"))
    folder = export(base, tmp_path / "out", Settings("NVFP4A16", "all"))
    other = stock(dequantised(folder, tmp_path / "plain", torch.float32), torch.float32)
    model = gemcut.load(folder, dtype="float32")
    picture = torch.rand(1, 9, 48, generator=torch.Generator().manual_seed(0))
    places = torch.tensor([[[x, y] for y in range(3) for x in range(3)]])
    ids = torch.tensor([[2, 40, 310, 41, 42]])  # nine patches are one token
    with torch.no_grad():
        told = [
            m(
                input_ids=ids, pixel_values=picture, image_position_ids=places, mm_token_type_ids=(ids == 310).long()
            ).logits
            for m in (model, other)
        ]
    assert torch.equal(*told)
    assert not torch.equal(told[0], logits(model, ids))


def test_experts_that_stay_and_experts_that_went(tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base", "moe")
    settings = Settings("NVFP4A16", "all", ignore=(r"layers\.[13]\.experts\.",))
    folder = export(base, tmp_path / "out", settings)
    names = tensors_in(folder)
    assert "model.language_model.layers.1.experts.down_proj" in names
    assert "model.language_model.layers.2.experts.0.down_proj.weight_packed" in names
    ids = torch.arange(10, 40)[None]
    model = gemcut.load(folder, dtype="float32")
    model.set_experts_implementation("eager")
    other = stock(dequantised(folder, tmp_path / "plain", torch.float32), torch.float32)
    assert torch.equal(logits(model, ids), logits(other, ids))


def test_dense_folders_load_without_gemcut(tmp_path: Path) -> None:
    folder = export(make_tiny(tmp_path / "base", "dense"), tmp_path / "out", Settings("NVFP4A16", "all"))
    ids = torch.arange(10, 40)[None]
    assert torch.equal(logits(stock(folder, torch.bfloat16), ids), logits(gemcut.load(folder), ids))


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("moe")
    return export(make_tiny(place / "base", "moe", shards=1), place / "out", Settings("NVFP4A16", "all"))


def changed(folder: Path, out: Path, drop: str | None = None, copy: tuple[str, str] | None = None) -> Path:
    """Without the tensors whose names hold `drop`; those that hold `copy[0]` once more, with `copy[1]` there."""
    shutil.copytree(folder, out)
    state = load_file(out / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if drop is None or drop not in name}
    assert drop is None or len(kept) < len(state)
    if copy is not None:
        kept |= {name.replace(*copy): tensor.clone() for name, tensor in state.items() if copy[0] in name}
    (out / "model.safetensors").unlink()
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_what_would_stay_random_is_refused(quantised: Path, tmp_path: Path) -> None:
    for i, drop in enumerate(("layers.2.experts.3.up_proj.weight_scale", "layers.2.experts.", "layers.5.router.scale")):
        folder = changed(quantised, tmp_path / str(i), drop)
        with pytest.raises(CheckpointError, match="missing keys"):
            gemcut.load(folder)
    ninth = changed(quantised, tmp_path / "ninth", copy=("layers.2.experts.7.up_proj.", "layers.2.experts.8.up_proj."))
    with pytest.raises(CheckpointError, match="unexpected keys"):
        gemcut.load(ninth)


def test_a_refusal_leaves_transformers_as_it_was(quantised: Path, tmp_path: Path) -> None:
    from transformers.models.gemma4 import modeling_gemma4

    before = modeling_gemma4.Gemma4TextExperts
    shutil.copytree(quantised, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["text_config"]["hidden_activation"] = "no such function"
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="transformers cannot load"):
        gemcut.load(tmp_path / "m")
    assert modeling_gemma4.Gemma4TextExperts is before
    gemcut.load(quantised)
    assert modeling_gemma4.Gemma4TextExperts is before


def test_layouts_and_methods_that_do_not_load(quantised: Path, tmp_path: Path) -> None:
    meant = plan_conversion(open_checkpoint(quantised), "modelopt")
    convert(meant, tmp_path / "modelopt")
    with pytest.raises(UsageError, match="modelopt layout") as refused:
        gemcut.load(tmp_path / "modelopt")
    assert "--convert --layout compressed-tensors" in str(refused.value)
    back = plan_conversion(open_checkpoint(tmp_path / "modelopt"), "compressed-tensors")
    convert(back, tmp_path / "back")
    ids = torch.arange(10, 40)[None]
    assert torch.equal(logits(gemcut.load(tmp_path / "back"), ids), logits(gemcut.load(quantised), ids))
    shutil.copytree(quantised, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="does not load here"):
        gemcut.load(tmp_path / "other")


@pytest.mark.parametrize(
    ("words", "error", "what"),
    [
        ({"dtype": "int4"}, UsageError, "no such compute dtype"),
        ({"device": "cuda:99"}, MissingError, "torch cannot use this device"),
    ],
)
def test_words_that_mean_nothing(quantised: Path, words: dict[str, str], error: type, what: str) -> None:
    with pytest.raises(error, match=what):
        gemcut.load(quantised, **words)
    with pytest.raises(UsageError, match="no such model"):
        gemcut.load(quantised / "nothing-here")


def test_packages_that_are_absent_or_of_another_release(
    quantised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_tiny(tmp_path / "plain", "dense")
    for package, reached in (("transformers", (plain, quantised)), ("compressed-tensors", (quantised,))):
        with monkeypatch.context() as patch:
            patch.setitem(whole.RELEASES, package, ((99, 0), (99, 1)))
            for folder in reached:
                with pytest.raises(MissingError, match=f"this release of {package}") as refused:
                    gemcut.load(folder)
                assert "99.0" in str(refused.value)
    (said,) = (file for file in metadata.files("transformers") or () if file.name == "METADATA")
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / said.parent).symlink_to(Path(str(said.locate())).parent)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [str(tmp_path / "only")])
        gemcut.load(plain)
        with pytest.raises(MissingError, match="compressed-tensors is not installed") as refused:
            gemcut.load(quantised)
    assert "pip install 'gemcut[nvfp4]'" in str(refused.value)


def test_releases_are_those_of_the_package() -> None:
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = said["dependencies"] + said["optional-dependencies"]["nvfp4"]
    for package, ((a, b), (c, d)) in whole.RELEASES.items():
        assert f"{package}>={a}.{b},<{c}.{d}" in wanted


def test_importing_gemcut_brings_nothing_heavy() -> None:
    code = (
        "import sys, gemcut\nassert 'load' in gemcut.__all__\n"
        "heavy = {'torch', 'transformers', 'numpy', 'compressed_tensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\nassert callable(gemcut.load)\n"
        "assert not hasattr(gemcut, 'no_such_thing')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
