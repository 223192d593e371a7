"""Compare what gemcut says a GGUF file holds with what llama.cpp's converter writes, key by key and tensor by tensor.

    python bench/compare_converter.py LLAMA_CPP_SOURCE [FOLDER …] [--json]
    python bench/compare_converter.py LLAMA_CPP_SOURCE demo/dense demo/moe demo/moe-drafter --golden tests/golden

Without folders: the demo checkpoints, a tiny random checkpoint of every kind, a drafter, a vision tower, and trunks
whose config has other forms. The converter runs with `--outtype bf16`, so nothing is rounded. Compared are the keys and
their order, value types and values; tensor names and their order, shapes, types and every value. --golden writes what
the converter's files hold as JSON, for tests that run without it. It needs the packages that the converter needs:
torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from gemcut.checkpoint import open_checkpoint
from gemcut.checkpoint.read import Checkpoint
from gemcut.checkpoint.values import decode
from gemcut.export.layout import layout_of, vision_layout_of
from gemcut.export.metadata import file_metadata
from gemcut.families import DRAFTERS
from gemcut.families.gguf import GgufLayout, GgufTensor, Value

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
from gguf_facts import as_stored, golden_keys, golden_tensor, values_of  # noqa: E402
from rows import row, show  # noqa: E402

BF16_FILE = 32  # general.file_type of --outtype bf16
CARD = """---
license: [apache-2.0, mit]
license_link: https://example.org
base_model:
- google/gemma-4-26B-A4B-it
- https://huggingface.co/google/gemma-4-E2B
language: en
tags: [a, b]
pipeline_tag: text-generation
datasets: wiki/text-2
model_creator: Somebody
---
"""
# Keys that gemcut writes and the converter does not, with the reason.
OURS = {
    "clip.vision.projector.scale_factor": "the converter loses a pooling other than 3 x 3",
    "clip.use_gelu": "the converter leaves llama.cpp at another GELU than the model's",
}


def convert(source: Path, folder: Path, out: Path, *flags: str) -> None:
    """Run the reference converter; its last lines become the error."""
    command = [
        sys.executable,
        str(source / "convert_hf_to_gguf.py"),
        str(folder),
        "--outtype",
        "bf16",
        "--outfile",
        str(out),
    ]
    env = {**os.environ, "PYTHONPATH": str(source / "gguf-py"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *flags], capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise SystemExit(f"the converter failed on {folder.name}:\n{done.stderr[-2000:]}")


def stored(field: gguf.ReaderField) -> Value:
    """A key of a file as gemcut says it."""
    kinds = {"BOOL": "bool", "STRING": "str"}
    name = field.types[-1].name
    kind = kinds.get(name, name.lower().replace("uint", "u").replace("int", "i").replace("float", "f"))
    value: Any = field.contents()
    return Value(kind, tuple(value) if isinstance(value, list) else value)  # type: ignore[arg-type]


def differences(checkpoint: Checkpoint, layout: GgufLayout, file: Path) -> Iterator[str]:
    """Every way in which the converter's file is not what gemcut says."""
    reader = gguf.GGUFReader(file)
    theirs = {key: stored(field) for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    name = checkpoint.name
    ours = file_metadata(checkpoint.path, checkpoint.config, layout, name=name, file_type=BF16_FILE)
    ours = {key: as_stored(value) for key, value in ours.items() if key not in OURS}
    if list(ours) != list(theirs):
        for who, extra in (("gemcut", ours.keys() - theirs.keys()), ("the converter", theirs.keys() - ours.keys())):
            yield f"keys that only {who} writes: {sorted(extra)}"
        if set(ours) == set(theirs):
            yield f"order of keys: {list(ours)} instead of {list(theirs)}"
    for key in ours.keys() & theirs.keys():
        if ours[key] != theirs[key]:
            yield f"{key}: {str(ours[key])[:200]} instead of {str(theirs[key])[:200]}"
    names = [tensor.name for tensor in reader.tensors]
    if [tensor.name for tensor in layout.tensors] != names:
        yield f"tensors or their order: {[t.name for t in layout.tensors]} instead of {names}"
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    for tensor in layout.tensors:
        if tensor.name in by_name:
            yield from _tensor_differences(checkpoint, tensor, by_name[tensor.name])


def floats(tensor: gguf.ReaderTensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32 values of an F32 or BF16 tensor of a file, rows first."""
    values = decode(tensor.tensor_type.name, np.ascontiguousarray(tensor.data).view(np.uint8).reshape(-1))
    assert values is not None, tensor.tensor_type
    return values.astype(np.float32).reshape([int(n) for n in reversed(tensor.shape)])


def golden(file: Path) -> dict[str, Any]:
    """What a file holds, as small JSON."""
    reader = gguf.GGUFReader(file)
    keys = {key: stored(field) for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    tensors = {t.name: golden_tensor(floats(t).shape, t.tensor_type.name == "F32", floats(t)) for t in reader.tensors}
    return {"keys": golden_keys(keys), "tensors": tensors}


def one_per_line(parts: dict[str, dict[str, Any]]) -> str:
    """JSON with one key or tensor on a line, so that a diff of two goldens can be read."""
    out = []
    for name, entries in parts.items():
        lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items()]
        out.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(out) + "\n}\n"


def _tensor_differences(checkpoint: Checkpoint, ours: GgufTensor, theirs: gguf.ReaderTensor) -> Iterator[str]:
    shape = tuple(int(n) for n in reversed(theirs.shape))
    kind = "F32" if ours.keep_f32 else "BF16"
    if shape != ours.shape:
        yield f"{ours.name}: shape {list(ours.shape)} instead of {list(shape)}"
    elif theirs.tensor_type.name != kind:
        yield f"{ours.name}: {kind} instead of {theirs.tensor_type.name}"
    elif not np.array_equal(floats(theirs), values_of(checkpoint, ours)):
        yield f"{ours.name}: other values"


def compare(source: Path, folder: Path, scratch: Path, goldens: Path | None) -> dict[str, list[str]]:
    """File of the folder → differences: the model file, and the mmproj where the checkpoint has a vision tower."""
    config = json.loads((folder / "config.json").read_text())
    drafter = config["architectures"][0] in DRAFTERS
    checkpoint = open_checkpoint(folder, any_architecture=drafter)
    out = {}
    parts = [
        ("model", layout_of, ()),
        *([("mmproj", vision_layout_of, ("--mmproj",))] if config.get("vision_config") else []),
    ]
    for part, layout, flags in parts:
        file = scratch / f"{folder.name}.{part}.gguf"
        convert(source, folder, file, *flags)
        out[f"{folder.name} {part}"] = list(differences(checkpoint, layout(checkpoint), file))
        if goldens is not None:
            (goldens / f"converter_{folder.name}_{part}.json").write_text(one_per_line(golden(file)))
        file.unlink()
    return out


def demo_folders(scratch: Path) -> list[Path]:
    """Every demo checkpoint; the tower with its trunk."""
    from demo.train.join import joined

    demo = ROOT / "demo"
    tower = joined(demo / "moe", demo / "moe-vision", scratch / "moe-vision")
    alone = sorted(path.parent for path in demo.glob("*/config.json") if path.parent.name != tower.name)
    return [*alone, tower]


def tiny_folders(scratch: Path) -> list[Path]:
    """Random checkpoints of every kind and of odd forms."""
    from transformers import AutoConfig

    from tiny import add_vision, make_drafter, make_tiny

    kinds = ("moe", "dense", "moe-text", "dense-text")
    folders = [make_tiny(scratch / f"tiny-{kind}", kind) for kind in kinds]
    folders.append(make_tiny(scratch / "Some-Org-Gemma-4-v2-1M-it", "moe", shards=1, num_global_key_value_heads=2))
    folders.append(make_tiny(scratch / "no-cap", "dense", final_logit_softcapping=None, attention_k_eq_v=False))
    types = ["sliding_attention", "full_attention"] * 3
    folders.append(make_tiny(scratch / "shared", "dense-text", layer_types=types, num_kv_shared_layers=2))
    folders.append(make_drafter(scratch / "drafter"))
    folders.append(add_vision(make_tiny(scratch / "tower", "moe")))
    folders.append(add_vision(make_tiny(scratch / "plain-tower", "dense", shards=1), standardize=False,
                              use_clipped_linears=False, pooling_kernel_size=2))  # fmt: skip
    resaved = make_tiny(scratch / "resaved", "moe", shards=1)  # as transformers writes it: per_layer_config
    AutoConfig.from_pretrained(resaved).save_pretrained(resaved)
    folders.append(resaved)
    (folders[0] / "README.md").write_text(CARD)
    sampling = {"temperature": 0.7, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1}
    (folders[1] / "generation_config.json").write_text(json.dumps(sampling))
    return folders


def main() -> None:
    """Compare every folder; exit 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--golden", type=Path)
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = args.folders or [*demo_folders(Path(scratch)), *tiny_folders(Path(scratch))]
        found: dict[str, list[str]] = {}
        for folder in folders:
            for name, lines in compare(args.source, folder, Path(scratch), args.golden).items():
                found[name] = lines
                print(f"{name:36} {'equal' if not lines else f'{len(lines)} differences'}", file=sys.stderr, flush=True)
                for line in lines:
                    print(f"    {line}", file=sys.stderr, flush=True)
    told = f"{sum(map(len, found.values()))}, in {len(found)} files: {', '.join(found)}"
    what = "keys, tensors and values that differ from the converter's"
    show({"rows": [row(what, "0", told)], "differences": found}, as_json=args.json)
    sys.exit(1 if any(found.values()) else 0)


if __name__ == "__main__":
    main()
