"""Draw runs from their logs (needs matplotlib; the picture is plot.png if no name is given):

    python -m tools.plot RUN [RUN ...] [OUT.png]            scores, length, entropy, ... by step
    python -m tools.plot --claim RUN [RUN ...] [OUT.png]    one panel, see tools/claim.py

RUN is a folder that train.py wrote, finished or not. Runs whose settings differ in nothing but the
seed are drawn as one line, their mean, in a band from the lowest to the highest of them.
"""
import json
import math
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.errors import InputError
from support.flags import Parser
from support.program import run_main
from support.terminal import printable
from tools import claim
from tools.runs import NORM, by_setting, mean_and_band, pyplot, read_run, save

PICTURES = (".png", ".svg", ".pdf")
COLUMNS = 3  # panels side by side


def labels(groups):
    """A legend's text for each setting: what differs between them, and how many seeds.

    What differs between two methods follows from the methods, so only these are named.
    """
    settings = [setting for setting, _ in groups]
    methods = {setting.get("method") for setting in settings}
    texts = []
    for setting, members in groups:
        alike = [s for s in settings if s.get("method") == setting.get("method")]
        names = dict.fromkeys(name for s in alike for name in s)
        differ = [n for n in names if len({json.dumps(s.get(n)) for s in alike}) > 1]
        parts = [str(setting.get("method"))] if len(methods) > 1 else []
        parts += [f"{name} {shortest(setting[name], alike, name)}"
                  for name in differ if name in setting]
        seeds = f"{len(members)} seeds: mean, and from lowest to highest"
        if len(members) == 1:
            seeds = "1 seed"
        texts.append(f"{', '.join(parts) or 'all runs'} ({seeds})")
    return texts


def shortest(value, settings, name):
    """A setting's value in a legend: of a path its last part, where that tells it from others."""
    if not isinstance(value, str):
        return f"{value:g}" if isinstance(value, float) else str(value)
    others = {str(s[name]) for s in settings if name in s}
    ends = {Path(other).name for other in others}
    text = Path(value).name if len(ends) == len(others) else value
    return text if len(text) <= 40 else f"{text[:39]}..."


def draw(runs, out):
    """All panels that any of the runs has points for."""
    plt = pyplot()
    groups = by_setting(runs)
    titles = list(dict.fromkeys(title for run in runs for title in run.points))
    titles.sort(key=lambda title: title == NORM)  # last
    if not titles:
        raise InputError("these runs have made no step yet: there is nothing to draw")
    columns = min(COLUMNS, len(titles))
    lines = math.ceil(len(titles) / columns)
    legend = 0.2 * len(groups) + 0.15  # inches
    height = 3.1 * lines + legend
    figure, axes = plt.subplots(lines, columns, figsize=(4.4 * columns, height), dpi=110,
                                squeeze=False)
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    handles = {}
    for axis, title in zip(axes.flat, titles):
        for i, ((_, members), label) in enumerate(zip(groups, labels(groups))):
            steps, means, low, high = mean_and_band(members, title)
            if not steps:
                continue
            style = "-" if len(steps) > 20 else "o-" if len(steps) > 2 else "o:"
            colour = colours[i % len(colours)]
            handles[label], = axis.plot(steps, means, style, markersize=3, color=colour)
            if len(members) > 1:
                axis.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.set(title=title, xlabel="step")
        bottom, top = axis.dataLim.intervaly
        if title.startswith(("held-out", "reward")) and 0 <= bottom and top <= 1:
            axis.set_ylim(-0.02, 1.04)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(titles):]:
        axis.axis("off")
    figure.legend(handles.values(), handles.keys(), loc="lower center", fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, legend / height, 1, 1))
    save(figure, out)
    print(printable(f"{out}: {len(runs)} run{'s' if len(runs) > 1 else ''} "
                    f"of {len(groups)} setting{'s' if len(groups) > 1 else ''}"))


def parse(argv):
    cli = Parser(prog="python -m tools.plot", description=__doc__, allow_abbrev=False,
                 formatter_class=RawDescriptionHelpFormatter)
    cli.add_argument("--claim", action="store_true", help="one panel: accuracy against steps")
    cli.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder; last, the picture")
    args = cli.parse_args(argv)
    args.out = "plot.png"
    if args.runs[-1].endswith(PICTURES):
        args.out = args.runs.pop()
    if not args.runs:
        cli.error("the following arguments are required: RUN")
    return args


def work(args):
    pyplot()  # before anything is read
    runs = [read_run(folder) for folder in args.runs]
    if args.claim:
        claim.draw(runs, args.out)
    else:
        draw(runs, args.out)


def main(argv=None):
    """Returns the exit code: 0, or 2 (a mistake of the user's, told in one line)."""
    return run_main(lambda: parse(argv), work)


if __name__ == "__main__":
    sys.exit(main())
