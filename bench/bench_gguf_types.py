"""The types we choose against those of llama-quantize: every file type, with and without an importance matrix.

    python bench/bench_gguf_types.py REFERENCE [--goldens tests/export/mix/goldens.json] [--json]

REFERENCE holds a llama.cpp: `src/` (source, for its converter) and `build/bin/llama-quantize`. Compared are the demo
checkpoints as its converter writes them, and files of headers alone with the geometry of the real models, of a model
with eight experts, and of one whose rows fit no block; llama-quantize says its types with `--dry-run`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from gemcut.errors import UsageError
from gemcut.export.mix import tables
from gemcut.export.mix.overrides import parse_overrides
from gemcut.export.mix.shapes import quantisable
from gemcut.export.mix.stock import stock_types
from gemcut.export.mix.tables import FILE_TYPES
from gemcut.families.gguf import GgufLayout, GgufTensor
from rows import row, show
from texts import DEMO

_SAID = re.compile(r"\]\s+(\S+)\s+- \[.*?\], type =\s*(\w+), size = .*?(?:\((\w+)\))?$")
REFUSED = "refused"
LARGE_ENDS = ("--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0")
BY_HAND = (r"blk\.[0-3]\.attn_V=q8_0", "ffn_down=IQ4_XS")


@dataclass(frozen=True, slots=True)
class Run:
    """One call of llama-quantize, and how we say the same."""

    name: str
    file: str
    imatrix: bool = False
    flags: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()

    @property
    def stock(self) -> str:
        """The file type without its large ends."""
        return tables.LARGE_ENDS.get(self.file, self.file)


BY_HAND_FLAGS = tuple(flag for one in BY_HAND for flag in ("--tensor-type", one))
RUNS = (
    *(Run(f"{file} imatrix" if given else file, file, given) for file in FILE_TYPES for given in (False, True)),
    *(Run(file, file, flags=LARGE_ENDS) for file in tables.LARGE_ENDS),
    Run("Q4_K_M by hand", "Q4_K_M", flags=BY_HAND_FLAGS, overrides=BY_HAND),
    Run("Q3_K_M by hand", "Q3_K_M", flags=BY_HAND_FLAGS, overrides=BY_HAND),
    Run("Q2_K_L by hand", "Q2_K_L", flags=(*LARGE_ENDS, *BY_HAND_FLAGS), overrides=BY_HAND),
)


@dataclass(frozen=True, slots=True)
class Geometry:
    """A model by its numbers. full: every so many layers attend to everything and have K = V."""

    layers: int
    hidden: int
    heads: int
    kv: tuple[int, int]  # sliding, full
    head_dim: tuple[int, int]
    width: int
    experts: int = 0
    expert_width: int = 0
    full: int = 6
    vocabulary: int = 262144
    output: bool = False
    per_layer: int = 0


GEOMETRIES = {
    "31B": Geometry(60, 5376, 32, (16, 4), (256, 512), 21504),
    "26B-A4B": Geometry(30, 2816, 16, (8, 2), (256, 512), 2112, 128, 704),
    "26B-109e": Geometry(30, 2816, 16, (8, 2), (256, 512), 2112, 109, 704),
    "26B-98e": Geometry(30, 2816, 16, (8, 2), (256, 512), 2112, 98, 704),
    "eight experts": Geometry(16, 512, 16, (4, 4), (64, 64), 768, 8, 256, vocabulary=2048, output=True),
    "grouped": Geometry(17, 512, 16, (2, 2), (64, 64), 768, vocabulary=2048, output=True, per_layer=256),
    "odd rows": Geometry(9, 320, 5, (5, 5), (16, 16), 96, vocabulary=2048),
}


def tensors_of(g: Geometry) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """(name, shape rows first, float32?) of every tensor."""
    yield "token_embd.weight", (g.vocabulary, g.hidden), False
    yield "output_norm.weight", (g.hidden,), True
    if g.output:
        yield "output.weight", (g.vocabulary, g.hidden), False
    if g.per_layer:
        yield "per_layer_token_embd.weight", (g.vocabulary, g.per_layer * g.layers), False
        yield "per_layer_model_proj.weight", (g.per_layer * g.layers, g.hidden), False
        yield "per_layer_proj_norm.weight", (g.per_layer,), True
    for i in range(g.layers):
        full = (i + 1) % g.full == 0
        dim, kv = g.head_dim[full], g.kv[full]
        matrices: dict[str, tuple[int, ...]] = {
            "attn_q": (g.heads * dim, g.hidden),
            "attn_k": (kv * dim, g.hidden),
            "attn_v": (kv * dim, g.hidden),
            "attn_output": (g.hidden, g.heads * dim),
            "ffn_gate": (g.width, g.hidden),
            "ffn_up": (g.width, g.hidden),
            "ffn_down": (g.hidden, g.width),
        }
        if full:
            del matrices["attn_v"]
        if g.experts:
            matrices["ffn_gate_up_exps"] = (g.experts, 2 * g.expert_width, g.hidden)
            matrices["ffn_down_exps"] = (g.experts, g.hidden, g.expert_width)
            yield f"blk.{i}.ffn_gate_inp.weight", (g.experts, g.hidden), True
            yield f"blk.{i}.ffn_gate_inp.scale", (g.hidden,), True
            yield f"blk.{i}.ffn_down_exps.scale", (g.experts,), True
        for name, shape in matrices.items():
            yield f"blk.{i}.{name}.weight", shape, False
        for name in ("attn_norm", "attn_q_norm", "attn_k_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            yield f"blk.{i}.{name}.weight", (g.hidden,), True
        yield f"blk.{i}.layer_output_scale.weight", (1,), True


def write_header(g: Geometry, path: Path) -> None:
    """A GGUF file with all its tensors and no data: a hole in the disk."""
    writer = gguf.GGUFWriter(path, "gemma4")
    writer.add_block_count(g.layers)
    writer.add_context_length(131072)
    writer.add_embedding_length(g.hidden)
    writer.add_feed_forward_length(g.width)
    writer.add_head_count(g.heads)
    kinds = [(i + 1) % g.full == 0 for i in range(g.layers)]
    writer.add_head_count_kv([g.kv[full] for full in kinds])
    writer.add_key_length(g.head_dim[1])
    writer.add_value_length(g.head_dim[1])
    writer.add_key_length_swa(g.head_dim[0])
    writer.add_value_length_swa(g.head_dim[0])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(1024)
    writer.add_sliding_window_pattern([not full for full in kinds])
    writer.add_embedding_length_per_layer_input(g.per_layer)
    if g.experts:
        writer.add_expert_count(g.experts)
        writer.add_expert_used_count(4)
        writer.add_expert_feed_forward_length(g.expert_width)
    for name, shape, wide in tensors_of(g):
        kind = gguf.GGMLQuantizationType.F32 if wide else gguf.GGMLQuantizationType.BF16
        size = int(np.prod(shape)) * (4 if wide else 2)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    padded = sum(-(-int(np.prod(s)) * (4 if wide else 2) // 32) * 32 for _, s, wide in tensors_of(g))
    os.truncate(path, path.stat().st_size + 32 + padded)


def write_imatrix(path: Path) -> None:
    """The least file that llama-quantize takes for importances: one tensor that no model has."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["none"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_tensor("nothing.in_sum2", np.ones((1, 32), np.float32))
    writer.add_tensor("nothing.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert(reference: Path, model: Path, out: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(reference / "src" / "gguf-py")}
    command = [sys.executable, str(reference / "src" / "convert_hf_to_gguf.py"), str(model)]
    command += ["--outtype", "bf16", "--outfile", str(out)]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def layout_of(path: Path) -> GgufLayout:
    """The layout of a GGUF file, from its header."""
    reader = gguf.GGUFReader(path)

    def number(key: str, default: int) -> int:
        field = reader.get_field(f"gemma4.{key}")
        value = default if field is None else field.contents()
        return int(value[0] if isinstance(value, list) else value)

    tensors = tuple(
        GgufTensor(
            one.name,
            tuple(int(n) for n in reversed(one.shape)),
            source=None,
            keep_f32=one.tensor_type == gguf.GGMLQuantizationType.F32,
        )
        for one in reader.tensors
    )
    return GgufLayout(
        architecture="gemma4",
        metadata={},
        tensors=tensors,
        layers=number("block_count", 0),
        experts=number("expert_count", 0),
        group=number("attention.head_count", 1) // number("attention.head_count_kv", 1),
        tied=all(one.name != "output.weight" for one in tensors),
    )


def theirs(reference: Path, path: Path, run: Run, imatrix: Path) -> dict[str, str]:
    """Tensor → type, as llama-quantize says it; {} where it refuses."""
    flags = [*run.flags, *(["--imatrix", str(imatrix)] if run.imatrix else [])]
    tool = reference / "build" / "bin" / "llama-quantize"
    command = [str(tool), "--dry-run", *flags, str(path), run.stock]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    said = {m[1]: (m[3] or m[2]).upper() for line in lines if (m := _SAID.search(line))}
    return said if done.returncode == 0 else {}


def ours(layout: GgufLayout, run: Run) -> dict[str, str]:
    try:
        types = stock_types(run.file, layout, imatrix=run.imatrix, overrides=parse_overrides(run.overrides))
    except UsageError:
        return {}
    return {name: kind.name for name, kind in types.items()}


# ---------------------------------------------------------------- goldens


def ranges(layers: list[int]) -> str:
    """[0, 1, 2, 5] → "0-2,5"."""
    parts: list[list[int]] = []
    for i in layers:
        if parts and parts[-1][1] == i - 1:
            parts[-1][1] = i
        else:
            parts.append([i, i])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def fold(values: Mapping[str, str], count: int) -> dict[str, Any]:
    """Name → value, written as role → value where it holds in all layers, else as role → {value: layers}."""
    roles: dict[str, dict[str, list[int]]] = {}
    for name, value in values.items():
        found = re.match(r"blk\.(\d+)\.(.*)", name)
        role, layer = (found[2], int(found[1])) if found else (name, -1)
        roles.setdefault(role, {}).setdefault(value, []).append(layer)
    whole = ([-1], list(range(count)))
    return {
        role: next(
            (k for k, v in kinds.items() if sorted(v) in whole), {k: ranges(sorted(v)) for k, v in kinds.items()}
        )
        for role, kinds in roles.items()
    }


def golden(layout: GgufLayout, types: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """What a test needs: the matrices' shapes, and the types of each run; with importances only where that differs."""
    matrices = {t.name: "x".join(map(str, t.shape)) for t in layout.tensors if quantisable(t)}
    runs: dict[str, Any] = {}
    for run, chosen in types.items():
        folded = fold({n: chosen[n] for n in matrices}, layout.layers) if chosen else REFUSED
        if runs.get(run.removesuffix(" imatrix")) != folded:
            runs[run] = folded
    facts = {"layers": layout.layers, "experts": layout.experts, "group": layout.group}
    return {**facts, "shapes": fold(matrices, layout.layers), "types": runs}


def spell(goldens: Mapping[str, Any]) -> str:
    """JSON with one line for every run, so that a change is seen in a diff."""
    cases = []
    for case, facts in goldens.items():
        runs = ",\n".join(f"   {json.dumps(run)}: {json.dumps(types)}" for run, types in facts["types"].items())
        head = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in facts.items() if k != "types")
        cases.append(f' {json.dumps(case)}: {{\n{head},\n  "types": {{\n{runs}\n  }}\n }}')
    return "{\n" + ",\n".join(cases) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--goldens", type=Path)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    found, goldens = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        imatrix = Path(scratch) / "imatrix.gguf"
        write_imatrix(imatrix)
        for case in ("demo dense", "demo moe", *GEOMETRIES):
            path = Path(scratch) / "model.gguf"
            if case in GEOMETRIES:
                write_header(GEOMETRIES[case], path)
            else:
                convert(asked.reference, DEMO / case.removeprefix("demo "), path)
            layout = layout_of(path)
            said: dict[str, dict[str, str]] = {}
            wrong = tensors = 0
            for run in RUNS:
                said[run.name] = theirs(asked.reference, path, run, imatrix)
                mine = ours(layout, run)
                tensors += max(len(said[run.name]), 1)
                differ = {n for n in {*said[run.name], *mine} if said[run.name].get(n) != mine.get(n)}
                wrong += len(differ)
                for name in sorted(differ)[:3]:
                    print(f"{case}, {run}: {name}: {said[run.name].get(name)}, ours {mine.get(name)}", file=sys.stderr)
            found.append({"model": case, "runs": len(said), "refused": sum(not v for v in said.values()),
                         "types": tensors, "differ": wrong})  # fmt: skip
            if case != "26B-109e":  # as 98e
                goldens[case] = golden(layout, said)
            path.unlink()
    if asked.goldens:
        asked.goldens.write_text(spell(goldens))
    told = [
        row(
            f"{one['model']}: types that differ from llama-quantize's",
            "0",
            f"{one['differ']} of {one['types']:,}, in {one['runs']} runs ({one['refused']} refused by both)",
        )
        for one in found
    ]
    show({"rows": told, "models": found}, as_json=asked.json)
    sys.exit(any(one["differ"] for one in found))


if __name__ == "__main__":
    main()
