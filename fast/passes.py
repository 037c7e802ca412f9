"""Passes over many tokens at once, and the attention in them; cache.py goes on a token at a time.

    Prompts    one pass over the prompts, each computed once for all rows that continue it
    prefill    the same, and what all prompts begin with computed once, too
    Responses  training: one pass over all responses, whose rows read their prompt's keys

Each has the `attend` that forward.py asks for. Heads come first in every tensor, (KV, B, S, D): the
rows that continue one prompt then lie side by side, and its keys are read once for all of them.

Shapes: P prompts of S columns (the longest one's tokens), B rows, D head size, H query heads, KV
key heads, R = H / KV query heads that share a key head (in training: times the tokens of a row).
"""
import math
import os

import torch
import torch.nn.functional as F

from fast.forward import forward
from model import upcast

SHORT = 192  # keys up to which plain products are faster than torch's kernel, see attention
SAVES = 256  # tokens that all prompts begin with are worth a pass of their own if it saves so many


def to_grid(x, place, B, T):
    """Tokens (N, ...) -> (B, T, ...), zeros where there is padding. place (N,): among B * T."""
    padded = x.new_zeros(B * T, *x.shape[1:]).index_copy(0, place, x)
    return padded.view(B, T, *x.shape[1:])


def attention(q, k, v, bias=None):
    """Scaled dot-product attention: q (A, B, R, D), k and v (A, B, S, D) -> (A, B, R, D).

    bias, (1, 1 or B, R, S): added to the scores, 0 or -inf; None: causal. With few keys in 16 bits
    on a CPU plain products take 0.3 of the time of torch's kernel (76 keys) to 0.8 (192), forward
    and backward; they round the scores as attend_one does.
    """
    short = k.shape[2] <= SHORT and q.element_size() == 2 and q.device.type == "cpu"
    if not short:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)
    if bias is None:
        bias = q.new_full((q.shape[2], k.shape[2]), -math.inf).triu(1)
    scores = torch.add(bias, upcast(q @ k.mT), alpha=q.shape[-1]**-0.5)
    return scores.softmax(-1).to(v.dtype) @ v


class Ragged:
    """B rows of unequal length, padded on the right: which of their B * T places hold tokens."""

    def __init__(self, lengths, T):
        self.B = len(lengths)
        self.T = T
        self.real = torch.arange(T, device=lengths.device) < lengths[:, None]  # (B, T)
        self.place = self.real.flatten().nonzero()[:, 0]  # (N,)

    def grid(self, x):
        """(N, heads, D) -> (B, T, heads, D)"""
        return to_grid(x, self.place, self.B, self.T)

    def tokens(self, y):
        """(B, T, ..., D) -> (N, H * D)"""
        return y.reshape(self.B * self.T, -1).index_select(0, self.place)


class Prompts:
    """A pass over the prompts, which leaves their keys and values in `kv`, one pair a layer.

    start: a pass over what all of them begin with, which is then not computed again.
    """

    def __init__(self, prompts, device, start=None):
        n = start.T if start else 0
        self.before = start.take() if start else None
        self.B = len(prompts)
        self.T = max(map(len, prompts))
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (P,)
        self.real = torch.arange(self.T, device=device) < self.lengths[:, None]  # (P, S)
        self.own = Ragged(self.lengths - n, self.T - n)  # without the start
        self.ids = torch.tensor([i for prompt in prompts for i in prompt[n:]], device=device)
        self.positions = self.own.place % self.own.T + n  # (N,)
        self.last = (self.lengths - n).cumsum(0) - 1  # (P,): a prompt's last token among N
        self.kv = {}
        self.bias = None

    def states(self, model, project, recompute=False):
        """Make the pass -> the states (P, C) that predict the first tokens of the responses."""
        if self.before is not None:  # causal, behind the start; made once for all layers
            bias = model.embed_tokens.weight.new_full((self.own.T, self.T), -math.inf)
            self.bias = bias.triu(1 + self.T - self.own.T)[None, None]  # (1, 1, S', S)
        hidden = forward(model, self.ids, self.positions, self.attend, project, recompute)
        return hidden[self.last]

    def attend(self, layer, q, k, v):
        q, k, v = (self.own.grid(x) for x in (q, k, v))  # (P, S', heads, D)
        k, v = k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3)  # (KV, P, S', D)
        if self.before is not None:
            k, v = (torch.cat((x.expand(-1, self.B, -1, -1), y), 2)  # (KV, P, S, D)
                    for x, y in zip(self.before[layer], (k, v)))
        if self.kv is not None:
            self.kv[layer] = k, v
        share = q.shape[2] // len(k)
        k, v = (x.transpose(0, 1).repeat_interleave(share, 1) for x in (k, v))  # (P, H, S, D)
        # padding is on the right, so causal attention alone hides it from every real token
        y = attention(q.transpose(1, 2), k, v, self.bias)
        return self.own.tokens(y.transpose(1, 2))

    def take(self):
        """The keys and values, given away: activation checkpoints hold `self`, and if it held what
        they computed, the memory of a pass that failed half way would never be freed."""
        kv, self.kv = self.kv, None
        return kv


def prefill(model, prompts, project, recompute=False):
    """Prompts, lists of ids -> (their Prompts, the states (P, C) after them).

    Most begin alike, with a chat format's system message: that is computed once.
    """
    device = model.embed_tokens.weight.device
    n = len(os.path.commonprefix(prompts))
    n = min(n, min(map(len, prompts)) - 1)  # each has a token of its own
    start = None
    if n * (len(prompts) - 1) >= SAVES:
        start = Prompts([prompts[0][:n]], device)
        start.states(model, project, recompute)
    texts = Prompts(prompts, device, start)
    return texts, texts.states(model, project, recompute)


class Responses(Ragged):
    """A pass over responses, the first `lengths` (B,) of T tokens in each row, for training.

    prompt_of (B,): which prompt a row continues. Keys and values stay part of the autograd graph.
    """

    def __init__(self, model, prompts, prompt_of, lengths, T):
        super().__init__(lengths, T)
        self.kv = prompts.take()
        self.prompt_of = prompt_of
        self.positions = self.place % T + prompts.lengths[prompt_of[self.place // T]]  # (N,)

        # what is added to the scores, 0 or -inf: (1, B, R, S + T), made once for all layers
        S = prompts.T
        share = model.config.num_attention_heads // model.config.num_key_value_heads
        # rows begin at multiples of 8, or fused GPU kernels would make and keep a copy per layer
        width = -(-(S + T) // 8) * 8
        bias = model.embed_tokens.weight.new_full((self.B, 1, T, width), -math.inf)
        bias[:, 0, :, :S].masked_fill_(prompts.real[prompt_of][:, None], 0)
        causal = torch.ones(T, T, dtype=torch.bool, device=bias.device).tril()
        bias[:, 0, :, S:S + T].masked_fill_(causal, 0)
        bias = bias.expand(-1, share, -1, -1).reshape(1, self.B, share * T, width)
        self.bias = bias[..., :S + T]

    def attend(self, layer, q, k, v):
        q, k, v = (self.grid(x) for x in (q, k, v))  # (B, T, heads, D)
        prompt_k, prompt_v = self.kv[layer]
        k = torch.cat((prompt_k[:, self.prompt_of], k.permute(2, 0, 1, 3)), 2)  # (KV, B, S + T, D)
        v = torch.cat((prompt_v[:, self.prompt_of], v.permute(2, 0, 1, 3)), 2)
        # the queries that share a key head become rows of one product: each key is read once
        # (not enable_gqa: with a mask it falls back to slow kernels)
        q = q.unflatten(2, (len(k), -1)).permute(2, 0, 3, 1, 4)  # (KV, B, H / KV, T, D)
        q = q.contiguous().flatten(2, 3)  # (KV, B, R, D)
        y = attention(q, k, v, self.bias)  # (KV, B, R, D)
        y = y.unflatten(2, (-1, self.T)).permute(1, 3, 0, 2, 4)  # (B, T, KV, H / KV, D)
        return self.tokens(y)
