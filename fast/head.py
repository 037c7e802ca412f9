"""Beyond the last layer: log-probs of known tokens for the trainer, draws for the sampler.

A row of logits is long (151,665 numbers in Qwen2.5), and every pass over it waits for memory. So
rows come in pieces, which on a CPU stay in its caches, and are read as few times as can be.
"""
import math

import torch
from torch.utils.checkpoint import checkpoint

import grpo
from fast.forward import head, linear, logits
from model import log_softmax, upcast

# bytes of fp32 logits that exist at once on a CPU: little enough for its caches, and for malloc to
# keep what is freed instead of fetching memory anew each time
SAMPLED = 2**22
TRAINED = 2**24  # a product of more rows reads W less often
LONG = 8192  # tokens of a vocabulary from which on draws by blocks are faster than plain ones
BLOCK = 256  # tokens whose probabilities are added up before one of them is drawn


def in_pieces(function, most, vocab, *tensors):
    """function of a few rows of the tensors after the other; its results joined."""
    size = grpo.HEAD_CHUNK
    if tensors[0].device.type == "cpu":
        size = max(1, min(size, most // (4 * vocab)))
    results = [function(*piece) for piece in zip(*(x.split(size) for x in tensors))]
    return [torch.cat(parts) for parts in zip(*results)]


class TokenLogp(torch.autograd.Function):
    """log p (N,) of the tokens target (N,) after hidden (N, C), where the head W is frozen.

    Its gradient, (W[target] - sum_i p_i W[i]) / temperature, is one vector of C numbers a token: it
    is made at once, and neither logits nor a second pass over them are needed to go back.
    """

    @staticmethod
    def forward(ctx, hidden, target, W, vocab, temperature):
        table = log_softmax(linear(hidden, W)[:, :vocab], temperature)  # (N, vocab)
        target = target[:, None]
        logp = table.gather(1, target)
        p = table.exp_()
        p.scatter_add_(1, target, -torch.ones_like(logp))  # in fp32: with p near 1 little is left
        rounded = W.new_zeros(len(p), len(W))  # W whole: an odd width makes slow GPU kernels
        rounded[:, :vocab] = p
        ctx.save_for_backward(linear(rounded, W.T) / -temperature)
        return logp[:, 0]

    @staticmethod
    def backward(ctx, dlogp):
        [slope] = ctx.saved_tensors  # (N, C)
        return (dlogp[:, None] * slope).to(slope.dtype), None, None, None, None


def token_logps(model, hidden, target, temperature):
    """log p (N,) of the tokens target (N,), each after its state hidden (N, C)."""
    W = head(model)

    def one(hidden, target):
        logp = log_softmax(logits(model, hidden), temperature)
        return logp.gather(1, target[:, None])[:, 0]

    def compute(hidden, target):
        if not torch.is_grad_enabled():
            return [one(hidden, target)]
        if W.requires_grad:  # computed again in the backward pass
            return [checkpoint(one, hidden, target, use_reentrant=False, preserve_rng_state=False)]
        return [TokenLogp.apply(hidden, target, W, model.vocab, temperature)]

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
    """As grpo.sample, in few passes; the vocabulary is cut into blocks, -inf behind its end."""
    B, vocab = logits.shape
    x = upcast(logits[:, :0]).new_empty(B, -(-vocab // BLOCK) * BLOCK)
    x[:, :vocab] = logits
    x[:, vocab:] = -math.inf
    x = x.div_(temperature or 1.0).view(B, -1, BLOCK)  # (B, blocks, BLOCK)
    highest = x.amax(-1)  # (B, blocks)
    top = highest.amax(-1, keepdim=True)  # (B, 1)
    p = (x - top[:, :, None]).exp_()  # not yet divided by its sum
    cdf = p.sum(-1, dtype=torch.float64).cumsum_(-1)  # (B, blocks)

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
