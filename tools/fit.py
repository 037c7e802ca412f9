"""Which settings fit a GPU's memory: counted on one that does not exist, from config.json alone.

    python -m tools.fit --model Qwen/Qwen2.5-7B-Instruct --gpu 24     # GiB
    python -m tools.fit --table                                       # docs/gpu.md's, some minutes

A folder with config.json will do, or one of the names in MODELS, or any hub name, of which only
config.json is fetched. Counted (tools/dry.py) are a rollout whose rows all run to the limit, in
groups and one a prompt (as evaluations sample), and an update whose micro-batches are full of such
rows. Assumed, not measured: CUDA and its libraries take 1 GiB, and 8% of the rest is lost to the
allocator's fragments and to what operations need inside. bf16, 13 numbers.
"""
import functools
import sys
from argparse import RawDescriptionHelpFormatter

import fast
import grpo
from support.checkpoint import Config, read_config
from support.errors import InputError
from support.flags import Parser
from support.hub import find_model
from support.program import run_main
from tools import dry
from tools.probe import Model

GIB = 2**30
CUDA = 1 * GIB  # assumed
USABLE = 0.92  # assumed
ROWS = (4, 8, 16, 32, 64, 128, 256)  # the largest is train.py's default
TOKENS = (1, 2048, 4096, 8192, 16384, 32768, 65536)  # likewise; 1: a row alone
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}
MODELS = {
    "Qwen/Qwen2.5-0.5B-Instruct":
        Config("qwen2", 151936, 896, 4864, 24, 14, 2, 64, 1e-6, 1e6, None, True),
    "Qwen/Qwen2.5-1.5B-Instruct":
        Config("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, 1e-6, 1e6, None, True),
    "Qwen/Qwen2.5-3B-Instruct":
        Config("qwen2", 151936, 2048, 11008, 36, 16, 2, 128, 1e-6, 1e6, None, True),
    "Qwen/Qwen2.5-7B-Instruct":
        Config("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, 1e-6, 1e6, None, False),
    "meta-llama/Llama-3.1-8B-Instruct":
        Config("llama", 128256, 4096, 14336, 32, 32, 8, 128, 1e-5, 5e5, LLAMA3, False)}
CARDS = (8, 16, 24, 48, 80)  # GiB


class Needs:
    """What a model's phases need, bytes: each counted once. args: the flags of this program."""

    def __init__(self, machine, config, args):
        engine = grpo if args.engine == "plain" else fast
        self.model = Model(machine, config, engine)
        self.args = args
        self.resting = self.model.resting
        self.sampling = functools.cache(self.sampling)
        self.updating = functools.cache(self.updating)

    def sampling(self, rows):
        a = self.args
        groups = {min(a.group, rows), 1}
        return max(self.model.sample(rows, g, a.prompt, a.max_new_tokens) for g in groups)

    def updating(self, budget, recompute):
        a = self.args
        return self.model.update(budget, a.group, a.prompt, a.max_new_tokens, recompute)


def largest(candidates, fits):
    """The largest of the ascending candidates that fits, by bisection; None: not even the first."""
    low = -1
    high = len(candidates)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(candidates[middle]):
            low = middle
        else:
            high = middle
    return candidates[low] if low >= 0 else None


def settings(needs, gib):
    """(rollout rows, tokens a micro-batch, recompute) that fit; None: none do."""
    room = USABLE * (gib * GIB - CUDA)
    if needs.resting > room:
        return None
    rows = largest(ROWS, lambda n: needs.sampling(n) <= room)
    recompute = needs.updating(TOKENS[2], False) > room
    tokens = largest(TOKENS, lambda n: needs.updating(n, recompute) <= room)
    return None if rows is None or tokens is None else (rows, tokens, recompute)


def as_flags(rows, tokens, recompute):
    return (f"--rollout-rows {rows} --tokens-per-micro-batch {tokens}"
            + " --recompute" * recompute)


def config_of(name):
    """The Config of a folder or a hub name. InputError: it cannot be had."""
    if name in MODELS:
        return MODELS[name]
    return read_config(find_model(name, ("config.json",)))


def fit(args):
    if not args.table:
        if args.gpu is None:
            raise InputError("--gpu N: the GPU's memory in GiB is missing")
        report(args)
        return
    print("| model | " + " | ".join(f"{gib} GB" for gib in CARDS) + " |\n|" + "---|" * 6)
    for name, config in MODELS.items():
        with dry.gpu() as machine:
            needs = Needs(machine, config, args)
            cells = [cell(settings(needs, gib)) for gib in CARDS]
        print(f"| {name.partition('/')[2]} | " + " | ".join(cells) + " |", flush=True)


def cell(found):
    if found is None:
        return "no"
    rows, tokens, recompute = found
    return f"{rows}, {tokens:,}" + ", recompute" * recompute


def report(args):
    config = config_of(args.model)
    with dry.gpu() as machine:
        needs = Needs(machine, config, args)
        found = settings(needs, args.gpu)
        if found is None:
            least = max(needs.sampling(ROWS[0]), needs.updating(TOKENS[0], True))
            raise InputError(f"--model {args.model}: does not fit {args.gpu:g} GiB; it needs about "
                             f"{(least / USABLE + CUDA) / GIB:.1f} GiB, or less with a smaller "
                             f"--max-new-tokens; see --shard in docs/running.md")
        rows, tokens, recompute = found
        print(f"{args.model}, bf16, --engine {args.engine}, groups of {args.group}, prompts of "
              f"{args.prompt} tokens, responses of {args.max_new_tokens}; counted, in GB:")
        print(f"  weights and adapter  {needs.resting / 1e9:5.1f}")
        print(f"  a rollout, peak      {needs.sampling(rows) / 1e9:5.1f}   {rows} rows at once")
        print(f"  an update, peak      {needs.updating(tokens, recompute) / 1e9:5.1f}   "
              f"micro-batches of {tokens} tokens" + ", recompute" * recompute)
        print(f"  room                 {USABLE * (args.gpu * GIB - CUDA) / 1e9:5.1f}   assumed: "
              f"{args.gpu:g} GiB less {CUDA / GIB:g} for CUDA, less {1 - USABLE:.0%}")
        print("flags: " + as_flags(*found))


def flags(argv=None):
    cli = Parser(prog="python -m tools.fit", description=__doc__, allow_abbrev=False,
                 formatter_class=RawDescriptionHelpFormatter)
    cli.add_argument("--model", default="Qwen/Qwen2.5-7B-Instruct", help="folder or hub name")
    cli.add_argument("--gpu", type=float, help="memory in GiB")
    cli.add_argument("--engine", default="fast", choices=["fast", "plain"])
    cli.add_argument("--group", type=int, default=4, help="responses to a problem (4)")
    cli.add_argument("--prompt", type=int, default=256, help="tokens of the longest prompt (256)")
    cli.add_argument("--max-new-tokens", type=int, default=1024, help="longest response (1024)")
    cli.add_argument("--table", action="store_true", help="all models and cards")
    args = cli.parse_args(argv)
    if min(args.group, args.prompt) < 1 or args.max_new_tokens < 16:
        cli.error("--group and --prompt are at least 1, --max-new-tokens 16")
    return args


def main(argv=None):
    return run_main(lambda: flags(argv), fit)


if __name__ == "__main__":
    sys.exit(main())
