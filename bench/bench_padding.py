"""Whether experts padded to blocks of 256 pay: KLD at equal size, with and without --pad-experts.

    python bench/wide_experts.py --rows ROWS --out FOLDER
    python bench/bench_padding.py --model FOLDER [--json] [--tokens 12288 --curvature-tokens 8000] [--work DIR]

FOLDER holds experts 704 wide, as 26B-A4B's. Their down-projections fit no block of 256, so that without padding no type
below 4.25 bits fits them; with it they, gate and up are stored 768 wide. For each file type there are four files: the
stock mix without and with padding, which differ in size, and the mixes that the size solver finds for the size of the
stock mix without padding, without and with it. A padded stock mix is also held against the unpadded one nearest to it
in size. All have the same importances and run on held-out texts that nobody looked at; ratios are paired, with 95 %
intervals from a bootstrap over chunks.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from bench_gguf_mix import export, prepare
from gemcut import exporting, mixing
from gemcut.checkpoint import open_checkpoint
from gemcut.evaluate.kld import KldSettings, kld_chunks
from gemcut.export.layout import layout_of
from gemcut.ggml.types import GgmlType
from gemcut.gguf_file import open_gguf
from rows import Line, interval, row, show, spell
from texts import unseen

STOCK = ("Q4_K_M", "Q3_K_M", "IQ3_XXS", "Q2_K", "IQ2_M", "IQ2_XXS")


def measure(model: Path, folder: Path, tokens: int, curvature_tokens: int) -> dict[str, Any]:
    base = open_checkpoint(model)
    imatrix, curved, seconds = folder / "imatrix.gguf", folder / "curvature", dict[str, float]()
    if not curved.exists():
        imatrix, curved, seconds = prepare(base, folder, curvature_tokens)
    words = exporting.GgufWords(STOCK, imatrix)
    files, _ = export(base, words, folder / "stock")
    files += export(base, replace(words, pad_experts=True), folder / "stock")[0]
    sizes = tuple(open_gguf(path).size_bytes for path in files)
    mixes, began = [], time.perf_counter()
    for pad in (False, True):
        mix = mixing.MixWords(sizes[: len(STOCK)], (), curved, folder / f"damages-{pad}.json")
        solved, found = export(base, replace(words, types=(), mix=mix, pad_experts=pad), folder / "solved")
        files += solved
        mixes.append(found)
    seconds["damages, solve and export"] = time.perf_counter() - began
    print(f"{len(files)} files written", file=sys.stderr)
    texts = unseen(model, tokens)
    chunks = kld_chunks(base, [open_gguf(path) for path in files], texts, KldSettings(threads=1))
    n, files_of, weights = len(STOCK), [], sum(prod(tensor.shape) for tensor in layout_of(base).tensors)
    for i, name in enumerate(STOCK):
        near = min(range(n), key=lambda k, size=sizes[n + i]: abs(sizes[k] - size))
        solutions = [found[i].solution for found in mixes]
        files_of.append(
            {
                "stock": name,
                "bytes": sizes[i],
                "bpw": 8 * sizes[i] / weights,
                "padded_bytes": sizes[n + i],
                "kld": [interval(chunks.mean(k * n + i)) for k in range(4)],
                "expected": [one.damage for one in solutions],
                "solved_bytes": [one.size_bytes for one in solutions],
                "least_bytes": [one.least_bytes for one in solutions],
                "stock_ratio": interval(chunks.ratio(n + i, i)),
                "near": STOCK[near],
                "near_bytes": sizes[near],
                "near_ratio": interval(chunks.ratio(n + i, near)),
                "solved_ratio": interval(chunks.ratio(3 * n + i, 2 * n + i)),
                "expected_ratio": solutions[1].damage / solutions[0].damage,
                "down": [_kinds(one.types) for one in solutions],
            }
        )
    return {"tokens": int(chunks.tokens.sum()), "chunks": len(chunks.tokens), "seconds": seconds, "files": files_of}


def _kinds(types: Mapping[str, GgmlType]) -> list[str]:
    """Types of the down-projections of the experts, layer by layer."""
    return [kind.name for name, kind in types.items() if "ffn_down_exps.weight" in name]


def lines(found: dict[str, Any]) -> Iterator[Line]:
    """For the page of figures."""
    many = f"n = {found['chunks']} chunks, {found['tokens']:,} tokens"
    for one in found["files"]:
        klds = [kld["value"] for kld in one["kld"]]
        yield row(
            f"experts of 704, padded, {one['stock']}: share of the KLD without padding",
            "",
            f"solved for {one['bytes']:,} bytes ({one['bpw']:.2f} bits): {spell(one['solved_ratio'])}, KLD "
            f"{klds[3]:.5f} against {klds[2]:.5f}, expected {one['expected_ratio']:.3f}; stock mix "
            f"{one['padded_bytes'] / one['bytes']:.3f} × as large: {spell(one['stock_ratio'])}, KLD {klds[1]:.5f} "
            f"against {klds[0]:.5f}; {one['padded_bytes'] / one['near_bytes']:.3f} × as large as {one['near']} "
            f"without: {spell(one['near_ratio'])}; {many}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tokens", type=int, default=12288)
    parser.add_argument("--curvature-tokens", type=int, default=8000)
    parser.add_argument("--work", type=Path, help="keep statistics, damages and files there, and take what is there")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(asked.model, asked.work or Path(scratch), asked.tokens, asked.curvature_tokens)
    show({"rows": list(lines(found)), "padding": found}, as_json=asked.json)


if __name__ == "__main__":
    main()
