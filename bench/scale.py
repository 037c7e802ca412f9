"""How time grows with batch, group, length and model size, and how far it is from what the machine allows: python bench/scale.py

    on a GPU    everything in one call: Qwen2.5's 0.5B, 1.5B and 7B shapes in bf16, batches of 16, 64 and 256, with and without
                graph.py, and what the paper's recipe would take (about 350 steps of 256 responses, 27M response tokens)
    on a CPU    the toy's and SmolLM2-135M's shapes in fp32

Weights are random, which is right for speed alone. Ceilings are measured first: bytes/s of a large copy, FLOP/s of a large matmul.
A decode step must read every weight and every key and value once (a prompt's once for its group) and multiply by every weight;
its ceiling is the slower of the two. An update must do 4 FLOP a weight and token (forward, and backward to the activations; the
weights' own gradients are not needed). Times are medians of --rounds; a decode step's is the difference of two rollouts' lengths,
so the prompts' pass is not in it. The last line is JSON.
"""
import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

import grpo
import model as transformer
import tinylora
from files import Config
from graph import Graphs

SHAPES = {  # vocabulary, hidden size, MLP, layers, heads, key heads, head size, tied head
    "toy": (576, 128, 384, 4, 4, 2, 32, True), "135M": (49152, 576, 1536, 30, 9, 3, 64, True), "0.5B": (151936, 896, 4864, 24, 14, 2, 64, True),
    "1.5B": (151936, 1536, 8960, 28, 12, 2, 128, True), "7B": (152064, 3584, 18944, 28, 28, 4, 128, False)}


def seconds(f):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = f()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def median_seconds(f, rounds):
    return statistics.median([seconds(f)[0] for _ in range(rounds + 1)][1:])  # one to warm up


def ceilings(args):
    """(bytes/s, FLOP/s), measured."""
    size = 2**30 if args.device == "cuda" else 2**26
    x, n = torch.ones(size // 4, device=args.device), 8192 if args.device == "cuda" else 2048
    y, a = torch.empty_like(x), torch.randn(n, n, device=args.device).to(args.dtype)
    copying, product = median_seconds(lambda: y.copy_(x), 5), median_seconds(lambda: a @ a, 5)
    return 2 * size / copying, 2 * n**3 / product


def random_model(shape, device, dtype):
    """A Transformer of this shape, as in SHAPES, with random weights."""
    with torch.device("meta"):
        model = transformer.Transformer(Config("qwen2", *shape[:7], 1e-6, 1e6, None, shape[7]))
    model = model.to_empty(device=device).to(dtype).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        weight.fill_(1.0) if "norm" in name else weight.normal_(0, 0.02, generator=generator)
    model.rope_freqs = transformer.rope_frequencies(model.config).to(device)
    return model.eval()


class Limits:
    """In the place of torch.isin: row i of the rollout stops after limit[i] tokens. Rows leave the batch in order, so those left are known."""

    def __init__(self, limit):
        self.t, self.limit, self.left = 0, limit, torch.arange(len(limit), device=limit.device)

    def __call__(self, token, stops):
        if len(token) < len(self.left):
            self.left = self.left[self.limit[self.left] > self.t]
        self.t += 1
        return self.limit[self.left] <= self.t


@contextlib.contextmanager
def limited(limit):
    real, torch.isin = torch.isin, Limits(limit)
    try:
        yield
    finally:
        torch.isin = real


@torch.no_grad()
def share(model, tokens, rounds):
    """What the adapter's branch adds to a forward of (1, tokens), percent: with and without it in turn, the median of the rounds' ratios; R made once, as in sampling."""
    ids = torch.arange(tokens, device=model.embed_tokens.weight.device)[None] % 500
    real, ratios = tinylora.TinyLoRALinear.forward, []
    for _ in range(rounds + 1):
        with tinylora.held(model):
            adapted = seconds(lambda: model.hidden(ids))[0]
        tinylora.TinyLoRALinear.forward = lambda self, x: self.base(x)
        try:
            ratios.append(adapted / seconds(lambda: model.hidden(ids))[0])
        finally:
            tinylora.TinyLoRALinear.forward = real
    return round(100 * (statistics.median(ratios[1:]) - 1), 1)


def wrapped(model, rounds):
    """Put 13 numbers on the model: v, and what that took and adds."""
    took, v = seconds(lambda: tinylora.adapt(model, 13))
    with torch.no_grad():
        v.normal_(0, 1e-3)
    return v, {"wrap seconds": round(took, 2), "worst residual": f"{max(m.residual for m in model.modules() if hasattr(m, 'residual')):.0e}",
               "the adapter's part of a forward, percent": {n: share(model, n, rounds) for n in (32, 256, 1024)}}


class Bench:
    def __init__(self, shape, args):
        self.args, self.rng, self.model = args, np.random.RandomState(0), random_model(SHAPES[shape], args.device, args.dtype)
        self.v, self.wrap = wrapped(self.model, 5 * args.rounds)
        c = self.model.config
        self.weights = sum(w.numel() for n, w in self.model.named_parameters() if n != "embed_tokens.weight" or c.tie_word_embeddings)
        self.kv_bytes = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * self.model.embed_tokens.weight.element_size()  # per token

    def prompts(self, P):
        return self.rng.randint(0, 500, (P, self.args.prompt)).tolist()

    def decode(self, batch, group, tokens, ceiling, graphs=None):
        prompts, noise = self.prompts(batch // group), self.rng.random_sample((batch, tokens))
        self.model.graphs = graphs
        short, long = (median_seconds(lambda: grpo.generate(self.model, prompts, group, n, [-1], 1.0, noise), self.args.rounds) for n in (tokens // 4, tokens))
        self.model.graphs = None
        steps = tokens - tokens // 4
        took = (long - short) / steps
        columns = self.args.prompt * batch // group + batch * (tokens // 4 + tokens) / 2
        data = self.weights * self.model.embed_tokens.weight.element_size() + self.kv_bytes * columns
        best = max(data / ceiling[0], 2 * self.weights * batch / ceiling[1])
        return {"ms a step": round(1e3 * took, 2), "tokens/s": round(batch / took), "of the ceiling, percent": round(100 * best / took, 1)}

    def update(self, batch, group, tokens, ceiling):
        prompts = [p for p in self.prompts(batch // group) for _ in range(group)]
        ids = torch.from_numpy(self.rng.randint(0, 500, (batch, tokens))).to(self.args.device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        took = median_seconds(lambda: self.learn(prompts, ids, mask), self.args.rounds)
        work = 4 * self.weights * (ids.numel() + self.args.prompt * batch // group)
        return {"seconds": round(took, 3), "tokens/s": round(ids.numel() / took), "of the ceiling, percent": round(100 * work / ceiling[1] / took, 1)}

    def learn(self, prompts, ids, mask):
        advantage = torch.tensor([1.0, -1.0], device=ids.device).repeat(len(ids) // 2)
        grpo.update(self.model, [self.v], torch.optim.AdamW([self.v], lr=0.0), prompts, ids, mask, torch.zeros(ids.shape, device=ids.device), advantage,
                    lr=[0.0, 0.0], minibatches=2, micro_tokens=self.args.micro_tokens)

    def recipe(self, graphs):
        """Hours for 350 steps of 64 problems x 4 responses of 301 tokens on average (27M in all; log-normal lengths, at most 1024): one step, measured."""
        mean, batch = 301, 256
        lengths = np.exp(0.5 * self.rng.standard_normal(batch))
        lengths = torch.from_numpy(np.clip(lengths * mean / lengths.mean(), 16, 1024).astype(int)).to(self.args.device)
        prompts, noise, self.model.graphs = self.prompts(64), self.rng.random_sample((batch, int(lengths.max()))), graphs

        def rollout():
            with limited(lengths):
                return grpo.generate(self.model, prompts, 4, noise.shape[1], [-1], 1.0, noise)

        sampling = median_seconds(rollout, self.args.rounds)
        ids, mask, _ = rollout()
        self.model.graphs = None
        learning = median_seconds(lambda: self.learn([p for p in prompts for _ in range(4)], ids, mask), self.args.rounds)
        return {"rollout": round(sampling, 1), "update": round(learning, 1), "response tokens": int(mask.sum()), "hours for 350 steps": round(350 * (sampling + learning) / 3600, 2)}


def same(args):
    """graph.py's tokens and log-probs beside the plain loop's, for small models on this device: fp32, and bf16."""
    out = {}
    for dtype in (torch.float32, torch.bfloat16):
        b = Bench("toy", argparse.Namespace(**vars(args) | {"dtype": dtype}))
        prompts, noise = b.prompts(8), b.rng.random_sample((32, 64))
        plain = grpo.generate(b.model, prompts, 4, 64, [0, 1, 2], 1.0, noise)
        b.model.graphs = Graphs(b.model)
        for _ in range(2):  # captured, then replayed
            fast = grpo.generate(b.model, prompts, 4, 64, [0, 1, 2], 1.0, noise)
        width = min(plain[0].shape[1], fast[0].shape[1])
        equal = (plain[0][:, :width] == fast[0][:, :width]).all(1)
        out[str(dtype)] = {"rows with the same tokens": f"{int(equal.sum())} of 32", "their log-probs differ by": f"{(plain[2][:, :width] - fast[2][:, :width])[equal].abs().max().item():.0e}"}
    return out


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    cli.add_argument("--shapes", nargs="+", default=["0.5B", "1.5B", "7B"] if cuda else ["toy", "135M"], choices=list(SHAPES))
    cli.add_argument("--batches", nargs="+", type=int, default=[16, 64, 256] if cuda else [8, 32, 128])
    cli.add_argument("--tokens", type=int, default=256 if cuda else 64, help="longest response")
    cli.add_argument("--prompt", type=int, default=150 if cuda else 64, help="tokens of a prompt")
    cli.add_argument("--rounds", type=int, default=3)
    args = cli.parse_args()
    args.device, args.dtype, args.micro_tokens = ("cuda", torch.bfloat16, 65536) if cuda else ("cpu", torch.float32, 2048)
    ceiling = ceilings(args)
    result = {"device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads", "torch": torch.__version__,
              "GB/s": round(ceiling[0] / 1e9, 1), "TFLOP/s": round(ceiling[1] / 1e12, 3)}
    print(result, flush=True)

    def show(name, figures):
        result[name] = figures
        print(f"{name}: {figures}", flush=True)

    if cuda:
        show("graph against plain", same(args))
    for shape in args.shapes:
        b = Bench(shape, args)
        show(f"{shape}, start", b.wrap)
        last, half = args.batches[-1], args.tokens // 2
        for batch, group, tokens in [(n, 4, args.tokens) for n in args.batches] + [(last, 1, args.tokens), (last, 8, args.tokens), (last, 4, half)]:
            case = f"{shape}, batch {batch}, group {group}, {tokens} tokens"
            show(f"{case}, decode", b.decode(batch, group, tokens, ceiling))
            if cuda:
                show(f"{case}, decode, graph", b.decode(batch, group, tokens, ceiling, Graphs(b.model)))
            show(f"{case}, update", b.update(batch, group, tokens, ceiling))
        if cuda:
            for name, graphs in (("", None), (", graph", Graphs(b.model))):
                show(f"{shape}, the paper's recipe{name}", b.recipe(graphs))
        del b
    print(json.dumps(result))


if __name__ == "__main__":
    main()
