"""--cuda-graph: one decoding step as a CUDA graph, so that the GPU never waits for Python.

At small batches Python takes longer to launch a step's kernels than the GPU to run them. A graph
replays the same kernels on the same addresses. So all that a step reads and writes lies in buffers
of fixed shapes: the cache's columns are written at an index kept on the device, and attention
covers a fixed number of columns, of which those not yet written are hidden. One graph serves one
size (rows, columns). Sizes come in steps, so a few dozen graphs do; each is captured when its size
is first met, and all anew when a rollout's shape differs from the last one's (training,
evaluation). The buffers stay while the update runs: about 16 GB for 256 rows of 1,024 tokens at the
shape of the 7B model. With graphs and without, generate gives the same (tested).
"""
import math
import weakref

import torch

from fast.cache import Groups, attend_one
from fast.forward import Held, forward
from model import upcast

COLUMNS = 128  # a graph's columns are a multiple of this
PARTS = 8  # a graph's rows are a multiple of this part of all rows

GRAPHS = weakref.WeakKeyDictionary()  # model -> its Graphs


def use_graphs(model):
    """From now on, fast.generate runs this model's steps as CUDA graphs."""
    GRAPHS[model] = Graphs(model)


def decoder(model, prompts, group, size):
    """The model's Graphs, ready for these prompts; None if use_graphs was not called for it."""
    graphs = GRAPHS.get(model)
    if graphs is not None:
        graphs.begin(model, prompts, group, size)
    return graphs


def round_up(x, unit):
    return -(-x // unit) * unit


class Buffers:
    """The cache of fast/cache.py at fixed addresses, for B rows of `group` rows a prompt."""

    def __init__(self, prompts, group, start, size):
        """prompts: whose pass is done. start, size: columns for the prompts and for the rows."""
        k = prompts.kv[0][0]  # (KV, P, S, D)
        KV, P, _, D = k.shape
        B = P * group
        device = k.device
        # zeros: columns not yet written get weight 0, but if they held NaN, 0 * NaN would be NaN
        layers = range(len(prompts.kv))
        self.shared = [[k.new_zeros(KV, P, start, D) for _ in "kv"] for _ in layers]
        self.own = [[k.new_zeros(KV, B, size, D) for _ in "kv"] for _ in layers]
        self.start = start
        self.size = size
        self.bias = upcast(k).new_empty(B, start + size)
        self.lengths = torch.zeros(B, dtype=torch.long, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)  # of `own`, written next
        self.prompt_of = torch.arange(B, device=device) // group
        self.groups = Groups(self.prompt_of, P)
        self.first_place = self.groups.place.clone()

    def fill(self, prompts):
        """Take over what the pass over the prompts has left."""
        kv = prompts.take()
        for layer, pair in enumerate(self.shared):
            for buffer, x in zip(pair, kv.pop(layer)):
                buffer[:, :, :prompts.T] = x
        self.bias.fill_(-math.inf)
        self.bias[:, :prompts.T].masked_fill_(prompts.real[self.prompt_of], 0)
        self.lengths.copy_(prompts.lengths[self.prompt_of])
        self.column.zero_()
        self.groups.place.copy_(self.first_place)

    def rows_of(self, x, B):
        """x (KV, rows, size, D) -> the start of its memory as the keys of B rows."""
        KV, _, size, D = x.shape
        return x.flatten()[:KV * B * size * D].view(KV, B, size, D)

    def keep(self, order, before, used):
        """Rows order (B,) of the `before` rows in use go on; `used` columns are written."""
        B = len(order)
        for pair in self.own:
            for x in pair:
                old = self.rows_of(x, before)
                # what is read on the right is a copy, which is then written over the same memory
                self.rows_of(x, B)[:, :, :used] = old[:, order, :used]
        for x in (self.bias, self.lengths, self.groups.place):
            x[:B] = x[order]

    def view(self, B, width):
        return View(self, B, width)


class View:
    """The first B rows and the first `width` columns of the buffers, as one graph sees them."""

    def __init__(self, buffers, B, width):
        self.shared = buffers.shared
        self.own = [[buffers.rows_of(x, B)[:, :, :width] for x in pair] for pair in buffers.own]
        self.bias = buffers.bias[:B, :buffers.start + width]
        self.lengths = buffers.lengths[:B]
        self.column = buffers.column
        self.start = buffers.start
        self.groups = buffers.groups.first(B)

    def step(self):
        """Positions (B,) of the new tokens, whose column becomes visible."""
        self.bias.index_fill_(1, self.column + self.start, 0)
        positions = self.lengths.clone()
        self.lengths.add_(1)
        return positions

    def attend(self, layer, q, k, v):
        keys, values = self.own[layer]  # (KV, B, width, D)
        keys.index_copy_(2, self.column, k.transpose(0, 1)[:, :, None])
        values.index_copy_(2, self.column, v.transpose(0, 1)[:, :, None])
        return attend_one(q, keys, values, self.bias, (*self.shared[layer], self.groups))


class Graphs:
    """What a run keeps: buffers for the shape sampled last, and the graphs captured over them.

    To sampling.generate it looks like sampling.Decoder.
    """

    def __init__(self, model):
        self.held = Held(model)
        self.shape = None
        self.start = 0  # columns for the prompts; never fewer than in the last rollout

    def begin(self, model, prompts, group, size):
        self.model = weakref.ref(model)  # not the model: GRAPHS must let it go
        self.held.refresh()
        self.start = max(self.start, round_up(prompts.T, COLUMNS))
        B = prompts.B * group
        shape = B, group, self.start, size
        if shape != self.shape:
            self.buffers = None  # the old ones' memory first
            self.graphs = {}
            self.pool = None
            self.buffers = Buffers(prompts, group, self.start, size)
            self.shape = shape
            self.token = torch.zeros(B, dtype=torch.long, device=prompts.lengths.device)
            self.out = self.buffers.own[0][0].new_empty(B, model.config.hidden_size)
        self.buffers.fill(prompts)
        self.rows = B  # in use
        self.used = 0  # columns of the rows that are written

    def keep(self, rows):
        """Only these rows, (B',) sorted, go on. Sizes come in steps, so some that ended stay."""
        unit = -(-len(self.token) // PARTS)
        B = min(self.rows, round_up(len(rows), unit))
        ended = torch.ones(self.rows, dtype=torch.bool, device=rows.device)
        ended = ended.index_fill(0, rows, False).nonzero()[:, 0]
        order = torch.cat((rows, ended))[:B]
        self.buffers.keep(order, self.rows, self.used)
        self.rows = B

    def step(self, B, width):
        """What a graph records."""
        view = self.buffers.view(B, width)
        positions = view.step()
        hidden = forward(self.model(), self.token[:B], positions, view.attend, self.held.project)
        self.out[:B] = hidden
        self.buffers.column.add_(1)

    def capture(self, size):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):  # records, does not run
            self.step(*size)
        self.pool = graph.pool()  # all graphs work in the same memory: none needs another's
        return graph

    def hidden(self, token):
        """As Decoder.hidden, token (B',) -> (B', C); good until the next call."""
        self.token[:len(token)] = token
        self.used += 1
        size = self.rows, min(self.buffers.size, round_up(self.used, COLUMNS))
        if size in self.graphs:
            self.graphs[size].replay()
        else:
            self.step(*size)  # a step like any other; it also sets up what a capture must not
            self.graphs[size] = self.capture(size)
        return self.out[:len(token)]
