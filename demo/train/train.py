"""Train a demo model from the packed rows: `python -m demo.train.train moe --data DIR --out DIR --steps N`.

Resumes from the newest state in `--out`. The batch of a step is a function of (seed, step) alone.
"""

# torch leaves its autograd and compiler entry points without types
# mypy: disable-error-code="no-untyped-call,untyped-decorator,no-any-return"

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from demo.train import trunk
from demo.train.architecture import SHAPES, Shape, initial, tensors
from demo.train.document import CLASSES
from demo.train.optimizer import Optimizer, schedule
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

# Rows of 512 tokens of each class in a batch of 16; every row is of one class, the batch mixes all.
MIXTURE = {"code": 4, "prose": 3, "math": 3, "logic": 2, "science": 2, "creative": 2}
BALANCE = 0.01
HELD_ROWS = 16


class Rows:
    """The packed rows of a split, drawn without replacement within an epoch."""

    def __init__(self, data: Path, split: str, seed: int) -> None:
        self.rows = {label: np.load(data / f"{label}-{split}.npy", mmap_mode="r") for label in CLASSES}
        self.seed = seed

    def _row(self, label: str, position: int) -> np.ndarray:
        rows = self.rows[label]
        epoch, place = divmod(position, len(rows))
        order = np.random.default_rng([self.seed, CLASSES.index(label), epoch]).permutation(len(rows))
        return np.asarray(rows[order[place]])

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets `[16, 512]` of a step."""
        picked = [self._row(label, step * count + i) for label, count in MIXTURE.items() for i in range(count)]
        ids = torch.from_numpy(np.stack(picked).astype(np.int64))
        return ids[:, :-1], ids[:, 1:]

    def fixed(self, label: str) -> tuple[Tensor, Tensor]:
        """The first rows of a class, for held-out loss."""
        ids = torch.from_numpy(np.asarray(self.rows[label][:HELD_ROWS]).astype(np.int64))
        return ids[:, :-1], ids[:, 1:]


def saved(path: Path, tensors_to_save: dict[str, Tensor], step: int) -> None:
    """Write the state atomically: temporary name, fsync, rename."""
    partial = path.with_suffix(".partial")
    save_file(
        {name: value.detach().contiguous() for name, value in tensors_to_save.items()}, partial, {"step": str(step)}
    )
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def restored(path: Path, weights: dict[str, Tensor], optimizer: Optimizer) -> int:
    """Load a state in place and return the next step; 0 without a state."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file, torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(file.get_tensor(f"weight.{name}"))
        for name, value in optimizer.state.items():
            value.copy_(file.get_tensor(name))
        return int(file.metadata()["step"])


def held_out(shape: Shape, weights: dict[str, Tensor], rows: Rows) -> dict[str, float]:
    """Mean loss in nats a token of each class on its fixed held-out rows."""
    return {
        label: round(float(trunk.forward(shape, weights, *rows.fixed(label)).loss.detach()), 4) for label in CLASSES
    }


def main() -> None:
    """Train until `--steps`, logging one JSON line every ten steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=150)
    parser.add_argument("--held-every", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    shape, state = SHAPES[options.model], options.out / "state.safetensors"
    weights = {name: value.requires_grad_() for name, value in initial(shape, options.seed).items()}
    optimizer = Optimizer(weights, {name: kind for name, (_, kind) in tensors(shape).items()})
    step = restored(state, weights, optimizer)
    rows, held = Rows(options.data, "train", options.seed), Rows(options.data, "heldout", options.seed)
    began, first = time.monotonic(), step
    with (options.out / "log.jsonl").open("a", encoding="utf-8") as log:
        while step < options.steps:
            ids, target = rows.batch(step)
            output = trunk.forward(shape, weights, ids, target)
            (output.loss + BALANCE * output.balance).backward()
            loss = float(output.loss.detach())
            if not np.isfinite(loss):
                raise FloatingPointError(f"loss is {loss} at step {step}")
            optimizer.step(step, schedule(step, options.steps))
            step += 1
            record: dict[str, object] = {}
            if step % 10 == 0 or step == options.steps:
                seconds = time.monotonic() - began
                record = {
                    "step": step,
                    "tokens": step * ids.numel(),
                    "loss": round(loss, 4),
                    "rate": round(schedule(step, options.steps), 4),
                    "tokens_per_second": round((step - first) * ids.numel() / seconds),
                }
                if shape.experts:
                    share = output.routed / output.routed.sum(-1, keepdim=True)
                    record |= {
                        "balance": round(float(output.balance.detach()), 4),
                        "least_share": round(float(share.min()), 5),
                    }
            if step % options.held_every == 0 or step == options.steps:
                record["held_out"] = held_out(shape, weights, held)
            if record:
                log.write(json.dumps(record) + "\n")
                log.flush()
            if step % options.save_every == 0 or step == options.steps:
                saved(state, {**{f"weight.{name}": value for name, value in weights.items()}, **optimizer.state}, step)


if __name__ == "__main__":
    main()
