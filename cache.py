"""Keys and values of earlier tokens: Cache to sample with, Prefix to train with. Both go where model.hidden takes a cache.

In both, every row has `lengths` real tokens and every column a position; columns that hold padding have the position NEVER,
which no query may see. A group of responses to one prompt computes that prompt once, in sampling and in training alike.
"""
from copy import copy

import torch
import torch.nn.functional as F

from model import NEVER


class Cache:
    """Keys and values of every layer in tensors of a fixed size, written in place: for sampling, outside autograd."""

    def __init__(self, model, batch, size):
        c, like = model.config, model.embed_tokens.weight
        shape = (c.num_hidden_layers, batch, c.num_key_value_heads, size, c.head_dim)
        self.k, self.v = like.new_empty(shape), like.new_empty(shape)  # a column is written before it is read
        self.position = torch.full((batch, size), NEVER, device=like.device)  # (B, size)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=like.device)  # real tokens in each row
        self.used = 0  # columns written, the same for all rows; a plain int, so that slicing needs no host sync

    def append(self, layer, k, v):
        """Store k, v (B, KV, T, D) in the next T columns; returns all columns so far, (B, KV, used + T, D)."""
        end = self.used + k.shape[2]
        self.k[layer, :, :, self.used:end], self.v[layer, :, :, self.used:end] = k, v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def take(self, rows, size):
        """A copy of the given rows, (B',) of indices, repeats allowed, with `size` columns in all."""
        new, (layers, _, heads, _, head_dim) = copy(self), self.k.shape
        new.k, new.v = (self.k.new_empty(layers, len(rows), heads, size, head_dim) for _ in range(2))
        for layer in range(layers):  # layer by layer, so that no second copy of the whole is made on the way
            new.k[layer, :, :, :self.used] = self.k[layer, rows, :, :self.used]
            new.v[layer, :, :, :self.used] = self.v[layer, rows, :, :self.used]
        new.position = F.pad(self.position[rows, :self.used], (0, size - self.used), value=NEVER)
        new.lengths = self.lengths[rows]
        return new


class Prefix:
    """The prompts' keys and values as part of the autograd graph: one pass fills it, a second one, over `take(rows)`, reads it."""

    def __init__(self, batch, size, device):
        self.kv, self.rows = {}, None
        self.position = torch.full((batch, size), NEVER, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.used = 0

    def append(self, layer, k, v):
        """First pass: keep k, v (P, KV, T, D). Second: the prompts' columns of each row, then its own. Nothing is kept that a
        checkpoint's second run would spoil."""
        if self.rows is None:
            self.kv[layer] = k, v
            return k, v
        return tuple(torch.cat((prompt[self.rows], own), 2) for prompt, own in zip(self.kv[layer], (k, v)))

    def take(self, rows, size):
        """To go on with, for responses of `size` tokens: response i continues prompt rows[i]."""
        new = copy(self)
        new.rows, new.lengths = rows, self.lengths[rows]
        new.position = F.pad(self.position[rows], (0, size), value=NEVER)
        return new
