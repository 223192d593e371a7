"""Hooks on the input of a layer's attention output projection: where the heads still lie side by side.

Zeroing a head's rows of q_proj would not silence it: its attention becomes uniform, and it gives the mean of V. What
o_proj reads from it is the whole of the head's output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import CheckpointError, UsageError


@dataclass(frozen=True, slots=True)
class Heads:
    """The query heads of one layer: `count` blocks of `width` columns of what the module at `path` reads."""

    layer: int
    count: int  # U
    width: int  # D
    path: str  # below the decoder layer


def heads_of(checkpoint: Checkpoint, layers: Sequence[int] | None) -> dict[int, Heads]:
    """The query heads of `layers` (None: all), ascending.

    Raises:
        UsageError: no layer, one twice, one that is not there, or layers with different numbers of heads.
    """
    family, text, names = checkpoint.family, checkpoint.text_config, checkpoint.tensors.keys()
    there = layer_count(checkpoint)
    chosen = range(there) if layers is None else sorted(layers)
    if not chosen or len(set(chosen)) != len(chosen) or chosen[0] < 0 or chosen[-1] >= there:
        raise UsageError(
            "these are not layers of the model",
            where=checkpoint.name,
            got=list(chosen)[:8],
            wanted=f"some of 0 to {there - 1}, each once",
        )
    out: dict[int, Heads] = {}
    for i in chosen:
        attention = family.attention(text, names, i)
        path = attention.o.removeprefix(family.layer_prefix(names, i)).removesuffix(".weight")
        out[i] = Heads(i, attention.heads, attention.head_dim, path)
    if len({one.count for one in out.values()}) != 1:
        raise UsageError(
            "the layers have different numbers of query heads",
            where=checkpoint.name,
            got=", ".join(str(n) for n in sorted({one.count for one in out.values()})),
            wanted="one number",
            hint="name layers of one kind",
        )
    return out


def layer_count(checkpoint: Checkpoint) -> int:
    """Decoder layers, from config.json."""
    count = checkpoint.text_config.get("num_hidden_layers")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise CheckpointError(
            "config.json has no usable num_hidden_layers", where=checkpoint.name, got=repr(count)[:60]
        )
    return count


@contextlib.contextmanager
def silenced(module: nn.Module, heads: Heads, head: int) -> Iterator[None]:
    """While the block runs, `head`'s output is zero in every forward call of this decoder layer."""
    columns = slice(head * heads.width, (head + 1) * heads.width)

    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = args[0].clone()  # [B, S, U·D]
        x[..., columns] = 0
        return (x, *args[1:])

    handle = _projection(module, heads).register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class Gate:
    """α [B, U], one number per item and head, which multiplies each head's output. Made by `gated`."""

    def __init__(self, heads: Heads) -> None:
        self.heads = heads
        self.alpha: torch.Tensor | None = None

    def open(self, items: int, device: torch.device) -> torch.Tensor:
        """Fresh ones, float32, that the next forward call records for autograd."""
        self.alpha = torch.ones((items, self.heads.count), device=device, requires_grad=True)
        return self.alpha

    def __call__(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if self.alpha is None:
            return None
        x = args[0]  # [B, S, U·D]
        # float32 products, so that α's gradient is summed in float32; times one, they round back to the same bits
        wide = x.reshape(*x.shape[:-1], self.heads.count, self.heads.width) * self.alpha[:, None, :, None]
        return (wide.reshape(x.shape).to(x.dtype), *args[1:])


@contextlib.contextmanager
def gated(module: nn.Module, heads: Heads) -> Iterator[Gate]:
    """A gate on every head of this decoder layer while the block runs; it does nothing before `open`."""
    gate = Gate(heads)
    handle = _projection(module, heads).register_forward_pre_hook(gate)
    try:
        yield gate
    finally:
        handle.remove()
        gate.alpha = None


def _projection(module: nn.Module, heads: Heads) -> nn.Module:
    found: Mapping[str, nn.Module] = dict(module.named_modules())
    projection = found.get(heads.path)
    width = getattr(projection, "in_features", None)
    if projection is None or width != heads.count * heads.width:
        raise CheckpointError(
            "the model's own module and the family disagree about the heads",
            where=f"layer {heads.layer}, {heads.path}",
            got="no such module" if projection is None else f"{width} columns",
            wanted=f"{heads.count} heads of {heads.width}",
        )
    return projection
