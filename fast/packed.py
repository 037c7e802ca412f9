"""Sampling on a CPU: large weights laid out once per rollout, as oneDNN reads them.

With few rows a product waits for memory, and F.linear lays the weight out anew in every call. Here
that is done once, and layers of one input are one product: q, k and v; gate and up. With SmolLM2
and 32 rows it makes sampling 1.2 times faster in fp32, 1.1 in bf16 (docs/efficiency.md).
"""
import torch

from fast.forward import BF16, LARGE, ONEDNN, Held, head, product
from tinylora import TinyLoRALinear

MOST = 2**32  # bytes of copies; a larger model is sampled without them
ROWS = 32  # the layout is chosen for this many; any other number is computed, too


def hold(model):
    """What applies the layers of one rollout: Packed where it can, Held elsewhere."""
    W = head(model)
    bf16 = W.dtype == torch.bfloat16 and BF16
    numbers = W.numel() + sum(p.numel() for p in model.layers.parameters())
    fits = numbers * W.element_size() <= MOST
    if ONEDNN and W.device.type == "cpu" and (W.dtype == torch.float32 or bf16) and fits:
        return Packed(model)
    return Held(model)


def lay_out(W):
    return torch.ops.mkldnn._reorder_linear_weight(W.detach(), ROWS)


class Stack:
    """TinyLoRA layers of one input as one layer."""

    def __init__(self, modules, held):
        bases = [module.base for module in modules]
        biases = [base.bias for base in bases if base.bias is not None]  # of all, or of none
        self.sizes = [base.out_features for base in bases]
        self.W = lay_out(torch.cat([base.weight for base in bases]))  # (their d_out, d_in)
        self.bias = torch.cat(biases) if biases else None
        self.Vt = torch.cat([module.Vt for module in modules])  # (their ranks, d_in)
        self.RSUt = torch.block_diag(*[held.RSUt[module] for module in modules])

    def project(self, x):
        y = product(x, self.W, self.bias, x @ self.Vt.T @ self.RSUt)
        return y.split(self.sizes, 1)


class Packed(Held):
    """Stacks in place of layers, wherever they are TinyLoRA's and large."""

    def __init__(self, model):
        super().__init__(model)
        self.stacks = {}
        for block in model.layers:
            attention = block.self_attn
            mlp = block.mlp
            for modules in ((attention.q_proj, attention.k_proj, attention.v_proj),
                            (attention.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)):
                adapted = all(type(module) is TinyLoRALinear for module in modules)
                if adapted and sum(module.base.weight.numel() for module in modules) >= LARGE:
                    self.stacks[modules[0]] = Stack(modules, self)
        W = head(model)
        self.head = lay_out(W) if W.numel() >= LARGE else None

    def project(self, modules, x):
        if modules[0] in self.stacks:
            return self.stacks[modules[0]].project(x)
        return super().project(modules, x)

    def logits(self, model, hidden):
        if self.head is None:
            return super().logits(model, hidden)
        return product(hidden, self.head)[:, :model.vocab]
