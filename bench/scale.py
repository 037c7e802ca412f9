"""How time grows with batch, group, length and model size, and how far it is from what the machine allows: python bench/scale.py

    on a GPU    everything in one call: Qwen2.5's 7B, 1.5B and 0.5B shapes in bf16, what the paper's recipe would take (about 350 steps of
                256 responses, 27M response tokens), then batches of 16, 64 and 256, with and without graph.py
    on a CPU    the toy's and SmolLM2-135M's shapes in fp32

Weights are random, which is right for speed alone. Ceilings are measured first: bytes/s of a large copy, FLOP/s of a large matmul.
A decode step must read every weight and every key and value once (a prompt's once for its group) and multiply by every weight;
its ceiling is the slower of the two. An update must do 4 FLOP a weight and token (forward, and backward to the activations; the
weights' own gradients are not needed; the head's second forward is not counted). Times are medians of --rounds; a decode step's is the
difference of two rollouts' lengths, so the prompts' pass is not in it. What fails costs its own figures only, and nothing is begun after
--minutes. The last line is JSON.
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
        if "layers" in name and weight.dim() == 2:  # a few directions stand out of the noise, as in trained weights
            left, right = (weight.new_empty(size).normal_(0, 0.02, generator=generator) for size in ((len(weight), 8), (8, weight.shape[1])))
            strength = 150 * torch.arange(1, 9, device=device)**-0.5 / min(weight.shape)**0.5
            weight.addmm_(left * strength.to(dtype), right)
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
    def __init__(self, args, ceiling):
        self.args, self.ceiling, self.rng, self.micro_tokens = args, ceiling, np.random.RandomState(0), args.micro_tokens

    def start(self, shape):
        self.model = random_model(SHAPES[shape], self.args.device, self.args.dtype)
        c, embeddings = self.model.config, self.model.embed_tokens.weight
        self.graphs, self.head = Graphs(self.model), embeddings.numel()
        self.weights = sum(w.numel() for n, w in self.model.named_parameters() if n != "embed_tokens.weight" or c.tie_word_embeddings)
        self.kv_bytes = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * embeddings.element_size()  # per token
        self.v, figures = wrapped(self.model, 5 * self.args.rounds)
        return figures

    def prompts(self, P):
        return self.rng.randint(0, 500, (P, self.args.prompt)).tolist()

    def sample(self, prompts, group, noise, limit=None, graph=False):
        self.model.graphs = self.graphs if graph else None
        try:
            with contextlib.nullcontext() if limit is None else limited(limit):
                return grpo.generate(self.model, prompts, group, noise.shape[1], [-1], 1.0, noise)
        finally:
            self.model.graphs = None

    def decode(self, batch, group, tokens, graph=False):
        prompts, noise = self.prompts(batch // group), self.rng.random_sample((batch, tokens))
        short, long = (median_seconds(lambda: self.sample(prompts, group, noise[:, :n], None, graph), self.args.rounds) for n in (tokens // 4, tokens))
        took = (long - short) / (tokens - tokens // 4)
        columns = self.args.prompt * batch // group + batch * (tokens // 4 + tokens) / 2
        data = self.weights * self.model.embed_tokens.weight.element_size() + self.kv_bytes * columns
        best = max(data / self.ceiling[0], 2 * self.weights * batch / self.ceiling[1])
        return {"ms a step": round(1e3 * took, 2), "tokens/s": round(batch / took), "of the ceiling, percent": round(100 * best / took, 1)}

    def update(self, batch, group, tokens):
        prompts = [p for p in self.prompts(batch // group) for _ in range(group)]
        ids = torch.from_numpy(self.rng.randint(0, 500, (batch, tokens))).to(self.args.device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        took = median_seconds(lambda: self.learn(prompts, ids, mask), self.args.rounds)
        work = 4 * (self.weights * ids.numel() + (self.weights - self.head) * self.args.prompt * batch // group)
        return {"seconds": round(took, 3), "tokens/s": round(ids.numel() / took), "of the ceiling, percent": round(100 * work / self.ceiling[1] / took, 1),
                "tokens a micro-batch": self.micro_tokens}

    def learn(self, prompts, ids, mask):
        advantage = torch.tensor([1.0, -1.0], device=ids.device).repeat(len(ids) // 2)
        metrics = grpo.update(self.model, [self.v], torch.optim.AdamW([self.v], lr=0.0), prompts, ids, mask, torch.zeros(ids.shape, device=ids.device), advantage,
                              lr=[0.0, 0.0], minibatches=2, micro_tokens=self.micro_tokens)
        self.micro_tokens = metrics["micro_tokens"]  # what fitted, as train.py does

    def recipe(self, graph):
        """Hours for 350 steps of 64 problems x 4 responses of 301 tokens on average (27M in all; log-normal lengths, at most 1024): one step, measured after another."""
        mean, batch = 301, 256
        lengths = np.exp(0.5 * np.random.RandomState(1).standard_normal(batch))
        lengths = torch.from_numpy(np.clip(lengths * mean / lengths.mean(), 16, 1024).astype(int)).to(self.args.device)
        prompts, noise = self.prompts(64), self.rng.random_sample((batch, int(lengths.max())))
        for _ in range(2):
            sampling, (ids, mask, _) = seconds(lambda: self.sample(prompts, 4, noise, lengths, graph))
        for _ in range(2):
            learning, _ = seconds(lambda: self.learn([p for p in prompts for _ in range(4)], ids, mask))
        return {"rollout": round(sampling, 1), "update": round(learning, 1), "response tokens": int(mask.sum()), "tokens a micro-batch": self.micro_tokens,
                "hours for 350 steps": round(350 * (sampling + learning) / 3600, 2)}


def same(args, ceiling, dtype):
    """graph.py's tokens and log-probs beside the plain loop's, for the toy's shape with rows that leave: captured, then replayed."""
    b = Bench(argparse.Namespace(**vars(args) | {"dtype": dtype, "rounds": 1}), ceiling)
    b.start("toy")
    prompts, noise, limit = b.prompts(8), b.rng.random_sample((32, 300)), torch.arange(12, 300, 9, device=args.device)
    ids, mask, logp = b.sample(prompts, 4, noise, limit)
    out = {}
    for name in ("captured", "replayed"):
        fast_ids, fast_mask, fast = b.sample(prompts, 4, noise, limit, True)
        rows = (ids == fast_ids).all(1) & (mask == fast_mask).all(1)
        out[name] = {"rows with the same tokens": f"{int(rows.sum())} of 32", "their log-probs differ by": f"{torch.where(rows[:, None], logp - fast, 0.0).abs().max().item():.0e}"}
    return out


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    cli.add_argument("--shapes", nargs="+", default=["7B", "1.5B", "0.5B"] if cuda else ["toy", "135M"], choices=list(SHAPES), help="the last one's group and length are varied too")
    cli.add_argument("--batches", nargs="+", type=int, default=[16, 64, 256] if cuda else [8, 32, 128])
    cli.add_argument("--tokens", type=int, default=256 if cuda else 64, help="longest response")
    cli.add_argument("--prompt", type=int, default=150 if cuda else 64, help="tokens of a prompt")
    cli.add_argument("--rounds", type=int, default=2 if cuda else 3)
    cli.add_argument("--minutes", type=float, default=9.0 if cuda else 60.0, help="nothing is begun after this long")
    args = cli.parse_args()
    if any(n < 8 or n % 8 for n in args.batches) or args.tokens < 8 or args.prompt < 1 or args.rounds < 1:
        cli.error("--batches are multiples of 8, as groups are of up to 8; --tokens 8, --prompt 1 and --rounds 1 are the least")
    began = time.perf_counter()
    args.device, args.dtype, args.micro_tokens = ("cuda", torch.bfloat16, 65536) if cuda else ("cpu", torch.float32, 2048)
    ceiling = ceilings(args)
    result = {"device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads", "torch": torch.__version__,
              "GB/s": round(ceiling[0] / 1e9, 1), "TFLOP/s": round(ceiling[1] / 1e12, 3)}
    print(result, flush=True)

    def show(name, measure, *wanted):
        minutes = (time.perf_counter() - began) / 60
        if minutes > args.minutes:
            result[name] = f"not begun after {minutes:.1f} minutes"
        else:
            try:
                result[name] = measure(*wanted)
            except Exception as error:  # the other figures are worth having
                result[name] = f"failed: {type(error).__name__}: {error}"[:500]
        print(f"{minutes:4.1f} min, {name}: {result[name]}", flush=True)
        if cuda:
            torch.cuda.empty_cache()
        return isinstance(result[name], dict)

    try:
        if cuda:
            for dtype in (torch.float32, torch.bfloat16):
                show(f"graph against plain, {dtype}", same, args, ceiling, dtype)
        for shape in args.shapes:
            b = Bench(args, ceiling)  # lets go of the last one's model before the next is made
            if not show(f"{shape}, start", b.start, shape):
                continue
            if cuda:
                show(f"{shape}, the paper's recipe, graph", b.recipe, True)
                show(f"{shape}, the paper's recipe", b.recipe, False)
            last, half = args.batches[-1], args.tokens // 2
            growth = [(last, 1, args.tokens), (last, 8, args.tokens), (last, 4, half)] if shape == args.shapes[-1] else []
            for batch, group, tokens in [(n, 4, args.tokens) for n in args.batches] + growth:
                case = f"{shape}, batch {batch}, group {group}, {tokens} tokens"
                if cuda:
                    show(f"{case}, decode, graph", b.decode, batch, group, tokens, True)
                show(f"{case}, decode", b.decode, batch, group, tokens)
                show(f"{case}, update", b.update, batch, group, tokens)
    finally:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
