"""How many times more numbers SFT needs than RL for the same score, from two sweeps' JSONs:

    python -m tools.factor results/figures/F1.runs.json results/figures/F2.runs.json worked own

The last words are kinds of SFT: the settings of the second sweep whose names end so, after a comma.
For each setting of the first sweep's TinyLoRA and LoRA-XS, and seed by seed: SFT's curve is the
best score with at most so many numbers, straight between neighbours over the logarithm of the
numbers; where it reaches the RL run's score, the factor is its numbers by RL's. Reported: the
median seed, lowest and highest. "> 100" means that even the most numbers of SFT's, 100 times as
many, do not reach the score; "< 0.1" that its fewest, a tenth, reach it already.
"""
import math
import sys
from argparse import RawDescriptionHelpFormatter

from support.errors import InputError
from support.flags import Parser
from support.program import run_main
from support.scores import MODES
from tools.runs import markdown_table, reading
from tools.sweep_table import load


def best_so_far(points):
    """The curve of points [(numbers, score), ...]: [(numbers, best score with at most so many)]."""
    best = {}
    for n, value in sorted(points):
        best[n] = max(value, *best.values()) if best else value
    return list(best.items())


def neighbours(points, score):
    """Between which numbers, both measured, the curve of points reaches a score: (low, high).

    low is 0 if the first point reaches it already, high infinite if none does.
    """
    curve = best_so_far(points)
    below = [n for n, value in curve if value < score]
    reached = [n for n, value in curve if value >= score]
    return max(below, default=0), min(reached, default=math.inf)


def numbers_needed(points, score):
    """(sign, numbers) at which the curve of points [(numbers, score), ...] reaches a score.

    sign: "" there, "<" at the first point already, ">" not at the last.
    """
    curve = best_so_far(points)
    if curve[0][1] >= score:
        return "<", curve[0][0]
    for (n, low), (m, high) in zip(curve, curve[1:]):
        if high >= score:
            share = (score - low) / (high - low)
            return "", math.exp(math.log(n) + share * (math.log(m) - math.log(n)))
    return ">", curve[-1][0]


def seeds_of(setting, rl, sft, kind, mode):
    """What is compared: [(RL's numbers, SFT's points, RL's score) of each seed]."""
    if rl["seeds"] != sft["seeds"]:
        raise InputError(f"the sweeps have other seeds: {rl['seeds']} and {sft['seeds']}")
    settings = [s for s in sft["settings"] if s["name"].endswith(f", {kind}")]
    if not settings:
        raise InputError(f"no setting's name ends with ', {kind}'")
    found = []
    for i, key in enumerate(setting["runs"]):
        run = rl["runs"][key]
        score = run["score"]
        others = [sft["runs"][s["runs"][i]] for s in settings]
        points = [(other["params"], other["final"][mode][score]) for other in others]
        found.append((run["params"], points, run["final"][mode][score]))
    return found


def factors(setting, rl, sft, kind, mode):
    """[(factor, sign) of each seed], from the lowest to the highest."""
    found = []
    for params, points, score in seeds_of(setting, rl, sft, kind, mode):
        sign, numbers = numbers_needed(points, score)
        found.append((numbers / params, sign))
    return sorted(found)


def between(setting, rl, sft, kind, mode):
    """[(low, high) of each seed]: the factor lies between these, which measured numbers give."""
    found = []
    for params, points, score in seeds_of(setting, rl, sft, kind, mode):
        low, high = neighbours(points, score)
        found.append((low / params, high / params))
    return found


def markdown(rl, sft, kinds):
    """A row for each setting of RL's TinyLoRA and LoRA-XS, a column for each kind and mode."""
    columns = [(kind, mode) for kind in kinds for mode in MODES]
    header = ["by RL", "numbers", *(f"SFT, {kind}: {mode}" for kind, mode in columns)]
    lines = []
    for setting in rl["settings"]:
        if setting["series"].startswith(("TinyLoRA", "LoRA-XS")):
            cells = [text(factors(setting, rl, sft, kind, mode)) for kind, mode in columns]
            numbers = rl["runs"][setting["runs"][0]]["params"]
            lines.append([setting["name"], f"{numbers:,}", *cells])
    return markdown_table(header, lines)


def text(found):
    """The median of sorted (factor, sign), lowest and highest."""
    words = [f"{sign} {value:,.2g}".strip() if value < 10 else f"{sign} {value:,.0f}".strip()
             for value, sign in found]
    return f"{words[(len(words) - 1) // 2]} ({words[0]} to {words[-1]})"


def parse(argv):
    cli = Parser(prog="python -m tools.factor", description=__doc__, allow_abbrev=False,
                 formatter_class=RawDescriptionHelpFormatter)
    cli.add_argument("rl", metavar="RL.runs.json")
    cli.add_argument("sft", metavar="SFT.runs.json")
    cli.add_argument("kinds", metavar="KIND", nargs="+")
    return cli.parse_args(argv)


def work(args):
    with reading("a sweep's", args.rl, args.sft):
        print(markdown(load(args.rl), load(args.sft), args.kinds))


def main(argv=None):
    """Returns the exit code, see program.run_main."""
    return run_main(lambda: parse(argv), work)


if __name__ == "__main__":
    sys.exit(main())
