"""Sampling: keys and values of earlier tokens, and the attention of one new token a row to them.

    Groups      which rows continue the same prompt
    attend_one  attention of one token a row
    Cache       rows that continue the prompts (passes.py), with the `attend` forward.py asks for

Shapes as in passes.py: P prompts of S columns, B rows, D head size, H query heads, KV key heads,
R = H / KV query heads that share a key head.
"""
import math
from copy import copy

import torch
import torch.nn.functional as F

from model import upcast


class Groups:
    """Which of B rows continue the same of P prompts. prompt_of (B,), sorted.

    Rows lie in a grid of P prompts x the largest group, so that the rows of a prompt are rows of
    one matrix product with its keys. As long as all places of the grid are taken, no row moves.
    """

    def __init__(self, prompt_of, P):
        counts = prompt_of.bincount(minlength=P)  # (P,)
        largest = int(counts.max())
        first = counts.cumsum(0) - counts  # (P,): a prompt's first row
        number = torch.arange(len(prompt_of), device=prompt_of.device) - first[prompt_of]
        self.P = P
        self.places = P * largest
        self.place = prompt_of * largest + number  # (B,)
        self.full = len(prompt_of) == self.places

    def first(self, B):
        """The first B rows alone, in the same grid (for graph.py)."""
        new = copy(self)
        new.place = self.place[:B]
        new.full = self.full and B == len(self.place)
        return new

    def gather(self, x):
        """(KV, B, R, X) -> (KV * P, largest * R, X)"""
        KV, _, R, X = x.shape
        if not self.full:
            x = x.new_zeros(KV, self.places, R, X).index_copy_(1, self.place, x)
        return x.view(KV * self.P, -1, X)

    def scatter(self, x, KV, R):
        """(KV * P, largest * R, X) -> (KV, B, R, X)"""
        x = x.view(KV, self.places, R, x.shape[-1])
        return x if self.full else x.index_select(1, self.place)


def attend_one(q, k, v, bias, prompts=None):
    """Attention of one new token a row, (B, H, D) -> (B, H * D), in plain products.

    For one token a row these beat any kernel made for tiles of queries. k, v (KV, B, S, D): keys of
    the rows alone. bias (B, columns): 0, or -inf for padding. prompts: (k, v, groups), k and v
    (KV, P, columns, D) that come before a row's own ones.
    """
    B, H, D = q.shape
    KV = len(k)
    R = H // KV
    q = q.unflatten(1, (KV, R)).transpose(0, 1).contiguous()  # (KV, B, R, D)
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(KV, B, R, -1)
    if prompts is not None:
        prompt_k, prompt_v, groups = prompts
        shared = torch.bmm(groups.gather(q), prompt_k.flatten(0, 1).mT)
        scores = torch.cat((groups.scatter(shared, KV, R), scores), -1)  # (KV, B, R, columns)
    scores = torch.add(bias[:, None], upcast(scores), alpha=D**-0.5)
    weights = scores.softmax(-1).to(v.dtype)
    start = weights.shape[-1] - k.shape[2]  # the first of the row's own columns
    # weights[..., start:] is copied: a product into part of a tensor is a loop on a CPU
    y = torch.bmm(weights[..., start:].flatten(0, 1), v.flatten(0, 1)).view(KV, B, R, D)
    if prompts is not None:
        y = groups.gather(y)
        y = y.baddbmm_(groups.gather(weights[..., :start]), prompt_v.flatten(0, 1))
        y = groups.scatter(y, KV, R)
    return y.transpose(0, 1).reshape(B, H * D)


class Cache:
    """B rows that continue P prompts, a group each; outside autograd."""

    def __init__(self, prompts, group, size):
        """To go on with for `size` tokens a row."""
        P = prompts.B
        device = prompts.lengths.device
        rows = torch.arange(P * group, device=device)
        kv = prompts.take()
        # an entry per layer: keys and values of the prompts (KV, P, S, D), then of the rows alone
        self.shared = [[x.contiguous() for x in kv.pop(layer)] for layer in sorted(kv)]
        self.own = [[k[:, rows // group, :0], v[:, rows // group, :0]] for k, v in self.shared]
        self.start = prompts.T  # columns of `shared`
        self.used = 0  # columns of `own` that are written, the same for all rows
        self.size = size  # columns of `own`
        self.prompt_of = rows // group  # (B,)
        self.lengths = prompts.lengths[self.prompt_of]  # (B,): tokens so far
        real = F.pad(prompts.real, (0, size), value=True)[self.prompt_of]  # (B, S + size)
        self.bias = upcast(self.own[0][0]).new_zeros(real.shape).masked_fill_(~real, -math.inf)
        self.regroup(rows)

    def keep(self, rows):
        """Only these rows, (B',) sorted, go on."""
        self.lengths = self.lengths[rows]
        self.bias = self.bias[rows]
        self.regroup(rows)

    def regroup(self, rows):
        """Take rows of the keys and values, and see whether sharing their prompts still pays.

        With fewer than two rows a prompt it costs more than it saves to read the prompt's columns
        apart from the row's own: then each row gets a copy of them.
        """
        merge = False
        if self.shared is not None:
            left, prompt_of = self.prompt_of[rows].unique(return_inverse=True)
            merge = len(rows) < 2 * len(left)
        before = self.start if merge else 0
        self.size += before
        for layer, pair in enumerate(self.own):
            for i, own in enumerate(pair):  # one by one: there is never a second copy of the whole
                KV, _, _, D = own.shape
                new = own.new_empty(KV, len(rows), self.size, D)
                new[:, :, before:before + self.used] = own[:, rows, :self.used]
                if merge:
                    new[:, :, :before] = self.shared[layer][i][:, self.prompt_of[rows]]
                pair[i] = new
        if merge:
            self.shared = None
            self.start = 0
            self.used += before
        elif self.shared is not None:
            self.prompt_of = prompt_of
            self.groups = Groups(prompt_of, len(left))
            if len(left) < self.shared[0][0].shape[1]:
                self.shared = [[x[:, left] for x in pair] for pair in self.shared]

    def step(self):
        """Make room for a token in every row; returns their positions (B,)."""
        positions = self.lengths
        self.lengths = positions + 1
        self.used += 1
        return positions

    def attend(self, layer, q, k, v):
        keys, values = self.own[layer]  # (KV, B, size, D)
        keys[:, :, self.used - 1] = k.transpose(0, 1)
        values[:, :, self.used - 1] = v.transpose(0, 1)
        prompts = None if self.shared is None else (*self.shared[layer], self.groups)
        return attend_one(q, keys[:, :, :self.used], values[:, :, :self.used],
                          self.bias[:, :self.start + self.used], prompts)
