"""How time grows with batch, group, length and model, and how far it is from the machine's limits:

    python bench/scale.py

    on a GPU  in one call: Qwen2.5's 7B, 1.5B and 0.5B shapes in bf16, what the paper's recipe would
              take (some 350 steps of 256 responses, 27M response tokens), then batches of 16, 64
              and 256, with and without CUDA graphs
    on a CPU  the toy's and SmolLM2-135M's shapes in fp32

Weights are random, which is right for speed alone. Ceilings are measured first: bytes/s of a large
copy, FLOP/s of a large matrix product. A decode step must read every weight and every key and value
once (a prompt's once for its group) and multiply by every weight; its ceiling is the slower of the
two. An update must do 4 FLOP a weight and token (forward, and backward to the activations; frozen
weights need no gradients; the head's second forward is not counted). Times are medians of --rounds;
a decode step's is the difference of two rollouts' lengths, so the pass over the prompts is not in
it. What fails costs its own figures only, and nothing is begun after --minutes. The last line is
JSON. --engine plain measures the plain engine.

--dry: what a GPU would be asked to do, on one that does not exist (tools/dry.py), with few tokens.
It shows that the script and the program run through; its "seconds" are counted, each operation
at the speeds given, and say nothing of a real GPU.
"""
import argparse
import contextlib
import json
import sys
import time

import common
from common import (SHAPES, config_of, limited, median_seconds, random_model, seconds, settings,
                    wrapped)

import numpy as np
import torch

import fast
import grpo
from fast import graph, training
from tools import dry

MEAN = 301  # response tokens of the paper's recipe


def ceilings(args):
    """(bytes/s, FLOP/s), measured."""
    on_cuda = args.device == "cuda"
    size = 2**30 if on_cuda else 2**26
    n = 8192 if on_cuda else 2048
    x = torch.ones(size // 4, device=args.device)
    y = torch.empty_like(x)
    a = torch.randn(n, n, device=args.device).to(args.dtype)
    copying = median_seconds(lambda: y.copy_(x), 5)
    product = median_seconds(lambda: a @ a, 5)
    return 2 * size / copying, 2 * n**3 / product


class Bench:
    """One model of a shape, with 13 numbers on it."""

    def __init__(self, args, ceiling):
        self.args = args
        self.bytes_per_s, self.flops = ceiling
        self.rng = np.random.RandomState(0)
        self.flags = settings(args.device)
        self.engine = grpo if args.engine == "plain" else fast

    def start(self, shape):
        self.model = self.made(SHAPES[shape])
        c = self.model.config
        table = self.model.embed_tokens.weight
        self.head = table.numel()
        self.weights = sum(w.numel() for name, w in self.model.named_parameters()
                           if name != "embed_tokens.weight" or c.tie_word_embeddings)
        self.bytes_per_weight = table.element_size()
        per_token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
        self.kv_bytes = per_token * self.bytes_per_weight
        v, figures = wrapped(self.model, 5 * self.args.rounds)
        self.optimizer = torch.optim.AdamW([v], lr=0.0)
        return figures

    def made(self, shape):
        if self.args.dry:
            return dry.load(self.args.dry, config_of(shape), self.args.dtype)
        return random_model(shape, self.args.device, self.args.dtype)

    def prompts(self, P):
        return self.rng.randint(0, 500, (P, self.args.prompt)).tolist()

    def sample(self, prompts, group, noise, limit=None, graphs=False):
        if graphs and self.model not in graph.GRAPHS:
            fast.use_graphs(self.model)
        kept = None if graphs else graph.GRAPHS.pop(self.model, None)
        try:
            with contextlib.nullcontext() if limit is None else limited(limit):
                return self.engine.generate(self.model, prompts, group, noise.shape[1], [-1], 1.0,
                                            noise)
        finally:
            if kept is not None:
                graph.GRAPHS[self.model] = kept

    def decode(self, batch, group, tokens, graphs=False):
        prompts = self.prompts(batch // group)
        noise = self.rng.random_sample((batch, tokens))
        times = []
        for n in (tokens // 4, tokens):
            part = noise[:, :n]
            times.append(median_seconds(lambda: self.sample(prompts, group, part, None, graphs),
                                        self.args.rounds))
        took = (times[1] - times[0]) / (tokens - tokens // 4)
        columns = self.args.prompt * batch // group + batch * (tokens // 4 + tokens) / 2
        data = self.weights * self.bytes_per_weight + self.kv_bytes * columns
        best = max(data / self.bytes_per_s, 2 * self.weights * batch / self.flops)
        return {"ms a step": round(1e3 * took, 2), "tokens/s": round(batch / took),
                "of the ceiling, percent": round(100 * best / took, 1)}

    def update(self, batch, group, tokens):
        prompts = [p for p in self.prompts(batch // group) for _ in range(group)]
        ids = torch.from_numpy(self.rng.randint(0, 500, (batch, tokens))).to(self.args.device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        rollout = grpo.Rollout(prompts, ids, mask, torch.zeros(ids.shape, device=ids.device), 1.0)
        took = median_seconds(lambda: self.learn(rollout), self.args.rounds)
        prompt_tokens = self.args.prompt * batch // group
        work = 4 * (self.weights * ids.numel() + (self.weights - self.head) * prompt_tokens)
        return {"seconds": round(took, 3), "tokens/s": round(ids.numel() / took),
                "of the ceiling, percent": round(100 * work / self.flops / took, 1),
                "tokens a micro-batch": self.fitting()}

    def learn(self, rollout):
        """The two updates of a step, at a learning rate of 0."""
        B = len(rollout.prompts)
        rollout.advantage = torch.tensor([1.0, -1.0], device=rollout.ids.device).repeat(B // 2)
        for part in rollout.split(2):
            grpo.update(self.model, self.optimizer, part, self.flags, self.engine)

    def fitting(self):
        """Tokens of a micro-batch: halved when memory ran out."""
        return min(self.flags.tokens_per_micro_batch, training.fitting)

    def recipe(self, graphs):
        """Hours for 350 steps of 64 problems x 4 responses, from one step measured after another.

        The lengths are log-normal, 301 tokens on average and at most 1024 (in a dry run 16).
        """
        batch = 256
        lengths = np.exp(0.5 * np.random.RandomState(1).standard_normal(batch))
        lengths = np.clip(lengths * MEAN / lengths.mean(), 16, self.args.longest).astype(int)
        limit = torch.from_numpy(lengths).to(self.args.device)
        prompts = self.prompts(64)
        noise = self.rng.random_sample((batch, int(limit.max())))
        for _ in range(2):
            sampling, rollout = seconds(lambda: self.sample(prompts, 4, noise, limit, graphs))
        for _ in range(2):
            learning, _ = seconds(lambda: self.learn(rollout))
        return {"rollout": round(sampling, 1), "update": round(learning, 1),
                "response tokens": int(rollout.mask.sum()),
                "tokens a micro-batch": self.fitting(),
                "hours for 350 steps": round(350 * (sampling + learning) / 3600, 2)}


def same(args, ceiling, dtype):
    """CUDA graphs' tokens and log-probs beside the plain loop's, captured and then replayed.

    The toy's shape, with rows that leave.
    """
    b = Bench(argparse.Namespace(**vars(args) | {"dtype": dtype, "rounds": 1}), ceiling)
    b.start("toy")
    prompts = b.prompts(8)
    limit = torch.arange(12, 300, 9, device=args.device).clamp(max=args.longest)
    noise = b.rng.random_sample((32, int(limit.max())))
    want = b.sample(prompts, 4, noise, limit)
    result = {}
    for name in ("captured", "replayed"):
        got = b.sample(prompts, 4, noise, limit, graphs=True)
        rows = (want.ids == got.ids).all(1) & (want.mask == got.mask).all(1)
        difference = torch.where(rows[:, None], want.logp - got.logp, 0.0).abs().max().item()
        result[name] = {"rows with the same tokens": f"{int(rows.sum())} of 32",
                        "their log-probs differ by": f"{difference:.0e}"}
    return result


class Report:
    """Figures by name, printed as they come."""

    def __init__(self, args):
        self.began = time.perf_counter()
        self.limit = args.minutes
        self.figures = {}

    def measure(self, name, f, *args, **kw):
        """True if f gave figures."""
        minutes = (time.perf_counter() - self.began) / 60
        if minutes > self.limit:
            self.figures[name] = f"not begun after {minutes:.1f} minutes"
        else:
            try:
                self.figures[name] = f(*args, **kw)
            except Exception as error:  # the other figures are worth having
                self.figures[name] = f"failed: {type(error).__name__}: {error}"[:500]
        print(f"{minutes:4.1f} min, {name}: {self.figures[name]}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return isinstance(self.figures[name], dict)


def parse():
    cli = argparse.ArgumentParser(description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--shapes", nargs="+", choices=list(SHAPES),
                     help="for the last one, group and length are varied too")
    cli.add_argument("--batches", nargs="+", type=int)
    cli.add_argument("--tokens", type=int, help="longest response")
    cli.add_argument("--prompt", type=int, help="tokens of a prompt")
    cli.add_argument("--rounds", type=int)
    cli.add_argument("--engine", default="fast", choices=["fast", "plain"])
    cli.add_argument("--minutes", type=float, help="nothing is begun after this long")
    cli.add_argument("--dry", action="store_true", help="count on a GPU that does not exist")
    given = cli.parse_args()
    cuda = given.dry or torch.cuda.is_available()
    defaults = {"shapes": ["toy", "135M"], "batches": [8, 32, 128], "tokens": 64, "prompt": 64,
                "rounds": 3, "minutes": 60.0}
    if cuda:
        defaults = {"shapes": ["7B", "1.5B", "0.5B"], "batches": [16, 64, 256], "tokens": 256,
                    "prompt": 150, "rounds": 2, "minutes": 9.0}
    if given.dry:
        defaults |= {"tokens": 8, "rounds": 1, "minutes": 60.0}
    chosen = {name: value for name, value in vars(given).items() if value is not None}
    args = argparse.Namespace(**defaults | chosen)
    sizes = (args.tokens < 8, args.prompt < 1, args.rounds < 1)
    if any(n < 8 or n % 8 for n in args.batches) or any(sizes):
        cli.error("--batches are multiples of 8, as groups are of up to 8; --tokens 8, --prompt 1 "
                  "and --rounds 1 are the least")
    args.device = "cuda" if cuda else "cpu"
    args.dtype = torch.bfloat16 if cuda else torch.float32
    args.longest = 16 if args.dry else 1024  # response of the recipe
    return args


def main():
    args = parse()
    if not args.dry:
        return measure(args)
    with dry.gpu() as machine:
        args.dry = machine
        common.clock = lambda: machine.seconds
        return measure(args)


def measure(args):
    cuda = args.device == "cuda"
    graphs = [True, False] if cuda and args.engine == "fast" else [False]
    report = Report(args)
    ceiling = ceilings(args)
    device = f"CPU, {torch.get_num_threads()} threads"
    if cuda:
        device = "none: a dry run" if args.dry else torch.cuda.get_device_name()
    report.figures |= {"device": device, "torch": torch.__version__, "engine": args.engine,
                       "GB/s": round(ceiling[0] / 1e9, 1), "TFLOP/s": round(ceiling[1] / 1e12, 3)}
    print(report.figures, flush=True)
    try:
        if True in graphs:
            for dtype in (torch.float32, torch.bfloat16):
                report.measure(f"graph against plain, {dtype}", same, args, ceiling, dtype)
        for shape in args.shapes:
            b = Bench(args, ceiling)  # lets go of the last one's model before the next is made
            if not report.measure(f"{shape}, start", b.start, shape):
                continue
            for graph_too in graphs if cuda else []:
                name = f"{shape}, the paper's recipe{', graph' * graph_too}"
                report.measure(name, b.recipe, graph_too)
            cases = [(n, 4, args.tokens) for n in args.batches]
            if shape == args.shapes[-1]:
                last = args.batches[-1]
                cases += [(last, 1, args.tokens), (last, 8, args.tokens),
                          (last, 4, args.tokens // 2)]
            for batch, group, tokens in cases:
                case = f"{shape}, batch {batch}, group {group}, {tokens} tokens"
                for graph_too in graphs:
                    name = f"{case}, decode{', graph' * graph_too}"
                    report.measure(name, b.decode, batch, group, tokens, graph_too)
                report.measure(f"{case}, update", b.update, batch, group, tokens)
    finally:
        print(json.dumps(report.figures))


if __name__ == "__main__":
    sys.exit(main())
