"""What cutting attention heads costs: every selection with every heal, on held-out text; and the heal at 31B's width.

    python bench/bench_heads.py [--json] [--tokens 24576 --held-out 8192 --loo-tokens 3072] [--only heads,solve]

Heads: 1 and 2 of 8 query heads in every layer of the demo dense checkpoint. Each selection is cut without a heal, with
the recipe that was published before, and with ours; all of them are compared with the base on the same held-out
chunks, so that differences and ratios are paired. Texts that were looked at while the default was chosen (the first
`texts.LOOKED_AT` tokens of the held-out corpus) are left out.

The published recipe: W_Kᵀ = (XᵀX + λI)⁻¹ XᵀY on 1024 samples, λ = 0.01 · mean(diag XᵀX), a ridge to zero, unweighted,
layer after layer with X from the cut and refitted layers before and Y from the dense model. Here it runs on samples of
all classes and on samples of one.

Solve: the sums, the refit and the residuals of one full-attention layer of 31B (32 heads of 512, hidden 5376) on random
data, in a process of its own; VmHWM.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemcut import head_stages, surgery
from gemcut.ablate import AblateSettings, loo_bytes
from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.checkpoint.header import read_header
from gemcut.checkpoint.write import write_checkpoint
from gemcut.evaluate.chunks import KldChunks
from gemcut.evaluate.kld import KldSettings, kld_chunks
from gemcut.observe.run import observe
from gemcut.observe.settings import ObserveSettings
from gemcut.plan.heads import plan_heads
from gemcut.score.heads import HEAD_CRITERIA, HEAD_DEFAULT, rank_correlation, score_heads
from gemcut.stream.corpus import Corpus, load_corpus
from gemcut.stream.model import StreamedModel
from gemcut.surgery.edits import config_for, edits_for
from gemcut.surgery.heal.layer import Tap
from gemcut.surgery.heal.settings import HealSettings, Job, jobs_of
from gemcut.surgery.heal.stream import heal
from gemcut.types import Estimate, HeadImportance, Plan, Replace, Scores
from rows import Line, interval, load_average, row, show, spell
from texts import CALIBRATION, DEMO, unseen

SELECTIONS = ("random", "norm", "taylor", "loo", "obs")
HEALS = ("none", "card, one class", "card, mixed", "ours")
SIZES = (0.125, 0.25)
SAMPLES = 1024
DTYPE = "float32"
HIDDEN, COLUMNS = 5376, 32 * 512  # one full-attention layer of 31B
SOLVE_TOKENS, BLOCK = 2048, 1024
SOLVE_LIMIT = 12 << 30


# ---------------------------------------------------------------- texts


def samples(corpus: Corpus, classes: Iterable[str]) -> list[torch.Tensor]:
    """SAMPLES tokens, as many of each class: sequences [S] of token ids from the start of the items."""
    wanted = list(classes)
    out = []
    for i, cls in enumerate(wanted):
        room = SAMPLES * (i + 1) // len(wanted) - SAMPLES * i // len(wanted)
        for item in corpus.items:
            if item.cls == cls and room > 1:
                out.append(torch.from_numpy(np.array(item.ids[:room], np.int64)))
                room -= len(out[-1])
    return out


# ---------------------------------------------------------------- the published recipe


def published(base: Checkpoint, plan: Plan, texts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """New output projections by name, as the published recipe fits them."""
    jobs = jobs_of(base, plan)
    out = {}
    with StreamedModel.open(base, dtype=DTYPE) as model:
        dense = [model.embed(ids[None]) for ids in texts]
        cut = [one.clone() for one in dense]
        for i in range(model.n_layers):
            with model.layer(i) as module:
                linear = module.get_submodule(jobs[i].module)
                with Tap(linear) as tap:
                    target, dense = _tapped(model, module, tap, dense, 1)
                    inputs, _ = _tapped(model, module, tap, cut, 0)
                out[jobs[i].tensor] = _to_zero(jobs[i], inputs, target, linear.weight)
                with torch.no_grad():
                    linear.weight.copy_(out[jobs[i].tensor])
                cut = [model.run_layer(module, one) for one in cut]
    return out


def _tapped(
    model: StreamedModel, module: torch.nn.Module, tap: Tap, hidden: list[torch.Tensor], side: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Inputs (side 0) or outputs (1) of the projection, all sequences one after the other, and the layer's outputs."""
    rows, after = [], []
    for one in hidden:
        after.append(model.run_layer(module, one))
        rows.append(tap.take()[side])
    return torch.cat(rows), after


def _to_zero(job: Job, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    columns = torch.from_numpy(job.columns)
    kept, target = x[:, columns].double(), y.double()
    gram = kept.T @ kept
    gram.diagonal().add_(max(0.01 * float(gram.diagonal().mean()), 1e-6))
    whole = torch.zeros_like(weight)
    whole[:, columns] = torch.linalg.solve(gram, kept.T @ target).T.to(weight.dtype)
    return whole


def write_published(base: Checkpoint, plan: Plan, texts: list[torch.Tensor], out: Path) -> None:
    """The cut checkpoint with the published recipe's projections."""
    from safetensors.torch import save_file

    file = out.with_suffix(".safetensors")
    save_file({name: w.to(torch.bfloat16).contiguous() for name, w in published(base, plan, texts).items()}, file)
    edits = dict(edits_for(plan, base))
    edits |= {ref.name: Replace(file, ref) for ref in read_header(file, file.name).tensors}
    write_checkpoint(base, edits, config_for(plan, base), out)


# ---------------------------------------------------------------- all of it


class Bench:
    """Selections, heals and candidates on the demo dense checkpoint."""

    def __init__(self, root: Path, tokens: int, held_out: int, loo_tokens: int) -> None:
        self.root = root
        self.base = open_checkpoint(DEMO / "dense")
        self.calibration = load_corpus(CALIBRATION, self.base.path, max_tokens=tokens)
        self.loo_corpus = load_corpus(CALIBRATION, self.base.path, max_tokens=loo_tokens)
        self.held_out = unseen(self.base.path, held_out)
        classes = self.calibration.classes
        self.texts = {
            "card, mixed": samples(self.calibration, classes),
            "card, one class": samples(self.calibration, classes[:1]),
        }
        self.seconds: dict[str, float] = {}
        self.importance: dict[str, HeadImportance] = {}
        self.scores: dict[tuple[str, float], Scores] = {}
        self.used: list[bool] = []

    def timed(self, what: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = run()
        self.seconds[what] = round(time.perf_counter() - start, 3)
        print(f"{what}: {self.seconds[what]:.1f} s", file=sys.stderr, flush=True)
        return found

    def select(self) -> dict[tuple[str, float], Plan]:
        """Plans by selection and size."""
        base, statistics = self.base, self.root / "statistics"
        settings = ObserveSettings(dtype=DTYPE, gram_tokens=self.calibration.tokens)
        self.timed("observe", lambda: observe(base, self.calibration, statistics, settings=settings))
        corpora = {"loo": self.loo_corpus, "taylor": self.calibration}
        for method, corpus in corpora.items():
            self.importance[method] = self.timed(
                method, lambda m=method, c=corpus: head_stages.importance(base, c, m, None, dtype=DTYPE)
            )
        names = base.tensors.keys()
        shapes = {s.layer: base.family.attention(base.text_config, names, s.layer) for s in base.sites}
        plans = {}
        for name in dict.fromkeys((*SELECTIONS, HEAD_DEFAULT)):
            known = self.importance[name].values if HEAD_CRITERIA[name].measured else None
            for share in SIZES:
                count = head_stages.head_count(base, share)
                scores = self.timed(
                    f"score {name} {share:g}",
                    lambda n=name, c=count, k=known: score_heads(base, statistics, n, drop=c, importance=k),
                )
                self.scores[name, share] = scores
                plans[name, share] = plan_heads(scores, shapes, drop=share).plan
        return plans

    def candidates(self, plans: Mapping[tuple[str, float], Plan]) -> dict[tuple[str, float, str], int]:
        """Every selection, size and heal, and its candidate's number; equal cuts are one candidate. Then KL."""
        numbers: dict[tuple[object, ...], int] = {}
        where = {}
        for (name, share), plan in plans.items():
            gone = tuple(tuple(sorted(one.drop)) for _, one in sorted(plan.layers.items()))
            for how in HEALS:
                new = len(numbers)
                where[name, share, how] = numbers.setdefault((gone, how), new)
                if where[name, share, how] == new:
                    self.timed(f"{name} {share:g} {how}", lambda p=plan, h=how, n=new: self.write(p, h, n))
        return where

    def write(self, plan: Plan, how: str, number: int) -> None:
        out = self.root / f"candidate-{number}"
        if how in self.texts:
            write_published(self.base, plan, self.texts[how], out)
            return
        healed = None
        if how == "ours":
            healed = self.root / f"heal-{number}"
            report = heal(self.base, plan, self.calibration, healed, settings=HealSettings(dtype=DTYPE))
            self.used += [one.used for one in report.layers]
        surgery.cut(self.base, plan, out, healed=healed)

    def run(self) -> dict[str, Any]:
        where = self.candidates(self.select())
        opened = [open_checkpoint(self.root / f"candidate-{i}") for i in range(max(where.values()) + 1)]
        found = self.timed("kld", lambda: kld_chunks(self.base, opened, self.held_out, KldSettings(dtype=DTYPE)))
        return self.tables(where, found)

    def tables(self, where: Mapping[tuple[str, float, str], int], found: KldChunks) -> dict[str, Any]:
        """Everything as JSON."""
        cells, removed, against = [], [], []
        for (name, share, how), at in where.items():
            ours = where[HEAD_DEFAULT, share, "ours"]
            minus = {} if at == ours else {"minus_default": interval(found.difference(at, ours))}
            cells.append({"selection": name, "share": share, "heal": how, "kld": interval(found.mean(at)), **minus})
            if how == "ours":
                share_left = found.ratio(at, where[name, share, "none"])
                removed.append({"selection": name, "share": share, "removed": interval(_less(share_left))})
        for share in SIZES:
            target = where["loo", share, "card, mixed"]
            against.append({"share": share, "ratio": interval(found.ratio(where[HEAD_DEFAULT, share, "ours"], target))})
        loo = self.importance["loo"].values
        ranks = {
            name: interval(rank_correlation(s.values, loo))
            for (name, share), s in self.scores.items()
            if share == SIZES[0]
        }
        size = loo_bytes(self.base, self.loo_corpus, AblateSettings(dtype=DTYPE))
        depth = len(self.importance["loo"].layers)
        return {
            "default": HEAD_DEFAULT, "cells": cells, "removed": removed, "against_card": against, "ranks": ranks,
            "seconds": self.seconds, "loo_passes": round(size.passes / depth, 1), "layers_healed": sum(self.used),
            "layers_tried": len(self.used), "tokens": self.calibration.tokens, "loo_tokens": self.loo_corpus.tokens,
            "held_out_tokens": int(found.tokens.sum()), "chunks": len(found.tokens), "load": load_average(),
        }  # fmt: skip


def _less(one: Estimate) -> Estimate:
    """1 − x."""
    return Estimate(1 - one.value, 1 - one.high, 1 - one.low, one.n)


# ---------------------------------------------------------------- 31B's width


def solve() -> dict[str, Any]:
    """Runs in a process of its own: sums of random rows, then everything that a layer's heal does with them.

    With one ridge or with several the memory is the same: each refit gives its matrix back before the next.
    """
    from gemcut.surgery.heal.layer import fit_layer
    from gemcut.surgery.heal.solve import Moments
    from gemcut.surgery.heal.unseen import Rows

    torch.manual_seed(0)
    weight = torch.randn(HIDDEN, COLUMNS) / COLUMNS**0.5
    fit, ones = Moments.zeros(HIDDEN, COLUMNS), torch.ones(BLOCK, dtype=torch.float64)
    seconds = 0.0
    with tempfile.TemporaryDirectory() as folder:
        held_out = Rows(Path(folder), HIDDEN, COLUMNS, torch.float32, ("random",))
        for block in range(SOLVE_TOKENS // BLOCK + 1):
            x = torch.randn(BLOCK, COLUMNS)
            y = (x @ weight.T).double()
            start = time.perf_counter()
            if block:
                fit.add(x, ones, y)
                seconds += time.perf_counter() - start
            else:
                held_out.add(x, ones, y, torch.zeros(BLOCK, dtype=torch.int64))
        del x, y
        job = Job(0, "o_proj", "o_proj.weight", 32, COLUMNS // 32, tuple(range(32)), "norm")
        start = time.perf_counter()
        fit_layer(job, weight.double(), torch.bfloat16, fit=fit, inner=None, held_out=held_out, ridges=(1e-2,))
        took = time.perf_counter() - start
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {
        "columns": COLUMNS, "hidden": HIDDEN, "tokens": fit.n, "threads": torch.get_num_threads(),
        "gram_seconds": round(seconds, 1), "solve_seconds": round(took, 1), "peak_bytes": int(peak.split()[1]) * 1024,
        "load": load_average(),
    }  # fmt: skip


# ---------------------------------------------------------------- tables


def rows(found: dict[str, Any]) -> list[Line]:
    """Lines of docs/bench.md."""
    out: list[Line] = []
    if "heads" in found:
        out += _head_rows(found["heads"])
    if "solve" in found:
        s = found["solve"]
        out.append(
            row(
                f"heal of one full-attention layer of 31B: {s['columns']} columns, hidden {s['hidden']}",
                f"≤ {SOLVE_LIMIT / 2**30:.0f} GiB",
                f"{s['peak_bytes'] / 2**30:.2f} GiB; sums of {s['tokens']} tokens {s['gram_seconds']} s, solve "
                f"and residuals {s['solve_seconds']} s (threads: {s['threads']}, load average {s['load']}); "
                "random data, all columns kept, n = 1",
            )
        )
    return out


def _head_rows(r: Mapping[str, Any]) -> list[Line]:
    n = f"{r['held_out_tokens']} held-out tokens, n = {r['chunks']} items"
    names = list(dict.fromkeys(cell["selection"] for cell in r["cells"]))
    table = {(c["selection"], c["share"], c["heal"]): c for c in r["cells"]}
    out = []
    for share in SIZES:
        for name in names:
            cells = [f"{how} {spell(table[name, share, how]['kld'], '.4f')}" for how in HEALS]
            out.append(
                row(
                    f"KLD, {share:.1%} of heads in all layers by `{name}`" + " (default)" * (name == r["default"]),
                    "",
                    f"{'; '.join(cells)}; {n}",
                )
            )
    best = r["default"]
    for share in SIZES:
        parts = [
            f"`{one['selection']}` {spell(one['removed'], '.1%')}" for one in r["removed"] if one["share"] == share
        ]
        out.append(
            row(
                f"damage that our heal removes of each selection's own, {share:.1%} of heads",
                "≥ 60 %",
                f"{'; '.join(parts)}; healed on {r['tokens']} tokens; {n}",
            )
        )
    for one in r["against_card"]:
        ratio = one["ratio"]
        out.append(
            row(
                f"`{best}` and our heal against `loo` and the card's recipe on mixed samples, {one['share']:.1%}",
                "≤ 0.5 ×",
                f"{spell(ratio, '.2f', ' ×')}, paired; {n}",
            )
        )
    for share in SIZES:
        others = [c for c in r["cells"] if c["share"] == share and "minus_default" in c]
        if others:
            least = min(others, key=lambda c: c["minus_default"]["value"])
            d = least["minus_default"]
            out.append(
                row(
                    f"the best other combination minus `{r['default']}` and our heal, {share:.1%}",
                    "≥ 0",
                    f"{spell(d, '+.4f')} nats (`{least['selection']}`, {least['heal']}), paired; {n}",
                )
            )
    ranks = "; ".join(f"`{k}` {spell(v, '.2f')}" for k, v in r["ranks"].items() if k != "loo")
    out.append(row("rank correlation with leave-one-out", "", f"{ranks}; n = 12 layers"))
    out.append(row("cost of a selection", "default ≤ 3 forward passes", _costs(r)))
    return out


def _costs(r: Mapping[str, Any]) -> str:
    s = r["seconds"]
    solves = {name: s[f"score {name} {SIZES[0]:g}"] for name in ("norm", "obs")}
    return (
        f"observe 1 pass, {s['observe']:.0f} s on {r['tokens']} tokens; then `norm` {solves['norm']:.1f} s, `obs` "
        f"{solves['obs']:.1f} s; `taylor` 1 forward and 1 backward pass, {s['taylor']:.0f} s on {r['tokens']} tokens; "
        f"`loo` {r['loo_passes']:.0f} passes, {s['loo']:.0f} s on {r['loo_tokens']} tokens; "
        f"load average {r['load']}, n = 1"
    )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tokens", type=int, default=24576, help="calibration tokens")
    parser.add_argument("--held-out", type=int, default=8192)
    parser.add_argument("--loo-tokens", type=int, default=3072)
    parser.add_argument("--only", default="heads,solve")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(solve()))
        return 0
    found: dict[str, Any] = {}
    if "heads" in args.only:
        with tempfile.TemporaryDirectory() as temporary:
            found["heads"] = Bench(Path(temporary), args.tokens, args.held_out, args.loo_tokens).run()
    if "solve" in args.only:
        done = subprocess.run([sys.executable, __file__, "--child"], check=True, stdout=subprocess.PIPE, text=True)
        found["solve"] = json.loads(done.stdout.splitlines()[-1])
    found["rows"] = rows(found)
    show(found, as_json=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
