"""What parts of the fast engine buy: python bench/speed.py start | skew | many | head

    start  seconds to put TinyLoRA on the 196 matrices of Qwen2.5-7B's shape, given --model's
           singular values (two layers x 14), and what the adapter adds to a forward of those two
    skew   10% of the rows run to the limit and the rest to a quarter of it: dropping rows that have
           ended against decoding every row to the end
    many   64 rows with 64 different v's against 64 rows with one v
    head   draws and log-probs with their gradient from 256 states, fast and plain, fp32 and bf16
"""
from statistics import median

from common import SHAPES, limited, random_model, seconds, turns, wrapped
from sides import Setup

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

import fast
import grpo
import model as transformer
import tinylora
from fast import head as fast_head
from support.hub import find_model


@torch.no_grad()
def start(args):
    small = transformer.load(find_model(args.model))
    _, hidden, mid, _, *heads, _ = SHAPES["7B"]
    large = random_model((1000, hidden, mid, 2, *heads, True), "cpu", torch.float32)
    rng = np.random.RandomState(0)
    layers = len(small.layers)
    sources = (small.layers[layers // 6], small.layers[-layers // 4])
    for layer, source in zip(large.layers, sources):
        for target in tinylora.TARGETS:
            weight = layer.get_submodule(target).weight
            S = torch.linalg.svdvals(source.get_submodule(target).weight)
            sides = []  # orthonormal columns
            for n in weight.shape:
                random = torch.from_numpy(rng.standard_normal((n, len(S)))).float()
                sides.append(torch.linalg.qr(random)[0])
            weight.copy_(sides[0] * S @ sides[1].T)
    _, figures = wrapped(large, 2 * args.rounds + 1)
    result = {"seconds": round(14 * figures.pop("wrap seconds"), 1)} | figures
    print(f"start: {result}", flush=True)
    return result


def skew(args):
    """A stop test that knows each row's limit stands in for torch.isin."""
    s = Setup(args)
    model, _ = s.ours()
    limit = torch.tensor([s.T if i % 10 == 3 else s.T // 4 for i in range(s.P * s.G)],
                         device=s.device)

    def sample(check_every):
        kept = grpo.CHECK_EVERY
        grpo.CHECK_EVERY = check_every
        try:
            with limited(limit):
                took, out = seconds(lambda: s.sample(fast, model, [-1]))
        finally:
            grpo.CHECK_EVERY = kept
        if out.mask.sum(1).tolist() != limit.tolist():
            raise AssertionError("the rows did not stop where they should")
        return took

    got = turns(args.rounds, dropping=lambda: sample(grpo.CHECK_EVERY),
                whole=lambda: sample(10**9))
    result = {"dropping": round(median(got["dropping"]), 2),
              "to the end": round(median(got["whole"]), 2)}
    result["ratio"] = round(result["to the end"] / result["dropping"], 2)
    print(f"skew: seconds {result}", flush=True)
    return result


def many(args):
    """64 v's in one batch; and 4 of its rows against runs with their v only."""
    s = Setup(args)
    model, v = s.ours()
    prompts = [s.prompts[i % s.P] for i in range(64)]
    noise = s.rng.random_sample((64, s.T))
    values = torch.from_numpy(s.rng.standard_normal((64, *v.shape)) * 0.05).to(v)

    def sample(rows=slice(None), **more):
        return fast.generate(model, prompts[rows], 1, s.T, [-1], 1.0, noise[rows], **more)

    got = turns(args.rounds, one=lambda: seconds(sample),
                each=lambda: seconds(lambda: sample(values=values)))
    _, together = got["each"][0]
    worst = {}
    alike = {}
    for i in range(4):
        with torch.no_grad():
            v.copy_(values[i])
        # row i in the same batch with its v for all rows, and alone, where kernels round otherwise
        for name, rows, row in (("one v", slice(None), i), ("a row alone", slice(i, i + 1), 0)):
            out = sample(rows)
            # a number within rounding of a boundary may draw the next token
            same = (out.ids[row] == together.ids[i]).cumprod(0).bool()
            difference = (out.logp[row] - together.logp[i])[same].abs().max().item()
            worst[name] = max(worst.get(name, 0.0), difference)
            alike[name] = alike.get(name, 0) + int(same.sum())
    figures = {side: round(median([took for took, _ in x]), 2) for side, x in got.items()}
    result = {"one v": figures["one"], "64 v's": figures["each"],
              "cost": round(figures["each"] / figures["one"], 2),
              "log-probs differ by": {name: f"{x:.1e}" for name, x in worst.items()},
              f"tokens alike, of {4 * s.T}": alike}
    print(f"many: seconds {result}", flush=True)
    return result


def head(args):
    """Random states, --model's own table."""
    result = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = transformer.load(find_model(args.model), dtype)
        rng = np.random.RandomState(0)
        states = torch.from_numpy(rng.standard_normal((256, model.config.hidden_size))).to(dtype)
        target = torch.from_numpy(rng.randint(model.vocab, size=256))
        logits = model.logits(states)
        uniform = torch.from_numpy(rng.random_sample(256))

        def both_ways(token_logps):
            hidden = states.clone().requires_grad_()
            token_logps(hidden).sum().backward()

        def plain(hidden):
            def one(hidden):
                logp = transformer.log_softmax(model.logits(hidden), 1.0)
                return logp.gather(1, target[:, None])[:, 0]
            return checkpoint(one, hidden, use_reentrant=False)

        got = turns(args.rounds,
                    drawn=lambda: seconds(lambda: fast_head.sample(logits, 1.0, uniform)),
                    plain_drawn=lambda: seconds(lambda: grpo.sample(logits, 1.0, uniform)),
                    learned=lambda: seconds(lambda: both_ways(
                        lambda x: fast_head.token_logps(model, x, target, 1.0))),
                    plain_learned=lambda: seconds(lambda: both_ways(plain)))
        ms = {side: 1000 * median(took for took, _ in x) for side, x in got.items()}
        result[str(dtype).removeprefix("torch.")] = {
            "draws": [round(ms["drawn"]), round(ms["plain_drawn"])],
            "log-probs and gradient": [round(ms["learned"]), round(ms["plain_learned"])]}
    print(f"head: ms, fast and plain: {result}", flush=True)
    return result


KINDS = {"start": start, "skew": skew, "many": many, "head": head}
