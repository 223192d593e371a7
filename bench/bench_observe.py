"""What observing costs on top of a plain forward, and how much memory it takes, at the geometry of 26B-A4B.

    python bench/bench_observe.py [--json] [--tokens 8192 --pairs 5] [--only cost,memory]

Cost: one sliding and one full-attention layer in bfloat16, the same tokens, through the layer alone and with every
statistic, in turn. Plain is the layer as transformers runs it by default (experts `grouped_mm`); a second figure is
against our own experts without a recorder, which may be the faster forward on a CPU. Reading weights and
hidden states is left out. A Gram matrix takes the share of tokens that it would take in a run of 400,000 tokens; its
product runs over blocks of 2048 rows, and a short run pays its share of one whole block. What happens once per layer
(allocating, mirroring and writing the sums) is timed apart.

Memory: `observe` in a process of its own on checkpoints of 2 and of 6 layers; VmHWM, medians. Needs 14 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import synthetic
from rows import Line, row, show

RUN_TOKENS = 400_000
SLIDING, FULL = 25, 5  # of the 30 layers of 26B-A4B
COST_LIMIT = 1.10
ITEM_TOKENS = 2048
MEMORY_RUNS = 3


def corpus(tokens: int) -> Any:
    """Random ids in items of ITEM_TOKENS, two classes."""
    import numpy as np

    from gemcut.stream.corpus import Corpus, Row

    rng = np.random.default_rng(0)
    rows = tuple(
        Row(f"item {i}", "ab"[i % 2], np.concatenate([[2], rng.integers(10, 4000, ITEM_TOKENS - 1)]), 1.0)
        for i in range(tokens // ITEM_TOKENS)
    )
    return Corpus(rows, "0" * 64, "0" * 64, "0" * 64, "text: added", ITEM_TOKENS, 0, ("a", "b"))


class Cost:
    """One layer of one checkpoint, plain and observed."""

    def __init__(self, folder: Path, layer: int, tokens: int) -> None:
        from gemcut.checkpoint.read import open_checkpoint
        from gemcut.observe.batches import lay_out
        from gemcut.observe.settings import ObserveSettings
        from gemcut.stream.model import StreamedModel

        checkpoint = open_checkpoint(folder)
        self.index = layer
        self.plain_model = StreamedModel.open(checkpoint, experts="recording")
        self.layout = lay_out(corpus(tokens), ObserveSettings().batch_tokens, 4096)
        self.hidden = [self.plain_model.embed(self.layout.ids(batch)) for batch in self.layout.batches]
        self.width = int(checkpoint.ref(f"model.language_model.layers.{layer}.self_attn.o_proj.weight").shape[1])
        self.gram_share = ObserveSettings().gram_take(self.width, RUN_TOKENS) / RUN_TOKENS
        self.settings = ObserveSettings(gram_tokens=max(1, round(self.gram_share * self.layout.tokens)))

    def plain(self, module: Any) -> float:
        start = time.perf_counter()
        for hidden in self.hidden:
            self.plain_model.run_layer(module, hidden)
        return time.perf_counter() - start

    def observed(self, module: Any, once: dict[str, float], out: Path) -> float:
        from gemcut.observe.folder import save_layer
        from gemcut.observe.layer import LayerObserver

        begin = time.perf_counter()
        observer = LayerObserver(self.index, module, self.layout, self.settings, 1e-6, self.plain_model.device)
        with observer:
            start = time.perf_counter()
            for batch, hidden in zip(self.layout.batches, self.hidden, strict=True):
                observer.start(batch)
                observer.finish(self.plain_model.run_layer(module, hidden))
            seconds = time.perf_counter() - start
        seconds += self.gram_block_share(observer)
        done = time.perf_counter()
        save_layer(out, self.index, observer.tensors(), {})
        once["seconds"] = start - begin + time.perf_counter() - done
        return seconds

    def gram_block_share(self, observer: Any) -> float:
        """Seconds of the product of the rows that are staged, at the speed of a whole block."""
        gram = observer._gram
        total = 0.0
        for s in range(gram.splits):
            staged, rows = gram._filled[s], gram._rows[s]
            rows[staged:] = 0.0  # zeros change no sum
            gram._filled[s] = len(rows)
            start = time.perf_counter()
            gram._flush(s)
            total += (time.perf_counter() - start) * staged / len(rows)
        return total

    def run(self, pairs: int) -> dict[str, Any]:
        """Alternating pairs behind one of each that does not count."""
        times: dict[str, list[float]] = {"plain": [], "bare": [], "observed": []}
        once: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as temporary, self.plain_model.layer(self.index) as module:
            out = Path(temporary)
            run = {
                "plain": lambda: self.stock(module),
                "bare": lambda: self.plain(module),
                "observed": lambda: self.observed(module, once, out),
            }
            for warm in run.values():
                warm()
            for pair in range(pairs):
                for what in list(run) if pair % 2 == 0 else list(run)[::-1]:
                    times[what].append(run[what]())
        return {
            "layer": self.index, "width": self.width, "tokens": self.layout.tokens, "gram_share": self.gram_share,
            **{f"{what}_seconds": [round(t, 3) for t in seconds] for what, seconds in times.items()},
            "once_seconds": round(once["seconds"], 3),
        }  # fmt: skip

    def stock(self, module: Any) -> float:
        """The same layer with the experts implementation that transformers takes by default."""
        from gemcut.stream.experts import RECORDING

        config = module.experts.config
        config._experts_implementation = "grouped_mm"
        try:
            return self.plain(module)
        finally:
            config._experts_implementation = RECORDING


def memory(folder: Path, tokens: int, out: Path) -> dict[str, Any]:
    """Runs in a process of its own."""
    from gemcut.checkpoint.read import open_checkpoint
    from gemcut.observe.memory import observe_memory_bytes
    from gemcut.observe.run import observe
    from gemcut.observe.settings import ObserveSettings

    checkpoint = open_checkpoint(folder)
    settings = ObserveSettings()
    start = time.perf_counter()
    observe(checkpoint, corpus(tokens), out, settings=settings)
    seconds = time.perf_counter() - start
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    per_layer = [
        sum(ref.size_bytes for name, ref in checkpoint.tensors.items() if f".layers.{i}." in name)
        for i in range(int(checkpoint.text_config["num_hidden_layers"]))  # type: ignore[arg-type]
    ]
    return {
        "layers": len(per_layer), "peak_bytes": int(peak.split()[1]) * 1024, "layer_bytes": max(per_layer),
        "estimate_bytes": observe_memory_bytes(checkpoint, settings), "seconds": round(seconds, 1), "tokens": tokens,
    }  # fmt: skip


def ratios(sliding: dict[str, Any], full: dict[str, Any], what: str) -> list[float]:
    """Observed against `what`, one ratio for each alternating run, 25 sliding layers and 5 full ones."""
    series = [
        sliding["observed_seconds"],
        full["observed_seconds"],
        sliding[f"{what}_seconds"],
        full[f"{what}_seconds"],
    ]
    return [(SLIDING * a + FULL * b) / (SLIDING * c + FULL * d) for a, b, c, d in zip(*series, strict=True)]


def rows(found: dict[str, Any]) -> list[Line]:
    """Lines of docs/bench.md."""
    out = []
    if "cost" in found:
        s, f = found["cost"]["sliding"], found["cost"]["full"]
        against = {what: ratios(s, f, what) for what in ("plain", "bare")}
        found["cost_ratio"] = round(statistics.median(against["plain"]), 4)
        conditions = (
            f"sliding and full layers weighed 25 to 5; {s['tokens']} tokens, bf16, Gram on {s['gram_share']:.1%} and "
            f"{f['gram_share']:.1%} of them as in a run of 0.4 M tokens; weights and hidden states in memory"
        )
        for what, words, target in (
            ("plain", "a plain forward as transformers runs it by default", f"≤ {COST_LIMIT:.2f} ×"),
            ("bare", "our own experts without a recorder", ""),
        ):
            seen = against[what]
            out.append(
                row(
                    f"compute of `observe`, every statistic on, against {words}",
                    target,
                    f"{statistics.median(seen):.3f} × ({min(seen):.3f} to {max(seen):.3f}, "
                    f"n = {len(seen)} alternating runs); {conditions}",
                )
            )
        forward = (SLIDING * s["plain_seconds"][0] + FULL * f["plain_seconds"][0]) / 30 / s["tokens"] * RUN_TOKENS
        once = (SLIDING * s["once_seconds"] + FULL * f["once_seconds"]) / 30
        out.append(
            row(
                "once per layer: allocate, mirror and write the sums",
                "",
                f"{once:.1f} s a layer = {once / forward:.1%} of its forward in a run of 0.4 M tokens; n = 1",
            )
        )
    if "memory" in found:
        two, six = found["memory"]
        limit = two["layer_bytes"] + (2 << 30)
        peaks = two["peaks"] + six["peaks"]
        out.append(
            row(
                "peak memory of `observe`, 2 and 6 layers",
                f"≤ one layer + 2 GiB = {limit / 2**30:.2f} GiB, equal within 5 %",
                f"{two['peak_bytes'] / 2**30:.2f} and {six['peak_bytes'] / 2**30:.2f} GiB "
                f"(difference {abs(six['peak_bytes'] / two['peak_bytes'] - 1):.1%}; medians of n = {MEMORY_RUNS}, "
                f"all in {min(peaks) / 2**30:.2f} to {max(peaks) / 2**30:.2f}; "
                f"estimated beforehand {six['estimate_bytes'] / 2**30:.2f} GiB); {six['tokens']} tokens",
            )
        )
    return out


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", default="cost,memory")
    parser.add_argument("--keep", type=Path, help="where checkpoints are kept between runs")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(memory(args.child[0], args.tokens, args.child[1])))
        return 0
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = args.keep or Path(temporary)
        made = {}
        for layers in (2, 6) if "memory" in args.only else (2,):
            made[layers] = root / f"layers-{layers}"
            if not made[layers].exists():
                synthetic.write(made[layers], layers=layers)
        if "cost" in args.only:
            found["cost"] = {
                name: Cost(made[2], layer, args.tokens).run(args.pairs) for name, layer in (("sliding", 0), ("full", 1))
            }
        if "memory" in args.only:
            found["memory"] = []
            for layers, folder in made.items():
                command = [sys.executable, __file__, "--tokens", str(args.tokens), "--child", str(folder)]
                each = []
                for repeat in range(MEMORY_RUNS):
                    stats = Path(temporary) / f"statistics-{layers}-{repeat}"
                    done = subprocess.run([*command, str(stats)], check=True, stdout=subprocess.PIPE, text=True)
                    each.append(json.loads(done.stdout.splitlines()[-1]))
                    shutil.rmtree(stats)
                each.sort(key=lambda run: run["peak_bytes"])
                peaks = [run["peak_bytes"] for run in each]
                found["memory"].append({**each[len(each) // 2], "peaks": peaks})
    found["rows"] = rows(found)
    show(found, as_json=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
