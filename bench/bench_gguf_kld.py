"""KL divergence of GGUF files: ours against llama-perplexity's on the same chunks, tokens and scored positions.

    python bench/bench_gguf_kld.py TOOLS BASE.gguf CANDIDATE.gguf… [--text FILE] [--context 512] [--chunks 24] [--json]

TOOLS is a folder with a built llama-perplexity. Its rules: the text is cut into runs of `context` tokens that do not
overlap, the first token of each is replaced by BOS, and predictions from position context/2 on are scored. Its base
logits go to disk in 16 bits, which is most of the difference. Token ids are read from that file, so that both score the
very same positions. Give a BASE in F32: with one in BF16 the two builds round activations in other places, which shows
(1 %) where a candidate is as near as Q8_0. Target: mean and median within 1 %.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from gemcut.evaluate.kld import KldSettings, kld
from gemcut.gguf_file.header import GgufFile, open_gguf
from gemcut.stream.corpus import Corpus, Row
from gemcut.stream.corpus_file import read_entries

HELD_OUT = Path(__file__).resolve().parent.parent / "demo" / "corpus" / "heldout.jsonl"
ATTEMPTS = 4
LINES = {
    "mean": r"Mean +KLD: +(\S+) ±",
    "median": r"Median +KLD: +(\S+)",
    "p99": r"99\.0% +KLD: +(\S+)",
    "same_top": r"Same top p: +(\S+) ±",
    "ln_ppl_ratio": r"Mean ln\(PPL\(Q\)/PPL\(base\)\) +: +(\S+) ±",
}


def held_out_text(out: Path) -> Path:
    """Every text of the held-out corpus, without chat markers, a blank line between."""
    parts = []
    for entry in read_entries(HELD_OUT):
        messages = entry.record.messages
        parts.append(entry.record.text or "\n".join(str(m.content) for m in messages or ()))
    out.write_text("\n\n".join(parts))
    return out


def tool(binary: Path, arguments: list[str]) -> str:
    done = subprocess.run([str(binary), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{binary.name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def tokens_of(logits: Path, context: int) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """int32 [chunks, context] from the head of a llama-perplexity logits file."""
    with open(logits, "rb") as f:
        magic, n_ctx, _, chunks = struct.unpack("=8s3i", f.read(20))
        if magic != b"_logits_" or n_ctx != context:
            sys.exit(f"{logits.name}: no logits of context {context}")
        return np.frombuffer(f.read(4 * chunks * n_ctx), np.int32).reshape(chunks, n_ctx)


def corpus_of(tokens: np.ndarray[tuple[int, int], np.dtype[np.int32]], bos: int) -> Corpus:
    """One item per chunk, its first token replaced as the tool does."""
    ids = tokens.astype(np.int64)
    ids[:, 0] = bos
    items = tuple(Row(f"chunk-{i:04d}", "text", row, 1.0) for i, row in enumerate(ids))
    return Corpus(items, "", "", "", "replaced", tokens.shape[1], 0, ("text",))


def theirs(binary: Path, logits: Path, candidate: Path, shared: list[str]) -> dict[str, float]:
    """Its summary. On a loaded machine the tool can end, with code 0, before its log thread has written that."""
    arguments = ["-m", str(candidate), "--kl-divergence-base", str(logits), "--kl-divergence", *shared]
    for _ in range(ATTEMPTS):
        said = tool(binary, arguments)
        matches = {key: re.search(pattern, said) for key, pattern in LINES.items()}
        found = {key: float(match[1]) for key, match in matches.items() if match is not None}
        if len(found) == len(LINES):
            return {**found, "same_top": found["same_top"] / 100}
    sys.exit(f"{binary.name} said no summary:\n{said[-2000:]}")


def measure(tools: Path, base: GgufFile, candidates: list[GgufFile], options: argparse.Namespace) -> dict[str, Any]:
    binary = tools / "llama-perplexity"
    with tempfile.TemporaryDirectory() as folder:
        text = options.text or held_out_text(Path(folder) / "text.txt")
        logits = Path(folder) / "base.logits"
        shared = ["-c", str(options.context), "-t", str(options.threads), "--no-repack"]
        shared += ["--chunks", str(options.chunks)]
        begin = time.perf_counter()
        tool(binary, ["-m", str(base.path), "-f", str(text), "--kl-divergence-base", str(logits), *shared])
        reference = [theirs(binary, logits, one.path, shared) for one in candidates]
        their_seconds = time.perf_counter() - begin
        bos = base.value("tokenizer.ggml.bos_token_id")
        assert isinstance(bos, int)
        corpus = corpus_of(tokens_of(logits, options.context), bos)
        their_bytes = logits.stat().st_size
    begin = time.perf_counter()
    settings = KldSettings(threads=options.threads, context_tokens=options.context // 2)
    ours = kld(base, candidates, corpus, settings)
    our_seconds = time.perf_counter() - begin
    rows = []
    for result, other in zip(ours, reference, strict=True):
        row = result.rows[-1]
        mine = {key: getattr(row, key).value for key in LINES}
        rows.append(
            {
                "candidate": result.candidate,
                "tokens": row.tokens,
                "chunks": result.chunks,
                "ours": mine,
                "theirs": other,
                "mean_difference": mine["mean"] / other["mean"] - 1,
                "median_difference": mine["median"] / other["median"] - 1,
                "interval": [row.mean.low, row.mean.high],
            }
        )
    return {
        "context": options.context,
        "rows": rows,
        "our_seconds": our_seconds,
        "their_seconds": their_seconds,
        "their_logits_bytes": their_bytes,
        "our_logits_bytes": 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("candidates", type=Path, nargs="+")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=24)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.tools, open_gguf(options.base), [open_gguf(p) for p in options.candidates], options)
    if options.json:
        print(json.dumps(found))
        return
    for row in found["rows"]:
        mine, other = row["ours"], row["theirs"]
        print(f"{row['candidate']}: {row['tokens']} tokens, n = {row['chunks']} chunks")
        for key in LINES:
            print(f"  {key:13} ours {mine[key]:.6f}  theirs {other[key]:.6f}")
        print(f"  mean {100 * row['mean_difference']:+.2f} %, median {100 * row['median_difference']:+.2f} %")
    print(f"ours {found['our_seconds']:.1f} s, theirs {found['their_seconds']:.1f} s and")
    print(f"  {found['their_logits_bytes']} bytes of logits on disk (ours 0)")


if __name__ == "__main__":
    main()
