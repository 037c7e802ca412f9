"""How long the paper's recipe must take at least on a card of stated speeds, counted:

    python bench/floor.py                   # some minutes; --models N... --engine plain

For each model, on a GPU that does not exist (tools/dry.py), in bf16: load, adapt (with the SVD), a
decoding step of 256 rows, a rollout of 64 problems x 4 responses, the step's update, and 350 such
steps. Lengths are log-normal,
301 tokens on average and at most 1024, as in bench/scale.py; prompts have 150.

A floor is the larger of FLOPs / the card's FLOP/s and bytes / the card's bytes/s. The bytes are
those of matrix products and attention alone, each operand once: weights, keys and values. Rows that
have ended cost nothing. "As it stands" adds every other operation, one after another, each reading
and writing memory once, none in a cache; what Python needs to launch them is in neither. The speeds
are an H100 SXM's from NVIDIA's data sheet: 989 TFLOP/s dense bf16, 3.35 TB/s. The last line is
JSON.
"""
import argparse
import json
import resource
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

import fast
import grpo
from tools import dry, fit
from tools.probe import Model

BYTES_PER_S = 3.35e12
FLOPS_PER_S = 989e12
PROMPT = 150
STEPS = 350


def lengths():
    """Of 256 responses, in tokens."""
    x = np.exp(0.5 * np.random.RandomState(1).standard_normal(256))
    return np.clip(x * 301 / x.mean(), 16, 1024).astype(int)


def floor(flops, data):
    return max(flops / FLOPS_PER_S, data / BYTES_PER_S)


class Steps:
    """A decoding step's counts at any number of rows and columns, from three of them.

    Each count is c + a rows + k rows columns: weights, what each row has, keys and values.
    """

    def __init__(self, model):
        self.at = model.decode(256, 4, PROMPT, 300)
        shapes = [(256, 300), (256, 600), (128, 300)]
        found = [self.at, *(model.decode(rows, 4, PROMPT, column) for rows, column in shapes[1:])]
        terms = np.array([[1, rows, rows * column] for rows, column in shapes], dtype=float)
        self.parts = {name: np.linalg.solve(terms, [x[name] for x in found]) for name in self.at}

    def count(self, name, rows, column):
        return self.parts[name] @ [1, rows, rows * column]

    def rollout(self):
        """(floor, as it stands) of a rollout, seconds."""
        n = lengths()
        steps = [(int((n > t).sum()), t) for t in range(1, n.max())]
        least = sum(floor(self.count("flops", *x), self.count("product_bytes", *x)) for x in steps)
        return float(least), sum(float(self.count("seconds", *x)) for x in steps)


def figures(config, engine):
    began = time.perf_counter()
    with dry.gpu(BYTES_PER_S, FLOPS_PER_S) as machine:
        model = Model(machine, config, engine, svd=engine.svd)
        steps = Steps(model)
        model.update(16384, 4, PROMPT, 301, False)
        share = 256 / model.rows  # of the rows of one micro-batch
        updating = share * floor(machine.flops, machine.product_bytes)
        flops = share * machine.flops
        stands = share * machine.seconds
    x = steps.at
    least, slow = steps.rollout()
    return {"step, ms": round(1e3 * floor(x["flops"], x["product_bytes"]), 2),
            "step as it stands, ms": round(1e3 * x["seconds"], 2),
            "operations": round(x["operations"]), "host reads a token": x["reads"],
            "GFLOP a token": round(x["flops"] / 256 / 1e9, 2),
            "rollout, s": round(least, 2), "rollout as it stands, s": round(slow, 2),
            "update, s": round(updating, 2), "update as it stands, s": round(stands, 2),
            "PFLOP an update": round(flops / 1e15, 2),
            "350 steps, hours": round(STEPS * (least + updating) / 3600, 2),
            "as it stands, hours": round(STEPS * (slow + stands) / 3600, 2),
            "counted in, s": round(time.perf_counter() - began, 1),
            "peak of this process, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000}


def main():
    cli = argparse.ArgumentParser(description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--models", nargs="+", choices=list(fit.MODELS), default=list(fit.MODELS))
    cli.add_argument("--engine", default="fast", choices=["fast", "plain"])
    args = cli.parse_args()
    found = {}
    for name in args.models:
        found[name] = figures(fit.MODELS[name], grpo if args.engine == "plain" else fast)
        print(name, found[name], flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
