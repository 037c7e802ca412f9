"""Keys and values of earlier tokens: Cache to sample with, Prefix to train with.

In both, every row has `lengths` real tokens and every column a position; columns that hold padding have the position NEVER, which no
query may see. So "may this query see that key" is one comparison of positions, however ragged the rows are. A group of responses
to one prompt computes that prompt once, in sampling and in training alike. Heads come first in every tensor, (KV, B, S, head_dim):
a group's rows then lie side by side, and model.products reads their prompt's keys once.
"""
from copy import copy

import torch
import torch.nn.functional as F

NEVER = 2**31 - 1  # the position of a column that no query may see


class Columns:
    """What both know of their rows and columns."""

    def __init__(self, batch, size, device):
        self.position = torch.full((batch, size), NEVER, device=device)  # (B, size)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)  # real tokens in each row
        self.which = None  # (B,): the adapter of each row, where they differ (tinylora.many)
        self.used = 0  # columns written, the same for all rows; a plain int, so that slicing needs no host sync

    def feed(self, T, lengths):
        """Makes room for T more tokens a row, of which `lengths` (B,) are real (None: all). Returns their positions (B, T), whether they are real
        (B, T), and which columns they may see, (B, T, S) (None: causal attention says it all)."""
        steps = torch.arange(T, device=self.lengths.device)
        real = steps < (T if lengths is None else lengths[:, None])  # (B, T) or (T,)
        start, self.used = self.used, self.used + T
        positions = steps + self.lengths[:, None]
        self.position[:, start:self.used] = torch.where(real, positions, NEVER)
        self.lengths = self.lengths + (T if lengths is None else lengths)
        seen = self.position[:, None, :self.used] <= positions[:, :, None] if start else None
        return positions, real, seen

    def child(self, rows, size):
        """A copy that goes on with the given rows, (B',) of indices, repeats allowed, and room for `size` more columns."""
        new = copy(self)
        new.position = F.pad(self.position[rows, :self.used], (0, size), value=NEVER)
        new.lengths, new.which = self.lengths[rows], None if self.which is None else self.which[rows]
        return new


class Cache(Columns):
    """Keys and values of every layer in tensors of a fixed size, written in place: for sampling, outside autograd."""

    def __init__(self, model, batch, size):
        like = model.embed_tokens.weight
        super().__init__(batch, size, like.device)
        c = model.config
        self.allocate(like, c.num_hidden_layers, c.num_key_value_heads, batch, size, c.head_dim)
        self.prompt, self.start = None, 0  # another Cache, whose columns come before ours; see share

    def allocate(self, like, *shape):
        self.k, self.v = like.new_empty(shape), like.new_empty(shape)  # a column is written before it is read

    def append(self, layer, k, v):
        """Store k, v (KV, B, T, D) in the columns just fed; returns all own columns so far, (KV, B, S, D), and what `products` needs of the prompts."""
        end = self.used - self.start
        self.k[layer, :, :, end - k.shape[2]:end], self.v[layer, :, :, end - k.shape[2]:end] = k, v
        prompt = None if self.prompt is None else (self.prompt.k[layer, :, :, :self.start], self.prompt.v[layer, :, :, :self.start], self.slots, self.places)
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end], prompt

    def share(self, rows, size):
        """To go on with, `size` tokens at most: row i continues row rows[i] (B,), sorted. Nothing is copied, the rows of a group read one prompt,
        unless there are fewer than two rows a prompt: to read a prompt's columns apart from a row's own costs more than it saves then."""
        layers, heads, prompts, _, head_dim = self.k.shape
        if len(rows) < 2 * prompts:
            return self.keep(rows, size)
        new = self.child(rows, size)
        new.allocate(self.k, layers, heads, len(rows), size, head_dim)
        new.prompt, new.start = self, self.used
        new.number(rows)
        return new

    def number(self, rows):
        """Rows lie in a grid (prompts, largest group) beside the rows of their group: the slot of each among all places, None if all are taken."""
        counts, self.rows = rows.bincount(minlength=self.prompt.k.shape[2]), rows
        group = int(counts.max())
        self.places = len(counts) * group
        slots = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows] + rows * group
        self.slots = None if len(rows) == self.places else slots

    def keep(self, rows, size=None):
        """A copy with some of the rows, and room for `size` more tokens (None: for as many as there was)."""
        layers, heads, _, _, head_dim = self.k.shape
        new, used = self.child(rows, self.position.shape[1] - self.used if size is None else size), self.used - self.start
        if self.prompt is not None:
            left, numbers = self.rows[rows].unique(return_inverse=True)
            if len(rows) < 2 * len(left):  # as in share: the prompts' columns become the rows' own
                new.prompt, new.start = None, 0
            else:
                if len(left) < self.prompt.k.shape[2]:
                    new.prompt = copy(self.prompt)
                    new.prompt.k, new.prompt.v = self.prompt.k[:, :, left], self.prompt.v[:, :, left]
                new.number(numbers)
        new.allocate(self.k, layers, heads, len(rows), new.position.shape[1] - new.start, head_dim)
        taken = self.start - new.start
        for name in "kv":
            for layer in range(layers):  # layer by layer, so that no second copy of the whole is made on the way
                mine = getattr(new, name)[layer]
                mine[:, :, taken:taken + used] = getattr(self, name)[layer][:, rows, :used]
                if taken:
                    mine[:, :, :taken] = getattr(self.prompt, name)[layer][:, self.rows[rows], :taken]
        return new


class Prefix(Columns):
    """The prompts' keys and values as part of the autograd graph: one pass fills it, a second one, over `share(rows)`, reads it."""

    def __init__(self, batch, size, device):
        super().__init__(batch, size, device)
        self.kv, self.rows = {}, None

    def append(self, layer, k, v):
        """First pass: keep k, v (KV, P, T, D). Second: the prompts' columns of each row, then its own. Nothing is kept that a
        checkpoint's second run would spoil."""
        if self.rows is None:
            self.kv[layer] = k, v
            return k, v, None
        return *(torch.cat((prompt[:, self.rows], own), 2) for prompt, own in zip(self.kv[layer], (k, v))), None

    def share(self, rows, size):
        """To go on with, once, for responses of `size` tokens: response i continues prompt rows[i]."""
        new = self.child(rows, size)
        new.rows, self.kv = rows, {}  # the first pass's checkpoints hold `self`: if it went on holding what they computed, a pass given up would never be freed
        return new
