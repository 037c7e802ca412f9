"""The model's forward pass over real tokens only: the tokens of all rows in one list, no padding.

It reads the weights of model.py's modules and computes what their forward methods compute. Only
attention needs to know which tokens belong to which row, so it is a function that the caller gives:

    attend(layer, q (N, H, D), k (N, KV, D), v (N, KV, D)) -> (N, H * D)

see passes.py and cache.py. `project(modules, x)` applies linear layers to one input; the caller
gives that, too, because R is computed once per rollout while sampling, and once per forward pass in
training.

Shapes: N tokens, C hidden size, H query heads, KV key heads, D head size.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tinylora import TinyLoRALinear

LARGE = 2**18  # numbers in a weight from which on oneDNN is faster than the default, MKL
ONEDNN = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
BF16 = ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # of this processor


def product(x, W, bias=None, change=None):
    """F.linear(x, W, bias) + change on a CPU, by oneDNN: the sum is rounded once. W may be one that
    packed.lay_out made."""
    if change is None:
        return torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x, change, W, bias, "add")


class Product(torch.autograd.Function):
    """product of a frozen W."""

    @staticmethod
    def forward(ctx, x, W, bias, change=None):
        ctx.save_for_backward(W)
        ctx.changed = change is not None
        return product(x, W, bias, change)

    @staticmethod
    def backward(ctx, dy):
        [W] = ctx.saved_tensors
        return product(dy, W.T), None, None, dy if ctx.changed else None


def linear(x, W, bias=None):
    """F.linear(x, W, bias), x (N, d_in); in fp32 on a CPU by oneDNN where W is large and frozen.

    That is 1.1 to 1.2 times faster; 1.3 to 2 times for the head of a small model (measured on a
    Zen 4 processor, 1 to 256 rows).
    """
    exact = x.dtype == W.dtype == torch.float32 and x.device.type == "cpu"
    if ONEDNN and exact and W.numel() >= LARGE and not W.requires_grad:
        return Product.apply(x, W, bias)
    return F.linear(x, W, bias)


def base_linear(module, x):
    """The frozen linear layer under an adapter, or a linear layer without one."""
    if type(module) is nn.Linear:
        return linear(x, module.weight, module.bias)
    return module(x)


def plus(base, x, h, A):
    """base(x) + h A: x (N, d_in), h (N, r), A (r, d_out) -> (N, d_out).

    In 16 bits W x is added to h A, as in tinylora.added, and the sum is rounded once; so is its sum
    with the bias, where BF16. In fp32 the other way round, which is faster.
    """
    if x.dtype in (torch.float32, torch.float64):
        return base_linear(base, x).addmm_(h, A)
    y = h @ A
    if base.bias is not None:
        if BF16 and x.dtype == torch.bfloat16 and x.device.type == "cpu":
            return Product.apply(x, base.weight, base.bias, y)
        y += base.bias
    return y.addmm_(x, base.weight.T)


def project_one(module, x):
    """A linear layer, adapted or not: x (N, d_in) -> (N, d_out)."""
    if type(module) is not TinyLoRALinear:
        return base_linear(module, x)
    h = linear(x, module.Vt)  # (N, r)
    R = module.R()
    h = h.to(R.dtype) @ R.T  # fp32: rounded to bf16, a small step of v would vanish
    return plus(module.base, x, h.to(x.dtype), module.US.T)


def project(modules, x):
    """Linear layers of one input: x (N, d_in) -> a list of (N, d_out). What training uses."""
    return [project_one(module, x) for module in modules]


class Layers:
    """What applies the layers of one rollout; project_one (of a subclass) knows v."""

    def project(self, modules, x):
        """As the function."""
        return [self.project_one(module, x) for module in modules]

    def logits(self, model, hidden):
        """As the function."""
        return logits(model, hidden)


class Held(Layers):
    """R (U S)^T of every TinyLoRA layer, computed once: v does not change during a rollout.

    W stays apart: a merged bf16 weight would round most of the change away. Rounding R (U S)^T to
    bf16 costs no more than rounding R V^T x does otherwise (tested).
    """

    def __init__(self, model):
        modules = [m for m in model.modules() if type(m) is TinyLoRALinear]
        self.RSUt = {m: m.US.new_empty(m.US.shape[::-1]) for m in modules}  # (r, d_out) each
        self.refresh()

    @torch.no_grad()
    def refresh(self):
        """Take over v as it is now; in place, where a CUDA graph looks for it."""
        for module, RSUt in self.RSUt.items():
            RSUt.copy_(module.R().T.double() @ module.US.T.double())

    def project_one(self, module, x):
        if module not in self.RSUt:
            return base_linear(module, x)
        return plus(module.base, x, linear(x, module.Vt), self.RSUt[module])


class HeldMany(Layers):
    """A v of its own for every prompt: values (P, ties, u). `which` (N,): whose v a token has."""

    def __init__(self, model, values):
        modules = [m for m in model.modules() if type(m) is TinyLoRALinear]
        v = modules[0].v
        kept = v.detach().clone()
        R = {m: [] for m in modules}
        try:
            for value in values:
                v.copy_(value)
                for m in modules:
                    R[m].append(m.R())
        finally:
            v.copy_(kept)
        self.Rt = {m: torch.stack(R[m]).mT for m in modules}  # (P, r, r) each
        self.which = None

    def project_one(self, module, x):
        if module not in self.Rt:
            return base_linear(module, x)
        Rt = self.Rt[module][self.which]  # (N, r, r): every token has one of its own
        h = linear(x, module.Vt).to(Rt.dtype)  # (N, r)
        h = torch.bmm(h[:, None], Rt)[:, 0]  # (N, r)
        return plus(module.base, x, h.to(x.dtype), module.US.T)


def rotate(x, cos, sin):
    """Rotary positions: x (N, heads, D), cos and sin (N, 1, D). See model.rotate.

    (a cos - b sin, b cos + a sin) for the halves a, b of a head; the minus is in sin's first half.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def as_it_is(x):
    return x


def run_block(block, layer, x, rope, attend, project):
    """One transformer block, x (N, C) -> (N, C)."""
    total = getattr(block, "total", as_it_is)  # over the parts of a model, see shard.py
    attention = block.self_attn
    mlp = block.mlp
    D = attention.head_dim

    normed = block.input_layernorm(x)
    heads = project((attention.q_proj, attention.k_proj, attention.v_proj), normed)
    KV = heads[1].shape[1] // D
    heads = torch.cat(heads, 1).view(len(x), -1, D)  # (N, H + 2 KV, D)
    qk = rotate(heads[:, :-KV], *rope)  # (N, H + KV, D): one rotation for both
    y = attend(layer, qk[:, :-KV], qk[:, -KV:], heads[:, -KV:])  # (N, H * D)
    [y] = project((attention.o_proj,), y)
    x = x + total(y)

    normed = block.post_attention_layernorm(x)
    gate, up = project((mlp.gate_proj, mlp.up_proj), normed)
    [y] = project((mlp.down_proj,), F.silu(gate) * up)
    return x + total(y)


def forward(model, ids, positions, attend, project, recompute=False):
    """ids, positions (N,) -> the last layer's normed states (N, C)."""
    angle = positions[:, None, None] * model.rope_freqs  # (N, 1, D / 2), fp32
    x = model.embed_tokens(ids)  # (N, C)
    cos = angle.cos().to(x.dtype)
    sin = angle.sin().to(x.dtype)
    rope = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)  # (N, 1, D) each
    for layer, block in enumerate(model.layers):
        if recompute:
            x = checkpoint(run_block, block, layer, x, rope, attend, project,
                           use_reentrant=False, preserve_rng_state=False)
        else:
            x = run_block(block, layer, x, rope, attend, project)
    return model.norm(x)


def head(model):
    """The weight of the last product, (vocab, C)."""
    module = model.embed_tokens if model.config.tie_word_embeddings else model.lm_head
    return module.weight


def logits(model, hidden):
    """(N, C) -> (N, vocab). Cut after the product: an odd width makes slow GPU kernels."""
    return linear(hidden, head(model))[:, :model.vocab]
