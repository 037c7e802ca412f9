"""How much of what v changes is still there when the model computes in bf16:

    python bench/rounding.py --model HuggingFaceTB/SmolLM2-135M-Instruct --text docs/security.md

Training sets out from v = 0 in small steps, whose change of a layer's result is below the last
place of a bf16 number. Measured are the log-probs of all tokens at every place of a text, at v less
at 0: those of the model in bf16, projected on those of the same weights in fp32. 1: on average
rounding takes nothing away; 0: it takes all. Mean and standard error of random directions of v, for
several lengths. The last line is JSON.
"""
import json
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import model as transformer
import tinylora
from support.chat_format import Chat
from support.files import read_text
from support.flags import Parser, count
from support.hub import find_model
from support.program import run_main

LENGTHS = (0.003, 0.01, 0.02)


@torch.no_grad()
def logprobs(model, v, value, ids):
    """(T, vocab), fp32."""
    v.copy_(value)
    return transformer.log_softmax(model(ids), 1.0)[0]


def share(changed, wanted):
    """The projection of one change on the other."""
    return float((changed * wanted).sum() / wanted.square().sum())


def measure(args):
    """{length of v: [share for each direction]}"""
    folder = find_model(args.model)
    ids = torch.tensor([Chat(folder).encode(read_text(args.text))[:args.tokens]])
    rounded = transformer.load(folder, torch.bfloat16)
    exact = transformer.load(folder, torch.bfloat16).float()  # the same weights
    models = [(model, tinylora.adapt(model, args.params, rank=args.rank))
              for model in (rounded, exact)]
    zero = torch.zeros_like(models[0][1])
    start = [logprobs(model, v, zero, ids) for model, v in models]
    found = {}
    for length in LENGTHS:
        shares = []
        for seed in range(args.directions):
            value = np.random.RandomState([11, seed, 0, 0]).standard_normal(zero.shape)
            value = torch.from_numpy(length * value / np.linalg.norm(value))
            changed, wanted = (logprobs(model, v, value, ids) - base
                               for (model, v), base in zip(models, start))
            shares.append(share(changed, wanted))
        found[length] = shares
        error = np.std(shares, ddof=1) / len(shares) ** 0.5 if len(shares) > 1 else float("nan")
        print(f"|v| = {length}: {np.mean(shares):.2f} +- {error:.2f}", flush=True)
    return found


def flags(argv=None):
    cli = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    cli.add_argument("--model", default="toy")
    cli.add_argument("--text", default="docs/security.md")
    cli.add_argument("--tokens", type=count, default=400, help="of the text (400)")
    cli.add_argument("--directions", type=count, default=10, help="of v (10)")
    cli.add_argument("--params", type=count, default=13)
    cli.add_argument("--rank", type=count, default=2)
    return cli.parse_args(argv)


def work(args):
    print(json.dumps(measure(args)))


def main(argv=None):
    return run_main(lambda: flags(argv), work)


if __name__ == "__main__":
    sys.exit(main())
