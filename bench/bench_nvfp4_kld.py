"""What NVFP4 costs: KLD from BF16 for every scheme, targets and way to choose block scales, on held-out text.

    python bench/bench_nvfp4_kld.py [scales|cache] [--json] [--only dense,moe] [--tokens 16384] [--dtype float32]

`scales`: every scheme, targets and block scales. `cache`: the ways to scale an FP8 cache, with the default scales.

Statistics come from the calibration corpus; the demo trunks are exported in every way and compared with themselves in
one pass, streamed, on held-out items that nobody looked at. Ratios are paired by item, with 95 % intervals from a
bootstrap over items. In float32, so that files differ by their numbers and not by what 16-bit sums make of them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.evaluate.kld import KldSettings, kld_chunks
from gemcut.export.nvfp4.run import Settings, prepare, write_nvfp4
from gemcut.nvfp4.choices import KV_CACHES, METHODS, SCHEMES, ActivationRule, KvCache, Method, Scheme, Targets
from gemcut.observe.run import observe
from gemcut.stream.corpus import load_corpus
from rows import Line, interval, row, show, spell
from texts import CALIBRATION, DEMO, unseen

TARGETS: Mapping[str, tuple[Targets, ...]] = {"dense": ("mlp", "all"), "moe": ("mlp", "mlp+experts", "all")}
DEFAULT: Method = "weighted"


@dataclass(frozen=True, slots=True)
class Way:
    """One export."""

    scheme: Scheme
    targets: Targets
    scales: Method
    activations: ActivationRule = "max"
    kv: KvCache = "none"

    @property
    def name(self) -> str:
        return f"{self.scheme}-{self.targets}-{self.scales}-{self.activations}-{self.kv}"


def ways(part: str, name: str) -> list[Way]:
    """Every way; for W4A4 also the other rule for activations."""
    if part == "cache":
        return [Way("NVFP4A16", TARGETS[name][-2], DEFAULT, kv=kv) for kv in KV_CACHES]
    found = [Way(*each) for each in itertools.product(SCHEMES, TARGETS[name], METHODS)]
    return [*found, *(Way("NVFP4", targets, DEFAULT, "headroom") for targets in TARGETS[name])]


def exported(base: Checkpoint, way: Way, stats: Path, out: Path) -> tuple[Checkpoint, float]:
    """The folder, and the mean relative error of its weights."""
    settings = Settings(way.scheme, way.targets, way.scales, activations=way.activations, kv=way.kv)
    report = write_nvfp4(prepare(base, settings, stats), out)
    return open_checkpoint(out), report.relative_error


def measure(part: str, name: str, tokens: int, dtype: str) -> dict[str, Any]:
    """One trunk."""
    base = open_checkpoint(DEMO / name)
    every = ways(part, name)
    with tempfile.TemporaryDirectory() as folder:
        stats = observe(base, load_corpus(CALIBRATION, base.path), Path(folder) / "stats")
        made = [exported(base, way, stats, Path(folder) / way.name) for way in every]
        print(f"{name}: {len(made)} exports", file=sys.stderr, flush=True)
        found = kld_chunks(base, [one for one, _ in made], unseen(base.path, tokens), KldSettings(dtype=dtype))
        rows = []
        for i, way in enumerate(every):
            default = every.index(Way(way.scheme, way.targets, DEFAULT))
            rows.append(
                {
                    "scheme": way.scheme,
                    "targets": way.targets,
                    "scales": way.scales,
                    "activations": way.activations if way.scheme == "NVFP4" else "",
                    "kv": way.kv,
                    "size_ratio": made[i][0].size_bytes / base.size_bytes,
                    "weight_error": made[i][1],
                    "kld": interval(found.mean(i)),
                    "of_default": interval(found.ratio(i, default)),
                }
            )
    return {"tokens": int(found.tokens.sum()), "chunks": len(found.tokens), "dtype": dtype, "ways": rows}


def lines(found: Mapping[str, Any]) -> Iterator[Line]:
    """Lines for the page of figures: one for every scheme and targets of a trunk."""
    for name, one in found.items():
        for scheme, targets in itertools.product(SCHEMES, TARGETS[name]):
            mine = [each for each in one["ways"] if (each["scheme"], each["targets"]) == (scheme, targets)]
            default = next(each for each in mine if (each["scales"], each["activations"]) == (DEFAULT, _rule(scheme)))
            others = [
                f"{each['scales'] if each['activations'] != 'headroom' else 'headroom'} {spell(each['of_default'])}"
                for each in mine
                if each is not default
            ]
            yield row(
                f"demo/{name}, {scheme}, {targets}: KLD from BF16 in nats, and that of other choices as a share of it",
                "no interval below 1",
                f"{spell(default['kld'], '.5f')} ({DEFAULT}); {', '.join(others)}; n = {one['chunks']} items, "
                f"{one['tokens']:,} tokens, {one['dtype']}",
            )


def lines_of_cache(found: Mapping[str, Any]) -> Iterator[Line]:
    """Lines for the page of figures: one for a trunk."""
    for name, one in found.items():
        without, *others = one["ways"]
        said = ", ".join(f"{each['kv']} {spell(each['of_default'], '.4f')}" for each in others)
        yield row(
            f"demo/{name}, {without['scheme']}, {without['targets']}: KLD with an FP8 cache as a share of that without",
            "",
            f"{said}; {spell(without['kld'], '.5f')} nats without; n = {one['chunks']} items, {one['tokens']:,} tokens",
        )


def _rule(scheme: Scheme) -> str:
    return "max" if scheme == "NVFP4" else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("scales", "cache"), default="scales")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="dense,moe")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: measure(options.part, name, options.tokens, options.dtype) for name in options.only.split(",")}
    told = lines_of_cache(found) if options.part == "cache" else lines(found)
    show({"rows": list(told), "trunks": found}, as_json=options.json)


if __name__ == "__main__":
    main()
