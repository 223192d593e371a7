"""Dropping experts against masking the router of the base: the same logits, to the bit.

    python bench/bench_mask.py [--json] [--keep 16] [--items 12]

Both models are loaded by stock transformers in float32; in the base, the dropped experts' router logits are set to
minus infinity by a hook on `router.proj`. A softmax is a sum, and a sum of floats depends on its order: the base's
experts are sorted first, the kept ones in front, so that both sums add the same numbers in the same order. The same
comparison with the experts as they are stored is printed beside it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from gemcut import models, records, shipped, surgery
from gemcut.checkpoint import open_checkpoint
from gemcut.plan import plan_experts
from gemcut.stream.corpus import load_corpus
from gemcut.types import Plan, Scores
from rows import Line, row, show


def random_plan(keep: int) -> Plan:
    """A plan of random scores for the demo mixture of experts: what is dropped does not matter here."""
    import numpy as np

    base = models.open_model("demo:moe")
    sites = [site for site in base.sites if site.kind == "experts"]
    values = np.random.default_rng(0).random((len(sites), sites[0].units))
    layers = tuple(site.layer for site in sites)
    scores = Scores("random", {"seed": 0}, "experts", layers, values, base.fingerprint, "", "")
    return plan_experts(scores, keep).plan


def mask_router(model: torch.nn.Module, plan: Plan, *, kept_first: bool) -> None:
    """Set the dropped experts' router logits to minus infinity, layer by layer; `kept_first` sorts the experts."""
    for layer, module in enumerate(model.get_decoder().layers):  # type: ignore[operator]
        dropped = torch.zeros(plan.units, dtype=torch.bool)
        dropped[list(plan.layers[layer].drop)] = True
        if kept_first:
            order = torch.argsort(dropped.int(), stable=True)
            for tensor in (
                module.experts.gate_up_proj, module.experts.down_proj,
                module.router.proj.weight, module.router.per_expert_scale,
            ):  # fmt: skip
                tensor.copy_(tensor[order].clone())
            dropped = dropped[order]
        module.router.proj.register_forward_hook(
            lambda _module, _args, out, dropped=dropped: out.masked_fill(dropped, -torch.inf)
        )


@torch.no_grad()
def measure(keep: int, items: int) -> dict[str, object]:
    """Largest absolute difference of any logit, over whole held-out items of every class."""
    base = models.open_model("demo:moe")
    plan = random_plan(keep)
    corpus = load_corpus(shipped.corpus_path("demo:heldout"), base.path)
    rows = sorted(corpus.items, key=lambda row: row.id)[:: max(1, len(corpus.items) // items)][:items]
    with tempfile.TemporaryDirectory() as temporary:
        plan_file, out = Path(temporary) / "plan.json", Path(temporary) / "cut"
        records.save_plan(plan, plan_file)
        surgery.cut(base, records.load_plan(plan_file), out)
        assert open_checkpoint(out).text_config["num_experts"] == keep
        cut = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, experts_implementation="eager").eval()
        worst = {}
        for kept_first in (True, False):
            whole = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32, experts_implementation="eager")
            mask_router(whole.eval(), plan, kept_first=kept_first)
            worst[kept_first] = max(
                float((cut(ids).logits - whole(ids).logits).abs().max())
                for ids in (torch.tensor(row.ids)[None] for row in rows)
            )
    return {
        "max_abs_logit_difference": worst[True], "as_stored": worst[False], "keep": keep, "units": plan.units,
        "tokens": sum(len(row.ids) for row in rows), "items": len(rows), "dtype": "float32",
    }  # fmt: skip


def rows(r: dict[str, object]) -> list[Line]:
    """Lines of docs/bench.md."""
    n = f"n = {r['tokens']} tokens of {r['items']} items, demo MoE {r['units']} → {r['keep']}, {r['dtype']}, stock "
    n += f"transformers, kept experts in front in both; {r['as_stored']:.1e} with the base's experts in stored order, "
    n += "where its softmax adds the same numbers in another order"
    measured = f"{r['max_abs_logit_difference']}; {n}"
    return [row("drop against router-masked base", "max \\|Δlogit\\| = 0.0", measured)]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=int, default=16)
    parser.add_argument("--items", type=int, default=12)
    args = parser.parse_args()
    found = measure(args.keep, args.items)
    show({**found, "rows": rows(found)}, as_json=args.json)
    return 0 if found["max_abs_logit_difference"] == 0.0 else 1


if __name__ == "__main__":
    sys.exit(main())
