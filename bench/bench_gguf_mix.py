"""What a solved mix saves: KLD of files with measured types against llama-quantize's mixes, at equal size.

    python bench/bench_gguf_mix.py [--json] [--only dense,moe] [--tokens 16384 --curvature-tokens 12000]

Statistics, importance matrix and curvature come from the demo calibration text; the files are written by the exporter,
all with the same importances, and llama.cpp's library runs them on held-out texts that nobody looked at. Ratios are
paired, with 95 % intervals from a bootstrap over chunks. A stock mix with the keys of the layers where K serves as V
raised by hand, and the ContribDynamic tiers, are measured beside them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gemcut import exporting, mixing
from gemcut.ablate import AblateSettings, curvature
from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.evaluate.chunks import KldChunks
from gemcut.evaluate.kld import KldSettings, kld_chunks
from gemcut.export.imatrix import from_statistics, write_imatrix
from gemcut.export.layout import layout_of
from gemcut.export.mix.sizes import file_size
from gemcut.gguf_file import open_gguf
from gemcut.observe.run import observe
from gemcut.records.curvature import save_curvature
from gemcut.stream.corpus import load_corpus
from rows import Line, interval, row, show, spell
from texts import CALIBRATION, DEMO, unseen

STOCK = ("Q4_K_M", "Q3_K_M", "IQ2_M")
TIERS = ("CD-Q4_K_M", "CD-Q3_K_M", "CD-Q2_K")
TARGET = 0.85  # of the stock file's KLD


def prepare(base: Checkpoint, folder: Path, tokens: int) -> tuple[Path, Path, dict[str, float]]:
    """Importance matrix and curvature of the calibration text, and how long they took."""
    seconds = {}
    began = time.perf_counter()
    observe(base, load_corpus(CALIBRATION, base.path), folder / "stats")
    write_imatrix(folder / "imatrix.gguf", from_statistics(folder / "stats", layout_of(base)))
    seconds["observe"] = time.perf_counter() - began
    began = time.perf_counter()
    few = load_corpus(CALIBRATION, base.path, max_tokens=tokens)
    save_curvature(curvature(base, few, AblateSettings(dtype="float32")), folder / "curvature")
    seconds["curvature"] = time.perf_counter() - began
    return folder / "imatrix.gguf", folder / "curvature", seconds


def export(base: Checkpoint, words: exporting.GgufWords, out: Path) -> tuple[list[Path], tuple[mixing.Mix, ...]]:
    exports = exporting.plan_export(base, words)
    exporting.write_export(exports, out, threads=1)
    return [out / plan.target.name for one in exports for plan in one.planned], exports[0].mixes


def shared_keys(base: Checkpoint) -> str:
    """A pattern for attn_k of the layers without attn_v."""
    names = {tensor.name for tensor in layout_of(base).tensors}
    layers = [i for i in range(layout_of(base).layers) if f"blk.{i}.attn_v.weight" not in names]
    return rf"blk\.({'|'.join(map(str, layers))})\.attn_k=q6_k"


def measure(kind: str, folder: Path, tokens: int, curvature_tokens: int) -> dict[str, Any]:
    base = open_checkpoint(DEMO / kind)
    imatrix, curved, seconds = prepare(base, folder, curvature_tokens)
    words = exporting.GgufWords(STOCK, imatrix)
    stock, _ = export(base, words, folder / "stock")
    keys, _ = export(base, replace(words, overrides=(shared_keys(base),)), folder / "keys")
    tiers, _ = export(base, exporting.GgufWords(TIERS, imatrix), folder / "tiers")
    sizes = tuple(open_gguf(path).size_bytes for path in stock)
    began = time.perf_counter()
    mix = mixing.MixWords(sizes, (), curved, folder / "damages.json")
    solved, mixes = export(base, exporting.GgufWords((), imatrix, mix=mix), folder / "solved")
    seconds["damages, solve and export"] = time.perf_counter() - began
    tier_sizes = tuple(open_gguf(path).size_bytes for path in tiers)
    again = mixing.MixWords(tier_sizes, (), curved, folder / "damages.json")
    beside, _ = export(base, exporting.GgufWords((), imatrix, mix=again), folder / "beside")
    files = [*stock, *solved, *keys, *tiers, *beside]
    corpus = unseen(DEMO / kind, tokens)
    chunks = kld_chunks(base, [open_gguf(path) for path in files], corpus, KldSettings(threads=1))
    n, layout = len(STOCK), layout_of(base)
    out: dict[str, Any] = {"tokens": int(chunks.tokens.sum()), "chunks": len(chunks.tokens), "seconds": seconds}
    out["solved"] = [
        {
            "stock": name,
            "stock_bytes": sizes[i],
            "solved_bytes": mixes[i].solution.size_bytes,
            "stock_kld": interval(chunks.mean(i)),
            "solved_kld": interval(chunks.mean(n + i)),
            "expected_kld": mixes[i].solution.damage,
            "ratio": interval(chunks.ratio(n + i, i)),
            "types": {band.role: [k.name for k, _ in band.types] for band in mixes[i].bands},
            "bpw": file_size(0, mixes[i].solution.types, layout).bpw,
        }
        for i, name in enumerate(STOCK)
    ]
    out["keys"] = [
        {
            "stock": name,
            "more_bytes": open_gguf(keys[i]).size_bytes - sizes[i],
            "ratio": interval(chunks.ratio(2 * n + i, i)),
        }
        for i, name in enumerate(STOCK)
    ]
    out["tiers"] = [tier(name, i, chunks, tier_sizes[i]) for i, name in enumerate(TIERS)]
    return out


def tier(name: str, i: int, chunks: KldChunks, size: int) -> dict[str, Any]:
    at = 3 * len(STOCK) + i
    ratio = interval(chunks.ratio(at + len(TIERS), at))
    return {"tier": name, "bytes": size, "kld": interval(chunks.mean(at)), "solved_ratio": ratio}


def rows(found: dict[str, Any]) -> Iterator[Line]:
    """Lines for the page of figures."""
    for kind, one in found.items():
        many = f"n = {one['chunks']} chunks, {one['tokens']:,} tokens"
        for each in one["solved"]:
            below = 100 * (1 - each["solved_bytes"] / each["stock_bytes"])
            klds = f"KLD {each['solved_kld']['value']:.5f} against {each['stock_kld']['value']:.5f}"
            yield row(
                f"demo/{kind}, as {each['stock']}, {each['stock_bytes']:,} bytes: solved file's share of its KLD",
                f"≤ {TARGET}",
                f"{spell(each['ratio'])}; {klds}, expected {each['expected_kld']:.5f}; "
                f"{below:.3f} % below the size; {many}",
            )
        for each in one["keys"]:
            yield row(
                f"demo/{kind}, {each['stock']} with attn_k at Q6_K where K serves as V: share of its KLD",
                "",
                f"{spell(each['ratio'])} for {each['more_bytes']:,} bytes more; {many}",
            )
        for each in one["tiers"]:
            yield row(
                f"demo/{kind}, as {each['tier']}, {each['bytes']:,} bytes: solved file's share of its KLD",
                "",
                f"{spell(each['solved_ratio'])}; the tier's KLD {each['kld']['value']:.5f}; {many}",
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="dense,moe")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--curvature-tokens", type=int, default=12000)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for kind in asked.only.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            found[kind] = measure(kind, Path(scratch), asked.tokens, asked.curvature_tokens)
        print(f"{kind} done", file=sys.stderr)
    show({"rows": list(rows(found)), "models": found}, as_json=asked.json)


if __name__ == "__main__":
    main()
