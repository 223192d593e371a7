"""The same statistics without streaming: the stock model in memory, hooks, one item at a time, float64 numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from gemcut.stream.corpus import Corpus
from gemcut.types import EXPERT_SUMS, QUESTION_SUMS


def recompute(experts: torch.nn.Module, x: torch.Tensor, e: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert e on rows x [n, H], from the fused parameters: (input of its down projection [n, I], output [n, H])."""
    gate, up = (x @ experts.gate_up_proj[e].t()).chunk(2, dim=-1)  # gate first, then up
    inner = torch.nn.functional.gelu(gate, approximate="tanh") * up
    return inner, inner @ experts.down_proj[e].t()


class Layer:
    """Raw per-item records of one layer, kept by hooks."""

    def __init__(self, module: Any, moe: bool) -> None:
        self.module, self.moe = module, moe
        self.seen: dict[str, Any] = {}
        self.inputs: dict[str, list[np.ndarray]] = {}
        attn, mlp = module.self_attn, module.mlp
        for name, part in (
            ("self_attn.q_proj", attn.q_proj), ("self_attn.o_proj", attn.o_proj),
            ("mlp.gate_proj", mlp.gate_proj), ("mlp.down_proj", mlp.down_proj),
        ):  # fmt: skip
            part.register_forward_pre_hook(self._keep(name))
        attn.o_proj.register_forward_hook(
            lambda m, a, y: self.seen.update(x_attn=a[0][0].double().numpy(), y_attn=y[0].double().numpy())
        )
        if moe:
            module.router.register_forward_pre_hook(lambda m, a: self.seen.update(r=a[0].double().numpy()))
            module.router.proj.register_forward_hook(lambda m, a, y: self.seen.update(logits=y.double().numpy()))
            module.experts.register_forward_hook(lambda m, a, y: self.seen.update(args=a, y=y))

    def _keep(self, name: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            self.inputs.setdefault(name, []).append(args[0][0].double().numpy())

        return hook


def plain_statistics(folder: Path, corpus: Corpus, layer_count: int, *, moe: bool = True) -> list[dict[str, Any]]:
    """Per layer the tensors that `observe` writes, under the same names (experts, near, linear, cache, gram)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    model.eval().requires_grad_(False)
    layers = [Layer(module, moe) for module in model.get_decoder().layers]
    assert len(layers) == layer_count
    out: list[dict[str, Any]] = [{} for _ in layers]
    for q, row in enumerate(corpus.items):
        cache = DynamicCache()  # without a config no layer forgets what left its window
        with torch.no_grad():
            model(input_ids=torch.tensor(row.ids)[None], past_key_values=cache)
        for sums, kept in zip(out, cache.layers, strict=True):
            for name, states in (("k", kept.keys), ("v", kept.values)):
                peak = states.abs().amax((0, 2, 3)).double().numpy()
                sums[f"cache.{name}.amax"] = np.maximum(sums.get(f"cache.{name}.amax", 0.0), peak)
        cls = corpus.classes.index(row.cls)
        for sums, layer in zip(out, layers, strict=True):
            for name, kept in layer.inputs.items():
                _columns(sums, name, kept.pop(), q % 2)
            _gram(sums, layer, q % 2)
            if moe:
                _routed(sums, layer, q, cls, len(corpus.items), len(corpus.classes))
                _near(sums, layer)
    return out


def _plus(sums: dict[str, Any], key: str, shape: tuple[int, ...], at: Any, value: Any) -> None:
    sums.setdefault(key, np.zeros(shape))[at] += value


def _columns(sums: dict[str, Any], name: str, a: np.ndarray, split: int, unit: tuple[int, int] | None = None) -> None:
    """unit: (expert, experts)."""
    extra, at = ((), split) if unit is None else ((unit[1],), (split, unit[0]))
    _plus(sums, f"linear.{name}.n", (2, *extra), at, len(a))
    _plus(sums, f"linear.{name}.a1", (2, *extra, a.shape[1]), at, a.sum(0))
    _plus(sums, f"linear.{name}.a2", (2, *extra, a.shape[1]), at, (a**2).sum(0))
    _plus(sums, f"linear.{name}.a4", (2, *extra, a.shape[1]), at, (a**4).sum(0))
    peak = sums.setdefault(f"linear.{name}.amax", np.zeros((*extra, a.shape[1])))
    if unit is None:
        np.maximum(peak, np.abs(a).max(0), out=peak)
    else:
        np.maximum(peak[unit[0]], np.abs(a).max(0, initial=0), out=peak[unit[0]])


def _gram(sums: dict[str, Any], layer: Layer, split: int) -> None:
    x, y = layer.seen["x_attn"], layer.seen["y_attn"]
    w = 1 / ((y**2).mean(1) + 1e-6)
    name, d = "gram.self_attn.o_proj", x.shape[1]
    _plus(sums, f"{name}.g", (2, d, d), split, (x * w[:, None]).T @ x)
    _plus(sums, f"{name}.x", (2, d), split, w @ x)
    _plus(sums, f"{name}.w", (2,), split, w.sum())
    _plus(sums, f"{name}.n", (2,), split, len(x))


def _routed(sums: dict[str, Any], layer: Layer, q: int, cls: int, questions: int, classes: int) -> None:
    x, index, gate = layer.seen["args"]
    y, r, experts = layer.seen["y"].double().numpy(), layer.seen["r"], layer.module.experts
    count = experts.num_experts
    total = torch.zeros_like(x)
    size = np.linalg.norm(y, axis=1)
    cos = (r * (r + y)).sum(1) / (np.linalg.norm(r, axis=1) * np.linalg.norm(r + y, axis=1))
    for e in range(count):
        token, rank = torch.where(index == e)
        inner, f = recompute(experts, x[token], e)
        g = gate[token, rank]
        total.index_add_(0, token, f * g[:, None])
        _columns(sums, "experts.gate_up_proj", x[token].double().numpy(), q % 2, (e, count))
        _columns(sums, "experts.down_proj", inner.double().numpy(), q % 2, (e, count))
        g64, f64, t = g.double().numpy(), f.double().numpy(), token.numpy()
        n = np.linalg.norm(f64, axis=1)
        values = {
            "n": np.ones(len(t)), "g": g64, "f": n, "f2": n**2, "gf": g64 * n, "gf2": (g64 * n) ** 2,
            "gf_rel": g64 * n / size[t], "easy": (1 - cos[t]) * g64 * n,
        }  # fmt: skip
        for name in EXPERT_SUMS:
            _plus(sums, f"experts.by_class.{name}", (classes, count), (cls, e), values[name].sum())
        for name in QUESTION_SUMS:
            _plus(sums, f"experts.by_question.{name}", (questions, count), (q, e), values[name].sum())
        peak = sums.setdefault("experts.by_class.f_max", np.zeros((classes, count)))
        peak[cls, e] = max(peak[cls, e], np.abs(f64).max(initial=0))
    assert torch.equal(total, layer.seen["y"]), "a recomputed expert is not the module's"


def _near(sums: dict[str, Any], layer: Layer) -> None:
    logits, index = layer.seen["logits"], layer.seen["args"][1].numpy()
    experts, k = logits.shape[1], index.shape[1]
    for z, routed in zip(logits, index, strict=True):
        rest = [e for e in np.argsort(-z, kind="stable") if e not in set(routed.tolist())][: min(k, experts - k)]
        for e in rest:
            _plus(sums, "near.count", (experts,), e, 1)
            _plus(sums, "near.margin", (experts,), e, z[routed].min() - z[e])
        for i in routed:
            _plus(sums, "near.heir", (experts, experts), (i, rest[0]), 1)
