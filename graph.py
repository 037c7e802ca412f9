"""One decode step as a CUDA graph: with it the GPU never waits for Python, which at small batches takes longer than the GPU.

A graph replays the same kernels on the same addresses, so all that a step reads and writes lies in buffers of a fixed shape:
the cache's columns are written at an index kept on the device, and attention covers a fixed number of columns, of which those
not yet written have the position NEVER. One graph serves one (rows, columns) size; sizes come in steps, so a few dozen of them do,
each captured when its size is first met, and all anew when a rollout's shape differs from the last one's (training, evaluation). The
buffers stay while the update runs: about 16 GB for 256 rows of 1,024 tokens at the 7B shape. grpo.generate does the same with and without (tested).

    model.graphs = Graphs(model)  # and generate uses it
"""
from copy import copy

import torch

from cache import NEVER, Cache

COLUMNS = 128  # a graph's columns are a multiple of this


class Static(Cache):
    """A shared Cache's rows at fixed addresses. Feeds one token a row; nothing in it depends on a Python number that changes."""

    def __init__(self, prompts, rows, start, size):
        """prompts: a Cache that holds the prompts. start: columns for them, padded; size: columns for the responses."""
        layers, heads, P, _, head_dim = prompts.k.shape
        self.allocate(prompts.k, layers, heads, len(rows), size, head_dim)
        self.prompt = copy(prompts)
        self.prompt.allocate(prompts.k, layers, heads, P, start, head_dim)
        for x in (self.k, self.v, self.prompt.k, self.prompt.v):
            x.zero_()  # columns not yet written get score -inf and weight 0, but NaN - inf and 0 * NaN are NaN
        self.start, self.which = start, None
        self.number(rows)
        self.position = torch.empty(len(rows), start + size, dtype=torch.long, device=rows.device)
        self.lengths, self.column = torch.empty_like(rows), torch.zeros(1, dtype=torch.long, device=rows.device)

    def begin(self, prompts):
        """Take over what the prompts' pass has left."""
        for mine, theirs in ((self.prompt.k, prompts.k), (self.prompt.v, prompts.v)):
            mine[:, :, :, :prompts.used] = theirs[:, :, :, :prompts.used]
        self.position.fill_(NEVER)
        self.position[:, :prompts.used] = prompts.position[self.rows, :prompts.used]
        self.lengths.copy_(prompts.lengths[self.rows])
        self.column.zero_()

    def rows_of(self, x, B):
        """x (layers, KV, rows, size, D), its first memory as the keys of B rows: heads come first, so fewer rows are another layout."""
        layers, heads, _, size, head_dim = x.shape
        return x.flatten(1)[:, :heads * B * size * head_dim].view(layers, heads, B, size, head_dim)

    def part(self, B, width):
        """The first B rows and the first `width` columns, as they are, not a copy."""
        new = copy(self)
        new.k, new.v = (self.rows_of(x, B)[:, :, :, :width] for x in (self.k, self.v))
        new.position, new.lengths = self.position[:B, :self.start + width], self.lengths[:B]
        if B < len(self.rows):
            new.slots = self.slots[:B]
        return new

    def feed(self, T, lengths):
        positions = self.lengths[:, None].clone()
        self.position.index_copy_(1, self.column + self.start, positions)
        self.lengths.add_(1)
        return positions, None, (self.position <= positions)[:, None]

    def append(self, layer, k, v):
        self.k[layer].index_copy_(2, self.column, k)
        self.v[layer].index_copy_(2, self.column, v)
        return self.k[layer], self.v[layer], (self.prompt.k[layer], self.prompt.v[layer], self.slots, self.places)


class Graphs:
    """What a run keeps: buffers for the shape sampled last, and the graphs captured over them."""

    def __init__(self, model):
        self.model, self.shape, self.start = model, None, 0

    def share(self, prompts, rows, size):
        """As Cache.share, for groups of one size: rows = 0 0 0 1 1 1 ..."""
        self.start = max(self.start, -(-prompts.used // COLUMNS) * COLUMNS)
        shape = prompts.k.shape[2], len(rows), self.start, size  # prompts, rows, columns
        if shape != self.shape:
            self.cache = self.graphs = None  # the old ones' memory first
            self.cache, self.graphs = Static(prompts, rows, self.start, size), {}
            self.shape, self.pool = shape, None
            self.slots = torch.arange(len(rows), device=rows.device)
            self.token = torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device)
            self.out = prompts.k.new_empty(len(rows), self.model.config.hidden_size)
        self.cache.begin(prompts)
        self.cache.slots = None  # as long as no row has left
        self.rows, self.used = len(rows), 0
        return self

    def keep(self, rows):
        """Only these rows, (B',), go on. As graphs come in steps of an eighth of all rows, some that have ended go with them."""
        unit = -(-len(self.token) // 8)
        B = min(self.rows, -(-len(rows) // unit) * unit)
        ended = torch.ones(self.rows, dtype=torch.bool, device=rows.device).index_fill(0, rows, False).nonzero()[:, 0]
        order, c = torch.cat((rows, ended))[:B], self.cache
        if self.rows == len(self.token):
            self.slots.copy_(torch.arange(len(self.token), device=rows.device))
        for x in (c.k, c.v):
            for mine, theirs in zip(c.rows_of(x, B), c.rows_of(x, self.rows)):  # a layer at a time: what is read is a copy, then written over itself
                mine[:, :, :self.used] = theirs[:, order, :self.used]
        for x in (c.position, c.lengths, self.slots):
            x[:B] = x[order]
        c.slots, self.rows = self.slots, B
        return self

    def step(self, B, width):
        self.out[:B] = self.model.hidden(self.token[:B], self.cache.part(B, width))[:, 0]
        self.cache.column.add_(1)

    def capture(self, size):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):  # records, does not run
            self.step(*size)
        self.pool = graph.pool()  # all graphs work in the same memory: nothing of one is needed in the next
        return graph

    def hidden(self, token):
        """One token for each row, (B',) -> (B', C), good until the next call."""
        self.token[:len(token), 0] = token
        self.used += 1
        size = self.rows, min(self.cache.k.shape[3], -(-self.used // COLUMNS) * COLUMNS)
        if size in self.graphs:
            self.graphs[size].replay()
        else:
            self.step(*size)  # a step like any other; it also sets up what must not be set up during a capture
            self.graphs[size] = self.capture(size)
        return self.out[:len(token)]
