"""The training forward: the same arithmetic as Gemma 4's text model, laid out for a fast CPU step.

Weights are float32 under their checkpoint names; matrix products run in bfloat16, norms, softmax and
residual in float32.
Legend: B rows, S positions, T = B*S tokens, H hidden, E experts, I expert width, N = T*k routed rows.
"""

# torch leaves its autograd and compiler entry points without types
# mypy: disable-error-code="no-untyped-call,untyped-decorator,no-any-return"

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from demo.train.architecture import Shape
from torch import Tensor

Weights = dict[str, Tensor]
EPS = 1e-6
ALIGN = 32


@dataclass(frozen=True, slots=True)
class Output:
    """Mean next-token loss in nats, the balance loss, and how many tokens each expert received `[L, E]`."""

    loss: Tensor
    balance: Tensor
    routed: Tensor


def norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Gemma 4's RMSNorm in float32: `x / sqrt(mean(x²) + eps) * weight`."""
    x = x.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    return x if weight is None else x * weight


def rotary(shape: Shape, length: int, *, full: bool) -> tuple[Tensor, Tensor]:
    """cos and sin `[S, D]`; full layers rotate only the first quarter of the frequencies."""
    dim = shape.global_head_dim if full else shape.head_dim
    if full:
        angles = int(0.25 * dim // 2)
        inverse = 1.0 / (1e6 ** (torch.arange(0, 2 * angles, 2).float() / dim))
        inverse = torch.cat([inverse, torch.zeros(dim // 2 - angles)])
    else:
        inverse = 1.0 / (1e4 ** (torch.arange(0, dim, 2).float() / dim))
    angle = torch.outer(torch.arange(length).float(), inverse)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves: x `[B, S, heads, D]`, cos and sin `[S, D]`."""
    left, right = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-right, left], -1) * sin[:, None]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.bfloat16(), weight.bfloat16())


def attention(shape: Shape, w: Weights, x: Tensor, cos: Tensor, sin: Tensor, *, full: bool) -> Tensor:
    """Causal attention with scale 1; sliding layers attend blockwise to their own and the previous window."""
    rows, length, _ = x.shape
    kv, dim = (shape.global_kv_heads, shape.global_head_dim) if full else (shape.kv_heads, shape.head_dim)
    h = norm(x, w["input_layernorm.weight"]).bfloat16()
    q = linear(h, w["self_attn.q_proj.weight"]).view(rows, length, shape.query_heads, dim)
    k = linear(h, w["self_attn.k_proj.weight"]).view(rows, length, kv, dim)
    v = k if full else linear(h, w["self_attn.v_proj.weight"]).view(rows, length, kv, dim)
    q = rotated(norm(q, w["self_attn.q_norm.weight"]), cos, sin).bfloat16()
    k = rotated(norm(k, w["self_attn.k_norm.weight"]), cos, sin).bfloat16()
    v = norm(v).bfloat16()
    group = shape.query_heads // kv
    k = k[:, :, :, None].expand(-1, -1, -1, group, -1).reshape(rows, length, shape.query_heads, dim)
    v = v[:, :, :, None].expand(-1, -1, -1, group, -1).reshape(rows, length, shape.query_heads, dim)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, Q, S, D]
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0) if full else windowed(q, k, v, shape.window)
    y = y.transpose(1, 2).reshape(rows, length, shape.query_heads * dim)
    return x + norm(linear(y, w["self_attn.o_proj.weight"]), w["post_attention_layernorm.weight"])


def windowed(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Sliding attention `0 <= i - j < window` by blocks of one window: q, k, v `[B, Q, S, D]`, S a multiple of it."""
    rows, heads, length, dim = q.shape
    blocks = length // window
    place = torch.arange(window)
    gap = place[:, None] + window - torch.arange(2 * window)[None]  # i - j within two blocks
    inside = (gap >= 0) & (gap < window)
    q = q.reshape(rows, heads, blocks, window, dim)
    k, v = (t.reshape(rows, heads, blocks, window, dim) for t in (k, v))
    k2 = torch.cat([F.pad(k[:, :, :-1], (0, 0, 0, 0, 1, 0)), k], 3)
    v2 = torch.cat([F.pad(v[:, :, :-1], (0, 0, 0, 0, 1, 0)), v], 3)
    # The first block has no predecessor: its padding keys are masked.
    mask = inside[None].expand(blocks, -1, -1).clone()
    mask[0, :, :window] = False
    scores = torch.matmul(q, k2.transpose(-1, -2)).float()
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.matmul(scores.softmax(-1).bfloat16(), v2).reshape(rows, heads, length, dim)


def dense_branch(w: Weights, x: Tensor) -> Tensor:
    """The always-active MLP on `pre_feedforward_layernorm(x)`."""
    h = norm(x, w["pre_feedforward_layernorm.weight"]).bfloat16()
    gate, up = linear(h, w["mlp.gate_proj.weight"]), linear(h, w["mlp.up_proj.weight"])
    return linear(F.gelu(gate.float(), approximate="tanh").bfloat16() * up, w["mlp.down_proj.weight"])


class Grouped(torch.autograd.Function):
    """y[rows of expert e] = x[rows of expert e] @ weight[e]ᵀ for rows sorted by expert.

    x `[P, A]` bfloat16 with each expert's rows padded to a multiple of `ALIGN`; weight `[E, B, A]` bfloat16;
    bounds: E+1 row offsets. One matrix product an expert; padding keeps the number of distinct shapes small,
    since the CPU library prepares a kernel for every new shape.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bounds: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bounds = bounds
        y = x.new_empty(x.shape[0], weight.shape[1])
        for e in range(weight.shape[0]):
            if bounds[e + 1] > bounds[e]:
                torch.mm(x[bounds[e] : bounds[e + 1]], weight[e].t(), out=y[bounds[e] : bounds[e + 1]])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        bounds, (g,) = ctx.bounds, grads
        g = g.contiguous()
        dx, dw = torch.empty_like(x), torch.zeros_like(weight)
        for e in range(weight.shape[0]):
            low, high = bounds[e], bounds[e + 1]
            if high > low:
                torch.mm(g[low:high], weight[e], out=dx[low:high])
                torch.mm(g[low:high].t(), x[low:high], out=dw[e])
        return dx, dw, None


def gated(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, -1)
    return F.gelu(gate.float(), approximate="tanh").bfloat16() * up


class Dispatch(torch.autograd.Function):
    """Rows of x `[T, H]` copied to their padded places `[P, H]`; the gradient sums a token's k copies by a gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors  # [T, k]
        g = grads[0]
        total = g.index_select(0, place[:, 0]).float()
        for slot in range(1, place.shape[1]):
            total += g.index_select(0, place[:, slot])
        return total.bfloat16(), None, None


class Combine(torch.autograd.Function):
    """out[t] = Σ_s weight[t, s] · y[place[t, s]]: y `[P, H]` bfloat16, weight `[T, k]` and out `[T, H]` float32."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(y, weight, place)
        out = y.index_select(0, place[:, 0]).float() * weight[:, :1]
        for slot in range(1, place.shape[1]):
            out.addcmul_(y.index_select(0, place[:, slot]).float(), weight[:, slot : slot + 1])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        y, weight, place = ctx.saved_tensors
        g = grads[0]
        dy = torch.zeros_like(y)
        dweight = torch.empty_like(weight)
        for slot in range(place.shape[1]):
            index = place[:, slot]
            dweight[:, slot] = (y.index_select(0, index).float() * g).sum(-1)
            dy.index_copy_(0, index, (g * weight[:, slot : slot + 1]).bfloat16())
        return dy, dweight, None


@torch.compiler.disable
def experts(h: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Σ_s weight[t, s] · down_e(gelu(gate_e(h)) * up_e(h)) with e = index[t, s].

    h `[T, H]` bfloat16, index and weight `[T, k]`, gate_up `[E, 2I, H]`, down `[E, H, I]`; out `[T, H]` float32.
    """
    tokens, k = index.shape
    count = torch.bincount(index.reshape(-1), minlength=gate_up.shape[0])
    padded = (count + ALIGN - 1) // ALIGN * ALIGN
    ends = padded.cumsum(0)
    starts = ends - padded
    order = index.reshape(-1).argsort(stable=True)  # routed rows by expert
    before = count.cumsum(0) - count
    expert_of = index.reshape(-1)[order]
    place_sorted = starts[expert_of] + torch.arange(tokens * k) - before[expert_of]
    place = torch.empty(tokens * k, dtype=torch.long)
    place[order] = place_sorted
    token = torch.zeros(int(ends[-1]), dtype=torch.long)  # padding rows repeat token 0 and are never read back
    token[place_sorted] = order // k
    bounds = [0, *ends.tolist()]
    x = Dispatch.apply(h, token, place.view(tokens, k))
    y = Grouped.apply(x, gate_up.bfloat16(), bounds)
    y = Grouped.apply(GATED(y), down.bfloat16(), bounds)
    return Combine.apply(y, weight, place.view(tokens, k))


GATED = torch.compile(gated, dynamic=True)


def route(shape: Shape, w: Weights, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top-k weights, indices, balance loss and counts for x `[T, H]`.

    balance = E · Σ_e share_e · mean_prob_e over the whole batch, 1 when even
    (Switch Transformer, arXiv:2101.03961, eq. 4).
    """
    h = norm(x) * w["router.scale"] * shape.hidden**-0.5
    probability = F.linear(h, w["router.proj.weight"]).softmax(-1)
    weight, index = probability.topk(shape.top_k, -1)
    weight = weight / weight.sum(-1, keepdim=True) * w["router.per_expert_scale"][index]
    count = torch.zeros(shape.experts).index_add(0, index.reshape(-1), torch.ones(index.numel()))
    share = count / index.numel()
    return weight, index, shape.experts * (share * probability.mean(0)).sum(), count


def before_experts(
    shape: Shape, w: Weights, x: Tensor, cos: Tensor, sin: Tensor, full: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = attention(shape, w, x, cos, sin, full=full)
    dense = norm(dense_branch(w, x), w["post_feedforward_layernorm_1.weight"])
    flat = x.reshape(-1, shape.hidden)
    weight, index, balance, count = route(shape, w, flat)
    return x, dense, norm(flat, w["pre_feedforward_layernorm_2.weight"]).bfloat16(), weight, index, balance, count


def after_experts(w: Weights, x: Tensor, dense: Tensor, routed: Tensor) -> Tensor:
    branch = dense + norm(routed, w["post_feedforward_layernorm_2.weight"]).view_as(x)
    return (x + norm(branch, w["post_feedforward_layernorm.weight"])) * w["layer_scalar"]


def dense_layer(shape: Shape, w: Weights, x: Tensor, cos: Tensor, sin: Tensor, full: bool) -> Tensor:
    x = attention(shape, w, x, cos, sin, full=full)
    return (x + norm(dense_branch(w, x), w["post_feedforward_layernorm.weight"])) * w["layer_scalar"]


def head_loss(shape: Shape, x: Tensor, weight: Tensor, embedding: Tensor, target: Tensor) -> Tensor:
    """Summed cross entropy in nats of capped logits `30·tanh(z/30)`: x `[T, H]`, target `[T]`."""
    logits = linear(norm(x, weight), embedding).float()
    logits = shape.softcap * torch.tanh(logits / shape.softcap)
    return F.cross_entropy(logits, target, reduction="sum")


BEFORE = torch.compile(before_experts, dynamic=False)
AFTER = torch.compile(after_experts, dynamic=False)
LAYER = torch.compile(dense_layer, dynamic=False)
HEAD = torch.compile(head_loss, dynamic=False)
HEAD_TOKENS = 2048


def layer_weights(weights: Weights, layer: int) -> Weights:
    base = f"layers.{layer}."
    return {name[len(base) :]: value for name, value in weights.items() if name.startswith(base)}


def forward(shape: Shape, weights: Weights, ids: Tensor, target: Tensor) -> Output:
    """Loss of `target` given `ids`, both `[B, S]`; the final norm is Gemma 4's, the head is the tied embedding."""
    turn = {full: rotary(shape, ids.shape[1], full=full) for full in (False, True)}
    x = F.embedding(ids, weights["embed_tokens.weight"]) * shape.hidden**0.5
    balance, counts = torch.zeros(()), []
    for layer in range(shape.layers):
        w, full = layer_weights(weights, layer), shape.is_full(layer)
        if shape.experts:
            gate_up, down = w.pop("experts.gate_up_proj"), w.pop("experts.down_proj")
            x, dense, h, weight, index, even, count = BEFORE(shape, w, x, *turn[full], full)
            x = AFTER(w, x, dense, experts(h, index, weight, gate_up, down))
            balance = balance + even / shape.layers
            counts.append(count.detach())
        else:
            x = LAYER(shape, w, x, *turn[full], full)
    flat, flat_target = x.reshape(-1, shape.hidden), target.reshape(-1)
    total = torch.zeros(())
    for part, wanted in zip(flat.split(HEAD_TOKENS), flat_target.split(HEAD_TOKENS), strict=True):
        total = total + HEAD(shape, part, weights["norm.weight"], weights["embed_tokens.weight"], wanted)
    return Output(total / flat_target.numel(), balance, torch.stack(counts) if counts else torch.zeros(0))
