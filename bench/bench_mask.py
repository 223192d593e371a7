"""Dropping experts against masking the router of the base: the same logits, to the bit.

    python bench/bench_mask.py [--json] [--keep 16] [--items 12]

Both models are loaded by stock transformers in float32; in the base, the dropped experts' router logits are set to
minus infinity by a hook on `router.proj`.
"""

from __future__ import annotations

import argparse
import json
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


def random_plan(keep: int) -> Plan:
    """A plan of random scores for the demo mixture of experts: what is dropped does not matter here."""
    import numpy as np

    base = models.open_model("demo:moe")
    sites = [site for site in base.sites if site.kind == "experts"]
    values = np.random.default_rng(0).random((len(sites), sites[0].units))
    layers = tuple(site.layer for site in sites)
    scores = Scores("random", {"seed": 0}, "experts", layers, values, base.fingerprint, "", "")
    return plan_experts(scores, keep).plan


def mask_router(model: torch.nn.Module, plan: Plan) -> None:
    """Set the dropped experts' router logits to minus infinity, layer by layer."""
    for layer, module in enumerate(model.get_decoder().layers):  # type: ignore[operator]
        dropped = torch.zeros(plan.units, dtype=torch.bool)
        dropped[list(plan.layers[layer].drop)] = True
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
        whole = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32, experts_implementation="eager")
        whole.eval()
        mask_router(whole, plan)
        worst, tokens = 0.0, 0
        for row in rows:
            ids = torch.tensor(row.ids)[None]
            worst = max(worst, float((cut(ids).logits - whole(ids).logits).abs().max()))
            tokens += ids.numel()
    return {"max_abs_logit_difference": worst, "tokens": tokens, "items": len(rows), "keep": keep, "dtype": "float32"}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=int, default=16)
    parser.add_argument("--items", type=int, default=12)
    args = parser.parse_args()
    found = measure(args.keep, args.items)
    worst = found["max_abs_logit_difference"]
    text = f"max |Δlogit| = {worst} over {found['tokens']} tokens of {found['items']} items"
    print(json.dumps(found, indent=2) if args.json else text)
    return 0 if worst == 0.0 else 1


if __name__ == "__main__":
    sys.exit(main())
