"""NVFP4 against llm-compressor: error of weights, KLD and size; and how fast it is at the width of the real models.

    python bench/bench_nvfp4.py [--json] rival PYTHON [--only dense,moe] [--calibrate 8192] [--tokens 16384]
    python bench/bench_nvfp4.py [--json] speed [--only 31B,26B-A4B] [--layers 2] [--runs 2] [--folder DIR]

rival: PYTHON is the interpreter of an environment with llm-compressor. Both quantise the demo trunks, all linears or
the MLPs and experts alone, from the same samples: llm-compressor with its own defaults, gemcut with its own, which are
weighted scales with statistics and the sweep without. Errors are paired by matrix, KLD by held-out item that nobody
looked at; intervals are 95 %, from a bootstrap. Layers run in float32, so that files differ by their numbers.

speed: synthetic layers as wide as those of 31B and 26B-A4B, the whole verb in a process of its own: start, reading,
hashing, writing and fsync included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import synthetic
from bench_memory import run
from gemcut import shipped
from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.evaluate.interval import Bootstrap
from gemcut.evaluate.kld import KldSettings, kld_chunks
from gemcut.nvfp4.choices import SCHEMES, Scheme, Targets
from gemcut.nvfp4.plain import divisor, plain_tensors, read_rows
from gemcut.stream.corpus import Corpus, load_corpus
from rows import Line, interval, load_average, row, show, spell
from texts import CALIBRATION, DEMO, unseen

TARGETS: tuple[Targets, ...] = ("mlp+experts", "all")
LEFT = ["lm_head", "re:.*vision.*", "re:.*embed.*", "re:.*router.*"]
ATTENTION = r"re:.*self_attn\.(q|k|v|o)_proj$"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
LIMITS = {"NVFP4A16": 0.9, "NVFP4": 1.0}  # of llm-compressor's KLD
FAST, LEAN = 40e6, 1.5 * 2**30
WIDE = {"31B": synthetic.DENSE_31B, "26B-A4B": synthetic.Geometry()}
FEW = 512  # tokens, where statistics only have to be there


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """One way to quantise a trunk, by both; `plain`: ours without statistics, where that is possible."""

    scheme: Scheme
    targets: Targets
    theirs: Checkpoint
    ours: Checkpoint
    plain: Checkpoint | None
    cost: Mapping[str, Any]


def rival(python: Path, base: Path, scheme: Scheme, targets: Targets, corpus: Corpus, out: Path) -> dict[str, Any]:
    """llm-compressor's folder; seconds and peak memory of its work, versions."""
    job, answer = out.with_suffix(".job.json"), out.with_suffix(".answer.json")
    ignore = LEFT if targets == "all" else [*LEFT, ATTENTION]
    samples = [one.ids.tolist() for one in corpus.items] if scheme == "NVFP4" else []
    words = {"base": base, "out": out, "answer": answer}
    job.write_text(
        json.dumps({"scheme": scheme, "ignore": ignore, "samples": samples, **{k: str(v) for k, v in words.items()}})
    )
    script = Path(__file__).with_name("rival_nvfp4.py")
    done = subprocess.run([str(python), str(script), str(job)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"llm-compressor ended with {done.returncode}:\n{done.stderr[-2000:]}")
    for name in TOKENIZER:
        shutil.copy(base / name, out / name)
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def pair(python: Path, base: Path, scheme: Scheme, targets: Targets, corpus: Corpus, folder: Path) -> Pair:
    """Both sides' folders. Ours are made by the verb itself, in a process of its own."""
    where = folder / f"{scheme}-{targets}"
    where.mkdir()
    cost = {"theirs": rival(python, base, scheme, targets, corpus, where / "theirs")}
    words = ["nvfp4", str(base), "--scheme", scheme, "--targets", targets]
    cost["ours"] = run(*words, "--stats", str(folder / "stats"), "-o", str(where / "ours"))
    plain = None
    if scheme == "NVFP4A16":
        run(*words, "-o", str(where / "plain"))
        plain = open_checkpoint(where / "plain")
    return Pair(scheme, targets, open_checkpoint(where / "theirs"), open_checkpoint(where / "ours"), plain, cost)


def errors(base: Checkpoint, made: Checkpoint) -> dict[str, float]:
    """‖w' − w‖ / ‖w‖ of every packed matrix."""
    plain = plain_tensors(made)
    found = {}
    for name, matrices in plain.packed.items():
        bits = base.read(name).view("<u2").astype(np.uint32) << 16
        weights = bits.view(np.float32).reshape(-1, matrices[0].matrix.columns)
        for one in matrices:
            rows = slice(one.matrix.first, one.matrix.stop)
            scale = divisor(made, one.scale, plain.told.layout)
            back = read_rows(made, one, scale, 0, one.matrix.stop - one.matrix.first)
            found[one.matrix.module] = float(np.linalg.norm(back - weights[rows]) / np.linalg.norm(weights[rows]))
    return found


def error_ratio(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    """Mean error of ours as a share of theirs, paired by matrix; kinds of projections are the strata."""
    if ours.keys() != theirs.keys():
        sys.exit(f"other matrices were quantised: {sorted(ours.keys() ^ theirs.keys())[:4]}")
    names = sorted(ours)
    kinds = np.unique([name.rpartition(".")[2] for name in names], return_inverse=True)[1].astype(np.int64)
    mine, others = (np.array([side[name] for name in names]) for side in (ours, theirs))
    return interval(Bootstrap(kinds, 0).ratio(mine, others)) | {
        "ours": float(mine.mean()),
        "theirs": float(others.mean()),
    }


def compare(python: Path, kind: str, calibrate: int, tokens: int) -> dict[str, Any]:
    """One trunk, every scheme and targets."""
    base = open_checkpoint(DEMO / kind)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        corpus = load_corpus(CALIBRATION, base.path, max_tokens=calibrate)
        words = ("--corpus", str(CALIBRATION), "--max-tokens", str(calibrate), "-o", str(folder / "stats"))
        observed = run("observe", str(base.path), *words)
        pairs = [
            pair(python, base.path, scheme, targets, corpus, folder)
            for scheme, targets in itertools.product(SCHEMES, TARGETS)
        ]
        made = [one for each in pairs for one in (each.theirs, each.ours, each.plain) if one is not None]
        print(f"{kind}: {len(made)} folders", file=sys.stderr, flush=True)
        held = unseen(base.path, tokens)
        chunks = kld_chunks(base, made, held, KldSettings(dtype="float32"))
        out = []
        for each in pairs:
            i, j = made.index(each.theirs), made.index(each.ours)
            lost = errors(base, each.theirs)
            one: dict[str, Any] = {"scheme": each.scheme, "targets": each.targets, "matrices": len(lost)}
            one["bytes"] = {"theirs": each.theirs.size_bytes, "ours": each.ours.size_bytes}
            one["error"] = error_ratio(errors(base, each.ours), lost)
            one["kld"] = {"theirs": interval(chunks.mean(i)), "ours": interval(chunks.mean(j))}
            one["kld_ratio"] = interval(chunks.ratio(j, i))
            if each.plain is not None:
                one["sweep_error"] = error_ratio(errors(base, each.plain), lost)
                one["sweep_kld_ratio"] = interval(chunks.ratio(made.index(each.plain), i))
            out.append(one | {"cost": each.cost})
    return {
        "samples": len(corpus.items), "calibration_tokens": sum(len(one.ids) for one in corpus.items),
        "observe": observed, "tokens": int(chunks.tokens.sum()), "items": len(chunks.tokens), "ways": out,
    }  # fmt: skip


def rival_rows(found: Mapping[str, Any]) -> Iterator[Line]:
    """Lines for the page of figures."""
    for kind, one in found.items():
        text = f"n = {one['items']} items, {one['tokens']:,} tokens"
        for way in one["ways"]:
            name = f"demo/{kind}, {way['scheme']}, {way['targets']}"
            limit = LIMITS[way["scheme"]]
            klds = {side: f"{way['kld'][side]['value']:.5f}" for side in ("ours", "theirs")}
            swept = f"; without statistics {spell(way['sweep_kld_ratio'])}" if "sweep_kld_ratio" in way else ""
            yield row(
                f"{name}: KLD from BF16 as a share of llm-compressor's",
                f"≤ {limit:g}",
                f"{spell(way['kld_ratio'])}, {klds['ours']} against {klds['theirs']} nats{swept}; {text}",
            )
            error = way["error"]
            swept = f"; without statistics {spell(way['sweep_error'])}" if "sweep_error" in way else ""
            size = way["bytes"]
            same = "the same" if size["ours"] == size["theirs"] else f"theirs {size['theirs']:,}"
            yield row(
                f"{name}: relative error of weights as a share of llm-compressor's",
                f"≤ {limit:g}",
                f"{spell(error)}, {error['ours']:.4f} against {error['theirs']:.4f}{swept}; n = {way['matrices']} "
                f"matrices; tensors of {size['ours']:,} bytes, {same}",
            )
        yield row(f"demo/{kind}: seconds and peak memory, at this load", "", "; ".join(costs(one)))


def costs(one: Mapping[str, Any]) -> Iterator[str]:
    for way in one["ways"]:
        theirs, ours = way["cost"]["theirs"], way["cost"]["ours"]
        yield (
            f"{way['scheme']}, {way['targets']}: {ours['seconds']:.1f} s and {ours['peak_bytes'] / 2**20:.0f} MiB, "
            f"llm-compressor without its start {theirs['seconds']:.1f} s and {theirs['peak_bytes'] / 2**20:.0f} MiB"
        )
    yield f"our observe of {one['calibration_tokens']:,} tokens once {one['observe']['seconds']:.1f} s"
    versions = one["ways"][0]["cost"]["theirs"]["versions"]
    yield ", ".join(f"{name} {version}" for name, version in versions.items())


def wide(name: str, folder: Path, layers: int, runs: int) -> dict[str, Any]:
    """The verb on full-width layers: with the sweep, and weighted."""
    base, stats, out = folder / name, folder / f"{name}-stats", folder / "out"
    synthetic.write(base, layers=layers, geometry=WIDE[name])
    for file in TOKENIZER:
        shutil.copy(shipped.demo_folder() / "moe" / file, base / file)
    run("observe", str(base), "--corpus", "demo:calibration", "--max-tokens", str(FEW), "-o", str(stats))
    found: dict[str, Any] = {"scales": {}}
    for scales, words in {"sweep": (), "weighted": ("--stats", str(stats), "--max-borrowed", "1")}.items():
        each = []
        for _ in range(runs):
            each.append(run("nvfp4", str(base), "--targets", "all", "--threads", "2", *words, "-o", str(out)))
            record = json.loads((out / "nvfp4.json").read_text())
            shutil.rmtree(out)
        found["scales"][scales] = each
        found["modules"] = len(record["modules"])
    checkpoint = open_checkpoint(base)
    shapes = {key: ref.shape for key, ref in checkpoint.tensors.items()}
    groups = checkpoint.family.linears().groups(checkpoint.text_config, shapes)
    found["parameters"] = sum(m.rows * m.columns for group in groups for m in group.matrices)
    shutil.rmtree(base)
    return found


def speed_rows(found: Mapping[str, Any], layers: int) -> Iterator[Line]:
    """Lines for the page of figures."""
    for name, one in found.items():
        many, where = one["parameters"], f"{layers} layers as wide as {name}'s, {one['modules']} linears"
        for scales, each in one["scales"].items():
            wall, cpu = (statistics.median(r[key] for r in each) for key in ("seconds", "cpu_seconds"))
            yield row(
                f"`gemcut nvfp4`, {where}: {scales}, on 2 cores",
                f"≥ {FAST / 1e6:.0f} M parameters a second",
                f"{many / wall / 1e6:.0f} M ({min(many / r['seconds'] for r in each) / 1e6:.0f} to "
                f"{max(many / r['seconds'] for r in each) / 1e6:.0f}); {cpu / many * 1e9:.1f} ns of processor time a "
                f"parameter; {many / 1e6:,.0f} M parameters, n = {len(each)} runs",
            )
        peak = max(r["peak_bytes"] for each in one["scales"].values() for r in each)
        yield row(f"the same, {name}: peak memory", f"≤ {LEAN / 2**30} GiB", f"{peak / 2**30:.2f} GiB")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    verbs = parser.add_subparsers(dest="verb", required=True)
    against = verbs.add_parser("rival")
    against.add_argument("python", type=Path)
    against.add_argument("--only", default="dense,moe")
    against.add_argument("--calibrate", type=int, default=8192)
    against.add_argument("--tokens", type=int, default=16384)
    fast = verbs.add_parser("speed")
    fast.add_argument("--layers", type=int, default=2)
    fast.add_argument("--only", default=",".join(WIDE))
    fast.add_argument("--runs", type=int, default=2)
    fast.add_argument("--folder", type=Path, help="where checkpoints are written; a temporary folder by default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any]
    if args.verb == "rival":
        found = {kind: compare(args.python, kind, args.calibrate, args.tokens) for kind in args.only.split(",")}
        answer = {"rows": list(rival_rows(found)), "trunks": found}
    else:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            found = {name: wide(name, Path(folder), args.layers, args.runs) for name in args.only.split(",")}
        answer = {"rows": list(speed_rows(found, args.layers)), "layers": args.layers, "wide": found}
    show({**answer, "load": load_average()}, as_json=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
