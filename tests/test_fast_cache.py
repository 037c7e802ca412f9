"""Sampling's cache: rows that share their prompt's keys, and the same as CUDA graphs."""
import gc
import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import MODELS, check_logprobs, random_v, tiny, to_double

import fast
import grpo
import tinylora
from fast import graph, sampling
from fast.forward import Held, project
from fast.passes import attention, prefill

PROMPTS = [[1, 2, 3], [4], [0, 6], [7, 8, 0, 9]]  # 0 is padding's id, too


def kind(cache):
    if cache.shared is None:
        return "apart"
    return "full groups" if cache.groups.full else "ragged"


@torch.no_grad()
@pytest.mark.parametrize("kw", MODELS, ids=str)
def test_rows_share_their_prompts_keys(kw):
    """Rows continue one pass over the prompts while some leave; no row touches another's keys.
    Where few rows a prompt are left, at once or in the end, they take copies of it."""
    model = tiny(dtype=torch.float64, **kw)  # exact enough to tell a wrong number from rounding
    rng = np.random.RandomState(0)
    seen = set()
    plans = [(3, [[0, 1, 2, 3, 4, 5, 6, 7, 9], [0, 1, 2, 3, 6, 7], [0, 1, 3], [0, 1]]),
             (1, [[1, 2, 3], [0, 1]]),
             (3, [[0, 1, 2, 3, 4, 5], [0, 3]]),
             (4, [[0, 1, 4, 5, 6], [0, 1, 3, 4]])]
    for group, keeps in plans:
        prompts, hidden = prefill(model, PROMPTS, project)
        for x, prompt in zip(hidden, PROMPTS):
            want = model.hidden(torch.tensor([prompt]))[0, -1]
            torch.testing.assert_close(x, want, atol=1e-11, rtol=1e-11)
        decoder = sampling.Decoder(model, Held(model), prompts, group, 10)
        texts = [list(prompt) for prompt in PROMPTS for _ in range(group)]
        assert (kind(decoder.cache) == "apart") == (group == 1)
        for keep in (*keeps, None):
            for _ in range(2):
                new = rng.randint(0, 50, len(texts)).tolist()
                texts = [text + [token] for text, token in zip(texts, new)]
                got = decoder.hidden(torch.tensor(new))
                for x, text in zip(got, texts):
                    want = model.hidden(torch.tensor([text]))[0, -1]
                    torch.testing.assert_close(x, want, atol=1e-11, rtol=1e-11)
            if keep:
                before = kind(decoder.cache)
                decoder.keep(torch.tensor(keep))
                texts = [texts[i] for i in keep]
                seen.add((before, kind(decoder.cache)))
    assert seen >= {("full groups", "ragged"), ("full groups", "apart"), ("ragged", "ragged"),
                    ("ragged", "full groups"), ("ragged", "apart"), ("apart", "apart"),
                    ("full groups", "full groups")}


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: the same operations on the same memory, with every Python
    number as it was when they were recorded."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        waits = {"_local_scalar_dense", "nonzero", "_unique2", "bincount"}
        assert op.__name__.split(".")[0] not in waits, f"{op} waits for the device"
        self.ops.append((op, args, kwargs or {}, out))
        return out

    def replay(self):
        for op, args, kwargs, out in self.ops:
            for old, new in zip(tree_leaves(out), tree_leaves(op(*args, **kwargs))):
                if old.data_ptr() != new.data_ptr():  # else it is a view, or was done in place
                    old.copy_(new.view_as(old))  # squeeze_ may have changed its shape since


def record(self, size):
    """In place of Graphs.capture."""
    b = self.buffers
    state = [self.token, self.out, b.bias, b.lengths, b.column]
    state += [x for pair in b.own for x in pair]
    before = [x.clone() for x in state]
    b.column.zero_()  # the last column may be written already
    with Tape() as tape:
        self.step(*size)
    for x, old in zip(state, before):  # a real capture records and does not run
        x.copy_(old)
    self.captured.append(size)
    return tape


# prompts, rows each, tokens, greedy
ROLLOUTS = [(5, 4, 30, False), (5, 4, 30, False), (5, 4, 30, True), (3, 2, 12, False),
            (5, 4, 30, False), (10, 2, 30, False), (9, 1, 30, False)]


@pytest.mark.parametrize("kw", MODELS, ids=str)
def test_a_captured_step_gives_the_same_text(kw, monkeypatch):
    """Same noise: same tokens and log-probs (1e-5) from replayed steps, over several sizes of rows
    and columns, when rows leave, in later rollouts with other prompts and another v, and when the
    shape changes; nothing captured depends on a Python number or waits for the device."""
    monkeypatch.setattr(graph, "COLUMNS", 8)
    monkeypatch.setattr(graph.Graphs, "capture", record)
    model = tiny(**kw)
    v = tinylora.adapt(model, 13)
    graphs = graph.Graphs(model)
    graphs.captured = []
    sizes = []
    for seed, (P, group, length, greedy) in enumerate(ROLLOUTS):
        random_v(v, 0.1 * seed)
        rng = np.random.RandomState(seed)
        prompts = [list(rng.randint(0, 50, 1 + 3 * i % 7)) for i in range(P)]
        noise = rng.random_sample((P * group, length))
        args = model, prompts, group, length, (0, 3), 0.0 if greedy else 1.0, noise
        graph.GRAPHS.pop(model, None)
        plain = fast.generate(*args)
        graph.GRAPHS[model] = graphs
        captured = fast.generate(*args)
        assert torch.equal(plain.ids, captured.ids) and torch.equal(plain.mask, captured.mask)
        torch.testing.assert_close(plain.logp, captured.logp, atol=1e-5, rtol=1e-5)
        sizes.append(len(graphs.captured))
    assert len({B for B, _ in graphs.captured}) > 2
    assert len({width for _, width in graphs.captured}) > 2
    assert sizes[0] > 3 and sizes[1] - sizes[0] < sizes[0]  # kept for the next rollout
    assert sizes[3] > sizes[2]  # made anew for another shape


def test_graphs_let_their_model_go():
    model = tiny()
    tinylora.adapt(model, 13)
    fast.use_graphs(model)
    assert len(graph.GRAPHS) == 1
    graph.decoder(model, after_prefill(model), 2, 5)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and len(graph.GRAPHS) == 0


# eight prompts, of which all but one go on after its 38 tokens: 7 x 37 need not be computed
START = list(range(38))
ALIKE = [START + rest for rest in ([5], [43, 44], [6] * 9, [], [0], [43, 45], [7, 1, 2], [0, 0])]


@pytest.mark.parametrize("kw", MODELS, ids=str)
def test_what_all_prompts_begin_with_is_computed_once(kw):
    model = tiny(dtype=torch.float64, **kw)
    params = [tinylora.adapt(model, 13)]
    to_double(model)
    random_v(params[0], 0.12)
    seen = []
    model.layers[0].mlp.register_forward_pre_hook(lambda *_: pytest.fail("not the fast engine"))
    model.layers[0].input_layernorm.register_forward_hook(lambda m, x, y: seen.append(len(y)))
    fast.generate(model, ALIKE, 2, 1, (), 0.0)
    assert seen == [37, sum(len(prompt) - 37 for prompt in ALIKE)]
    for few in ([prompt[1:] for prompt in ALIKE], ALIKE[:1] * 9 + [START[:1]], ALIKE[2:3]):
        seen.clear()  # 252, 0 and 0 tokens: too few for a pass of their own
        fast.generate(model, few, 2, 1, (), 0.0)
        assert seen == [sum(map(len, few))]
    model.layers[0].mlp._forward_pre_hooks.clear()

    noise = np.random.RandomState(0).random_sample((16, 12))
    for temperature in (1.0, 0.0):
        args = ALIKE, 2, 12, (0, 3), temperature, noise if temperature else None
        plain = grpo.generate(model, *args)
        quick = fast.generate(model, *args)
        assert torch.equal(plain.ids, quick.ids) and torch.equal(plain.mask, quick.mask)
        torch.testing.assert_close(plain.logp, quick.logp, rtol=1e-10, atol=1e-10)
    check_logprobs(model, params, plain, fast)


@torch.no_grad()
def after_prefill(model):
    return prefill(model, PROMPTS, project)[0]


@pytest.mark.parametrize("S", [5, 190, 200])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_in_bf16_is_near_the_exact_one(S, causal):
    """Results and gradients, with few keys (plain products) and many (torch's kernel)."""
    rng = np.random.RandomState(0)
    R = S if causal else 6
    q, k, v, dy = (torch.from_numpy(rng.standard_normal((2, 3, n, 8))).bfloat16()
                   for n in (R, S, S, R))
    bias = None
    if not causal:
        bias = torch.zeros(1, 3, R, S).masked_fill_(torch.from_numpy(rng.rand(1, 3, R, S) < 0.3),
                                                    -torch.inf).bfloat16()

    def run(function, *tensors):
        leaves = [x.clone().requires_grad_() for x in tensors]
        y = function(*leaves)
        y.backward(dy.to(y.dtype))
        return [y.detach(), *(x.grad for x in leaves)]

    def exact(q, k, v):
        scores = q @ k.mT / 8**0.5
        hidden = torch.ones(R, S).triu(1).bool() if causal else bias.isinf()
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    want = run(exact, *(x.double() for x in (q, k, v)))
    for got, true in zip(run(lambda *qkv: attention(*qkv, bias), q, k, v), want, strict=True):
        assert got.dtype == torch.bfloat16 and (got - true).norm() < 0.02 * true.norm()
