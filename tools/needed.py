"""How many trained numbers reach most of what can be gained, by model size, from a sweep's JSON:

    python -m tools.needed results/figures/F3.runs.json
    python -m tools.needed results/figures/CURVE.runs.json --of LoRA --share 0.5

A series of the sweep is a size, the smallest model first; its curve is the mean score over the
numbers trained. The peak gain is the best setting's of that size, over the untrained model. A
setting with "peak" in its name counts for the peak only: where LoRA of rank 1 has more numbers in a
larger model, a curve that ended there would reach the same score later. Reported, as in the paper's
figure 3: the numbers at which the curve reaches 90, 95 and 97.5% of the peak gain, straight between
neighbours over the logarithm of the numbers; "<" at its first point already, ">" not at its last.
For the first share the seeds' lowest and highest, too: each seed's curve against the mean peak. A
size whose peak gain is below 0.1 has none.

--of SERIES: a sweep of one model. All its settings make one curve, and the peak gain is that of the
best setting of this series.
"""
import sys
from argparse import RawDescriptionHelpFormatter
from statistics import mean

from support.errors import InputError
from support.flags import Parser, fraction
from support.program import run_main
from support.scores import MODES
from tools.factor import numbers_needed
from tools.runs import markdown_table, reading
from tools.sweep_table import load

SHARES = (0.9, 0.95, 0.975)  # of the peak gain
LEAST = 0.1  # a peak gain of which shares can be asked


def curves(document, mode):
    """{size: (untrained score, peak score, [(numbers, [score of each seed]), ...])}, in order."""
    found = {}
    for setting in document["settings"]:
        runs = [document["runs"][key] for key in setting["runs"]]
        score = runs[0]["score"]
        scores = [run["final"][mode][score] for run in runs]
        base, peak, points = found.get(setting["series"], (runs[0]["base"][mode][score], 0.0, []))
        if "peak" not in setting["name"]:
            points = [*points, (runs[0]["params"], scores)]
        found[setting["series"]] = (base, max(peak, mean(scores)), points)
    return found


def of_series(document, mode, series):
    """The same of one model: {"all settings": ...}, with the peak of one series."""
    found = curves(document, mode)
    if series not in found:
        raise InputError(f"no series {series!r}; there are {', '.join(found)}")
    base, peak, _ = found[series]
    points = [point for *_, points in found.values() for point in points]
    return {"all settings": (base, peak, points)}


def needed(base, peak, points, share):
    """((sign, numbers) of the mean curve, [the same of each seed], from the lowest)."""
    wanted = base + share * (peak - base)
    means = [(n, mean(scores)) for n, scores in points]
    seeds = [[(n, scores[i]) for n, scores in points] for i in range(len(points[0][1]))]
    each = sorted((numbers_needed(curve, wanted) for curve in seeds),
                  key=lambda found: (found[1], found[0] == ">"))
    return numbers_needed(means, wanted), each


def text(found):
    sign, numbers = found
    return f"{sign} {numbers:,.{1 if numbers < 10 else 0}f}".strip()


def markdown(document, shares=SHARES, series=None):
    """A row for each size and mode."""
    rows = []
    for mode in MODES:
        sizes = of_series(document, mode, series) if series else curves(document, mode)
        for size, (base, peak, points) in sizes.items():
            cells = ["" for _ in shares]
            if peak - base >= LEAST:
                cells = [text(needed(base, peak, points, share)[0]) for share in shares]
                _, seeds = needed(base, peak, points, shares[0])
                cells[0] += f" ({text(seeds[0])} to {text(seeds[-1])})"
            rows.append((mode, size, f"{base:.3f}", f"{peak:.3f}", *cells))
    peak = f"peak of {series}" if series else "peak"
    columns = [f"numbers for {100 * share:g}%" for share in shares]
    return markdown_table(("", "curve", "untrained", peak, *columns), rows)


def parse(argv):
    cli = Parser(prog="python -m tools.needed", description=__doc__, allow_abbrev=False,
                 formatter_class=RawDescriptionHelpFormatter)
    cli.add_argument("sweep", metavar="NAME.runs.json")
    cli.add_argument("--of", metavar="SERIES", help="whose gain counts, in a sweep of one model")
    cli.add_argument("--share", type=fraction, nargs="+", default=SHARES, help="of the peak gain")
    return cli.parse_args(argv)


def work(args):
    with reading("a sweep's", args.sweep):
        print(markdown(load(args.sweep), args.share, args.of))


def main(argv=None):
    """Returns the exit code, see program.run_main."""
    return run_main(lambda: parse(argv), work)


if __name__ == "__main__":
    sys.exit(main())
