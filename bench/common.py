"""What several benchmarks need: clocks, and models of given shapes with random weights."""
import contextlib
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import fast
import model as transformer
import tinylora
from fast.forward import Held, base_linear, forward
from fast.passes import Prompts
from support.checkpoint import Config

# vocabulary, hidden size, MLP, layers, heads, key heads, head size, tied head
SHAPES = {"toy": (576, 128, 384, 4, 4, 2, 32, True),
          "135M": (49152, 576, 1536, 30, 9, 3, 64, True),
          "0.5B": (151936, 896, 4864, 24, 14, 2, 64, True),
          "1.5B": (151936, 1536, 8960, 28, 12, 2, 128, True),
          "3B": (151936, 2048, 11008, 36, 16, 2, 128, True),
          "7B": (152064, 3584, 18944, 28, 28, 4, 128, False)}


clock = time.perf_counter  # in scale.py's dry run: the seconds that were counted


def seconds(f):
    """(how long f() took, its result)"""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = clock()
    result = f()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start, result


def median_seconds(f, rounds):
    """The median of `rounds` times, after one to warm up."""
    return statistics.median([seconds(f)[0] for _ in range(rounds + 1)][1:])


def turns(rounds, **sides):
    """Each side once per round, in turn: {name: [result of each round]}.

    Before them comes a round to warm up, if there are to be more than one.
    """
    results = {name: [] for name in sides}
    for i in range(rounds + (rounds > 1)):
        for name, f in sides.items():
            result = f()
            if i or rounds == 1:
                results[name].append(result)
    return results


def settings(device, **changes):
    """What grpo.update takes as args: train.py's defaults."""
    tokens = 65536 if device == "cuda" else 2048
    defaults = {"clip_low": 0.2, "clip_high": 0.4, "kl": 0.0, "grad_clip": 1.0, "v_dtype": "fp32",
                "recompute": False, "tokens_per_micro_batch": tokens}
    return SimpleNamespace(**defaults | changes)


def config_of(shape):
    return Config("qwen2", *shape[:7], 1e-6, 1e6, None, shape[7])


@torch.no_grad()
def random_model(shape, device, dtype):
    """A Transformer of a shape as in SHAPES with random weights."""
    config = config_of(shape)
    with torch.device("meta"):
        model = transformer.Transformer(config)
    model = model.to_empty(device=device).to(dtype).requires_grad_(False)
    random = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.fill_(1.0)
        else:
            weight.normal_(0, 0.02, generator=random)
        if "layers" in name and weight.dim() == 2:
            # a few directions stand out of the noise, as in trained weights
            left = weight.new_empty(len(weight), 8).normal_(0, 0.02, generator=random)
            right = weight.new_empty(8, weight.shape[1]).normal_(0, 0.02, generator=random)
            strength = 150 * torch.arange(1, 9, device=device)**-0.5 / min(weight.shape)**0.5
            weight.addmm_(left * strength.to(dtype), right)
    model.rope_freqs = transformer.rope_frequencies(config).to(device)
    return model.eval()


class Limits:
    """In the place of torch.isin in generate: row i stops after limit[i] tokens.

    Rows leave the batch in order, so those that are left are known.
    """

    def __init__(self, limit):
        self.limit = limit
        self.left = torch.arange(len(limit), device=limit.device)
        self.t = 0

    def __call__(self, token, stops):
        if len(token) < len(self.left):
            self.left = self.left[self.limit[self.left] > self.t]
        self.t += 1
        return self.limit[self.left] <= self.t


@contextlib.contextmanager
def limited(limit):
    """In the block, row i of a rollout has limit[i] tokens."""
    real = torch.isin
    torch.isin = Limits(limit)
    try:
        yield
    finally:
        torch.isin = real


@torch.no_grad()
def branch_percent(model, tokens, rounds):
    """What the adapter's branch adds to the fast engine's forward of (1, tokens), in percent.

    With and without it in turn, the median of the rounds' ratios; R (U S)^T made once, as in
    sampling.
    """
    ids = [i % 500 for i in range(tokens)]
    device = model.embed_tokens.weight.device
    held = Held(model)

    def without(modules, x):
        return [base_linear(getattr(module, "base", module), x) for module in modules]

    def run(project):
        prompts = Prompts([ids], device)
        return forward(model, prompts.ids, prompts.positions, prompts.attend, project)

    ratios = []
    for _ in range(rounds + 1):
        adapted = seconds(lambda: run(held.project))[0]
        ratios.append(adapted / seconds(lambda: run(without))[0])
    return round(100 * (statistics.median(ratios[1:]) - 1), 1)


def wrapped(model, rounds):
    """Put 13 numbers on the model: v, and what that took and adds."""
    took, v = seconds(lambda: tinylora.adapt(model, 13, svd=fast.svd))
    with torch.no_grad():
        v.normal_(0, 1e-3)
    worst = max(m.residual for m in model.modules() if hasattr(m, "residual"))
    percent = {n: branch_percent(model, n, rounds) for n in (32, 256, 1024)}
    return v, {"wrap seconds": round(took, 2), "worst residual": f"{worst:.0e}",
               "the adapter's part of a forward, percent": percent}
