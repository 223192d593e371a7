"""A demo mixture with experts as wide as 26B-A4B's: 704, which no block of 256 divides.

    python bench/wide_experts.py --rows ROWS --out FOLDER [--steps 160]

ROWS is what `demo.train.text` writes. Everything but the experts starts as demo/moe; each of the 12 experts is eleven
of its 32 side by side, and two answer a token instead of four. Then all of it is trained on. 90 % of the weights are
experts, as in 26B-A4B.
"""

# torch leaves its optimizers and autograd entry points without types
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from demo.train import export, trunk  # noqa: E402
from demo.train.architecture import MOE, PREFIX, Shape, tensors  # noqa: E402
from demo.train.train import BALANCE, Rows  # noqa: E402

WIDE = Shape("wide", 6, 4, 2, 1, 64, 128, 160, experts=12, top_k=2, expert_width=11 * MOE.expert_width, shards=3)
STEPS = 160
RATE = 1e-3


def start(demo: Path, seed: int) -> dict[str, Tensor]:
    """Float32 values: demo/moe's, experts and routers joined from consecutive elevens of a shuffle of its experts."""
    values = {}
    for file in sorted(demo.glob("model-*.safetensors")):
        with safe_open(file, "pt") as read:
            values |= {name.removeprefix(PREFIX): read.get_tensor(name).float() for name in read.keys()}  # noqa: SIM118
    generator = torch.Generator().manual_seed(seed)
    each = WIDE.expert_width // MOE.expert_width
    for layer in range(WIDE.layers):
        base = f"layers.{layer}."
        order = torch.randperm(MOE.experts, generator=generator)
        members = order[torch.arange(WIDE.experts * each) % MOE.experts].view(WIDE.experts, each)
        gate, up = values[f"{base}experts.gate_up_proj"][members].chunk(2, 2)  # each [E, 11, I, H]
        joined = torch.cat([gate.flatten(1, 2), up.flatten(1, 2)], 1)
        values[f"{base}experts.gate_up_proj"] = joined
        down = values[f"{base}experts.down_proj"][members]  # [E, 11, H, I]
        values[f"{base}experts.down_proj"] = down.transpose(1, 2).flatten(2)
        router = values[f"{base}router.proj.weight"][members].mean(1)
        values[f"{base}router.proj.weight"] = router + 0.02 * torch.randn(router.shape, generator=generator)
        values[f"{base}router.per_expert_scale"] = torch.ones(WIDE.experts)
    wanted = {name: size for name, (size, _) in tensors(WIDE).items()}
    if {name: tuple(value.shape) for name, value in values.items()} != wanted:
        raise ValueError("demo/moe and its architecture disagree")
    return {name: values[name] for name in wanted}


def train(rows: Path, out: Path, steps: int, seed: int = 1) -> None:
    """Train on and write a Hugging Face folder, with the log beside the weights.

    Every second row of the demo's batches (8 of 512 tokens); Adam with 1e-3 for experts and routers and a quarter of it
    for the rest, linearly down to 2 %.
    """
    torch.manual_seed(seed)
    weights = {name: value.requires_grad_() for name, value in start(ROOT / "demo" / "moe", seed).items()}
    new = [value for name, value in weights.items() if "experts." in name or "router.proj" in name]
    rest = [value for name, value in weights.items() if not ("experts." in name or "router.proj" in name)]
    groups = [{"params": new, "lr": RATE}, {"params": rest, "lr": RATE / 4}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, max(0.02, 1 - step / steps))
    )
    data, held = Rows(rows, "train", seed), Rows(rows, "heldout", seed)
    began, log = time.monotonic(), []
    for step in range(steps):
        ids, target = (part[::2].contiguous() for part in data.batch(step))
        found = trunk.forward(WIDE, weights, ids, target)
        (found.loss + BALANCE * found.balance).backward()
        torch.nn.utils.clip_grad_norm_([*new, *rest], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            share = found.routed / found.routed.sum(-1, keepdim=True)
            log.append({
                "step": step + 1, "tokens": (step + 1) * ids.numel(), "loss": round(float(found.loss.detach()), 4),
                "least_share": round(float(share.min()), 4), "seconds": round(time.monotonic() - began),
            })  # fmt: skip
            print(json.dumps(log[-1]), flush=True)
    losses = {}
    with torch.no_grad():
        for label in data.rows:
            ids, target = (part[:8].contiguous() for part in held.fixed(label))
            losses[label] = round(float(trunk.forward(WIDE, weights, ids, target).loss), 4)
    print(json.dumps({"held_out": losses}), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    state = out / "state.partial"
    save_file({f"weight.{name}": value.detach().contiguous() for name, value in weights.items()}, state)
    export.export(WIDE, state, ROOT / "demo" / "moe", out)
    state.unlink()
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*log, {"held_out": losses}]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    train(asked.rows, asked.out, asked.steps)


if __name__ == "__main__":
    main()
