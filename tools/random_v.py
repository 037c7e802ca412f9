"""How good are random values of v? Draws some, and keeps the best on training problems.

    python -m tools.random_v OUT [--count N] [--sd S] [--problems K] [--seed N] -- FLAGS

FLAGS are train.py's, as for a run: the model, the task, how many numbers. Each v is drawn from
N(0, sd^2) and scored on the first K training problems, greedily, beside v = 0. OUT/random_v.json
has all scores, OUT/adapter.safetensors the best v. The best of many looks better than it is, so it
must be confirmed on other problems:

    python train.py --eval-only --adapter OUT/adapter.safetensors ...

(After arXiv 2603.12228, which finds good solutions dense around a pretrained model's weights.)
"""
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch

import tinylora
import train
from support.data import load_problems
from support.errors import InputError
from support.files import make_folder, write_json
from support.flags import Parser, count, natural, positive
from support.params import with_values
from support.program import run_main
from tools import opened


def draw(shape, sd, seed, index):
    """v number `index`; the stream's first word is its own, see tinylora.random_P."""
    values = np.random.RandomState([10, seed, index, 0]).standard_normal(shape) * sd
    return torch.from_numpy(values).float()


def parse(argv):
    words = sys.argv[1:] if argv is None else argv
    own, flags = words, []
    if "--" in words:
        own = words[:words.index("--")]
        flags = words[words.index("--") + 1:]
    cli = Parser(prog="python -m tools.random_v", description=__doc__, allow_abbrev=False,
                 formatter_class=RawDescriptionHelpFormatter)
    cli.add_argument("out", metavar="OUT")
    cli.add_argument("--count", type=count, default=32, help="how many v's (32)")
    cli.add_argument("--sd", type=positive, default=0.1, help="their standard deviation (0.1)")
    cli.add_argument("--problems", type=count, default=64, help="training problems (64)")
    cli.add_argument("--seed", type=natural, default=0, help="of the draws (0)")
    args = cli.parse_args(own)
    args.words = flags
    args.flags = train.flags(flags)
    if args.flags.method not in ("tinylora", "lora-xs"):
        raise InputError(f"--method {args.flags.method} has no v")
    if args.flags.eval_only or args.flags.chat:
        raise InputError("tools.random_v evaluates by itself; leave out --eval-only and --chat")
    return args


def work(args):
    out = Path(args.out)
    if out.is_dir():  # it may be that of a trained run, whose adapter has the same name
        raise InputError(f"{out}: exists already; choose another folder")
    make_folder(out)
    flags = args.flags
    found = {"sd": args.sd, "seed": args.seed, "flags": args.words, "v": []}
    with opened.opened(flags) as (run, [v], _):
        training, _ = load_problems(run.task, flags)
        problems = training[:args.problems]

        def score(value, label):
            with with_values([v], [value]):
                return train.evaluate(run, problems, label, 0)[flags.reward]

        found["problems"] = len(problems)
        found["base"] = score(torch.zeros_like(v), "v = 0")
        for i in range(args.count):
            value = draw(tuple(v.shape), args.sd, args.seed, i).to(v)
            found["v"].append({"score": score(value, f"v {i + 1}/{args.count}"),
                               "value": value.flatten().tolist()})
            write_json(out / "random_v.json", found)
        best = max(found["v"], key=lambda drawn: drawn["score"])
        with with_values([v], [torch.tensor(best["value"]).to(v).view_as(v)]):
            tinylora.save(out / "adapter.safetensors", v, run.model, flags.v_dtype, flags.model)
    print(f"{args.count} v's of sd {args.sd:g} on {len(problems)} training problems, greedy "
          f"{flags.reward}: untrained {found['base']:.3f}, best {best['score']:.3f}, "
          f"{sum(drawn['score'] > found['base'] for drawn in found['v'])} above the untrained "
          f"model; next: python train.py --eval-only --adapter {out / 'adapter.safetensors'}")


def main(argv=None):
    """Returns the exit code, see program.run_main."""
    return run_main(lambda: parse(argv), work)


if __name__ == "__main__":
    sys.exit(main())
