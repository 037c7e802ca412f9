"""Beyond the last layer: log-probs of known tokens for the trainer, draws for the sampler.

A row of logits is long (151,665 numbers in Qwen2.5), and every pass over it waits for memory. So
there are few passes, over some rows at a time, which on a CPU stay in its caches.
"""
import math

import torch
from torch.utils.checkpoint import checkpoint

import grpo
from fast.forward import head, logits
from model import log_softmax, upcast

# bytes of a piece's logits in fp32, on a CPU: few enough for its caches, and for malloc to keep
# what is freed instead of fetching memory anew each time
SAMPLED = 2**22
TRAINED = 2**24  # a product of more rows reads W less often
LONG = 8192  # in a larger vocabulary, draws by blocks are faster than plain ones
BLOCK = 256  # tokens whose probabilities are added up before one of them is drawn


def in_pieces(function, most, vocab, *tensors):
    """The results of function, called with some rows of the tensors at a time, joined."""
    size = grpo.HEAD_CHUNK
    if tensors[0].device.type == "cpu":
        size = max(1, min(size, most // (4 * vocab)))
    results = [function(*piece) for piece in zip(*(x.split(size) for x in tensors))]
    return [torch.cat(parts) for parts in zip(*results)]


class AtOnce(torch.autograd.Function):
    """logps(hidden) (N,), where number i depends on row i of hidden (N, C) alone, on nothing
    trained, and its gradient, one row of C numbers, is computed together with it: going back takes
    no logits, which would have to be kept or computed again."""

    @staticmethod
    def forward(ctx, hidden, logps):
        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            logp = logps(hidden)
            [slope] = torch.autograd.grad(logp.sum(), hidden)  # (N, C)
        ctx.save_for_backward(slope)
        return logp.detach()

    @staticmethod
    def backward(ctx, dlogp):
        [slope] = ctx.saved_tensors
        return (dlogp[:, None] * slope).to(slope.dtype), None


def token_logps(model, hidden, target, temperature):
    """log p (N,) of the tokens target (N,), each after its state hidden (N, C)."""
    trained = head(model).requires_grad

    def one(hidden, target):
        logp = log_softmax(logits(model, hidden), temperature)
        return logp.gather(1, target[:, None])[:, 0]

    def compute(hidden, target):
        if trained:  # computed again in the backward pass
            logp = checkpoint(one, hidden, target, use_reentrant=False, preserve_rng_state=False)
        elif torch.is_grad_enabled():
            logp = AtOnce.apply(hidden, lambda hidden: one(hidden, target))
        else:
            logp = one(hidden, target)
        return [logp]

    return in_pieces(compute, TRAINED, model.vocab, hidden, target)[0]


def sample(logits, temperature, uniform):
    """As grpo.sample: next tokens (B,) and their log-probs (B,) from logits (B, vocab)."""
    if logits.shape[1] < LONG:
        return grpo.sample(logits, temperature, uniform)

    def compute(logits, uniform=None):
        return sample_piece(logits, temperature, uniform)

    tensors = [logits] if uniform is None else [logits, uniform]
    return in_pieces(compute, SAMPLED, logits.shape[1], *tensors)


def sample_piece(logits, temperature, uniform):
    """As grpo.sample, up to rounding: the vocabulary is cut into blocks, -inf behind its end."""
    B, vocab = logits.shape
    blocks = -(-vocab // BLOCK)
    x = upcast(logits[:, :0]).new_empty(B, blocks * BLOCK)
    x[:, :vocab] = logits
    x[:, vocab:] = -math.inf
    if temperature not in (0, 1):
        x.div_(temperature)
    x = x.view(B, blocks, BLOCK)
    highest = x.amax(-1)  # (B, blocks)
    top = highest.amax(-1, keepdim=True)  # (B, 1)
    p = (x - top[:, :, None]).exp_()  # not yet divided by its sum
    cdf = p.sum(-1).double().cumsum_(-1)  # (B, blocks); sum(dtype=float64) would copy all of p

    if temperature == 0:
        block = highest.argmax(-1, keepdim=True)
        place = pick(x, block).argmax(-1, keepdim=True)
    else:
        block, point = find(cdf, uniform[:, None] * cdf[:, -1:])
        place, _ = find(pick(p, block).double().cumsum_(-1), point)
    logp = pick(x, block).gather(1, place) - top - cdf[:, -1:].log().to(x.dtype)
    token = block * BLOCK + place
    return token[:, 0].clamp_(max=vocab - 1), logp[:, 0]  # only NaN logits get that far


def pick(x, block):
    """x (B, blocks, BLOCK), block (B, 1) -> that block of every row (B, BLOCK)"""
    return x.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0]


def find(cdf, point):
    """As grpo.draw finds a token: the place (B, 1) of point in cdf (B, n), and the point in it."""
    zero = torch.zeros_like(point)
    below = cdf[:, -1:].nextafter(zero)
    point = torch.minimum(point, below)
    place = torch.searchsorted(cdf, point, right=True).clamp_(max=cdf.shape[1] - 1)
    return place, point - torch.cat((zero, cdf), 1).gather(1, place)
