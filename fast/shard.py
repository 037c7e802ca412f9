"""--shard: one model in parts, a part a rank, for models that one device does not hold.

    torchrun --nproc_per_node 2 train.py --shard ...

Tensor parallelism, for sampling and for the update. Of every block a rank has its share of the
heads and of the MLP: rows of q, k, v, gate and up, columns of o and down; U is cut as W's rows, V
as its columns. So a part is a model.Transformer with fewer heads, and either engine runs it. What o
and down give is summed over the ranks, as is, backwards, the gradient of what q, k, v, gate and up
are given. Embedding, head and norms are whole on every rank. All ranks sample the same rows with
the same noise; a rank's gradient of v is a part of a sum, which grpo.optimizer_step adds up.

Not torch's fully_shard: it would send all weights to all ranks for each token that is sampled,
where this sends two vectors a token and block.
"""
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.distributed as dist

from model import Transformer
from support import ranks
from support.checkpoint import joined, probe, read_config, read_weights
from support.errors import InputError
from tinylora import TARGETS

# which dimension of a module's weight is cut
DIMENSIONS = dict(zip(TARGETS, (0, 0, 0, 1, 0, 0, 1), strict=True))


def total(x):
    """The sum of x over the ranks; the same bits on all of them."""
    x = x.contiguous().clone()
    with ranks.communication():
        dist.all_reduce(x)
    return x


class Total(torch.autograd.Function):
    """Parts of a result -> their sum, which every rank goes on with."""

    @staticmethod
    def forward(ctx, x):
        return total(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Spread(torch.autograd.Function):
    """What every rank has -> what its part works with: the gradients of all parts are summed."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return total(gradient)


def mine(x, dimension):
    """This rank's part of a tensor."""
    return x.chunk(ranks.SIZE, dimension)[ranks.RANK]


def part_of(config):
    """The Config of a rank's part. InputError: the heads or the MLP do not divide."""
    sizes = {name: getattr(config, name) for name in
             ("num_attention_heads", "num_key_value_heads", "intermediate_size")}
    for name, size in sizes.items():
        if size % ranks.SIZE:
            raise InputError(f"--shard: {name} {size} cannot be cut into {ranks.SIZE} equal parts")
    return replace(config, **{name: size // ranks.SIZE for name, size in sizes.items()})


def load(folder, dtype=torch.float32, device="cpu"):
    """As model.load, this rank's part. Of the whole model one tensor at a time is in memory."""
    config = read_config(folder)
    with torch.device("meta"):
        whole = Transformer(config)
        model = Transformer(part_of(config))
    probes = {}

    def cut(name, tensor):
        probes[name] = probe(tensor.to(dtype))
        # layers.0.self_attn.q_proj.weight -> self_attn.q_proj
        dimension = DIMENSIONS.get(".".join(name.split(".")[2:-1]))
        return tensor if dimension is None else mine(tensor, dimension)

    shapes = {name: tensor.shape for name, tensor in whole.state_dict().items()}
    weights = read_weights(folder, config, shapes, dtype, device, cut)
    model.load_state_dict(weights, strict=True, assign=True)
    model.whole = joined(config, probes)  # an adapter belongs to the whole model
    for block in model.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.register_forward_hook(lambda module, given, x: Spread.apply(x))
        for module in (block.self_attn, block.mlp):
            module.register_forward_hook(lambda module, given, x: Total.apply(x))
        block.total = Total.apply  # for fast/forward.py, which calls neither of these two
    return model.to(device).requires_grad_(False).eval()


def in_parts(engine):
    """The engine with its SVD for a model in parts."""
    def svd(weights, rank):
        """Every rank computes each matrix's whole SVD, of its parts sent together."""
        for i, W in enumerate(weights):
            dimension = DIMENSIONS[TARGETS[i % len(TARGETS)]]
            parts = [torch.empty_like(W) for _ in range(ranks.SIZE)]
            with ranks.communication():
                dist.all_gather(parts, W.contiguous())
            [(U, S, V, residual)] = engine.svd([torch.cat(parts, dimension)], rank)
            yield (mine(U, 0), S, V, residual) if dimension == 0 else (U, S, mine(V, 0), residual)

    return SimpleNamespace(**vars(engine) | {"svd": svd})
