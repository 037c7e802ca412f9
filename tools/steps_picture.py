"""What happens while it learns, from a sweep's NAME.runs.json (the paper's figure 5):

    python -m tools.steps_picture results/figures/F1.runs.json [OUT.png] [--series NAME]

Three panels by training step: the mean reward of the samples learned from, their length, and how
far trainer and sampler lie apart (the log's `gap`, mean |difference| of log-probs; the paper draws
their KL). A line a setting, the mean of its reported seeds, in a band from the lowest to the
highest of them. --series: only the settings of that line of the sweep's own picture.
"""
import math
import sys
from argparse import RawDescriptionHelpFormatter

from support.errors import InputError
from support.flags import Parser
from support.program import run_main
from support.terminal import printable
from tools.runs import pyplot, save
from tools.sweep_table import listed, load

PANELS = {"reward": "mean reward", "length": "response length (tokens)",
          "gap": "|log-prob: trainer - sampler|"}


def columns(document, series=None):
    """[(setting's name, numbers trained, {panel: [(step, mean, lowest, highest), ...]})].

    A step counts for those of the seeds that have a value there: where no response had a signal,
    there is no gap. InputError: no such series, or runs that did not keep their steps.
    """
    settings = [s for s in document["settings"] if series in (None, s["series"])]
    if not settings:
        known = dict.fromkeys(s["series"] for s in document["settings"])
        raise InputError(f"--series {series!r}: the series are {', '.join(map(repr, known))}")
    found = []
    for setting in settings:
        runs = [document["runs"][key] for key in setting["runs"]]
        if not all(isinstance(run.get("steps"), dict) for run in runs):
            raise InputError(f"{setting['name']!r}: its runs were kept without their steps, by an "
                             f"older version; make them anew")
        panels = {}
        for name in PANELS:
            rows = [run["steps"].get(name, []) for run in runs]
            points = []
            for i in range(max(map(len, rows))):
                values = [row[i] for row in rows if i < len(row) and row[i] is not None]
                if values:
                    points.append((i + 1, sum(values) / len(values), min(values), max(values)))
            panels[name] = points
        found.append((setting["name"], runs[0]["params"], panels))
    return found


def draw(document, out, series=None):
    lines = columns(document, series)
    plt = pyplot()
    figure, axes = plt.subplots(1, len(PANELS), figsize=(14, 4), dpi=110)
    sizes = [math.log(params) for _, params, _ in lines]
    spread = max(sizes) - min(sizes)
    shade = plt.get_cmap("viridis")
    for i, (name, params, panels) in enumerate(lines):
        place = (math.log(params) - min(sizes)) / spread if spread else i / len(lines)
        for axis, panel in zip(axes, PANELS):
            if panels[panel]:
                steps, means, low, high = zip(*panels[panel])
                axis.plot(steps, means, color=shade(0.92 * place), linewidth=1.2, label=name)
                axis.fill_between(steps, low, high, color=shade(0.92 * place), alpha=0.15,
                                  linewidth=0)
    for axis, panel in zip(axes, PANELS):
        axis.set(title=PANELS[panel], xlabel="step")
        axis.grid(alpha=0.3)
    if any(mean > 0 for _, _, panels in lines for _, mean, _, _ in panels["gap"]):
        axes[-1].set_yscale("log")
    handles, names = axes[1].get_legend_handles_labels()  # all have a length; SFT has no reward
    figure.legend(handles, names, fontsize=8, loc="center left", bbox_to_anchor=(0.86, 0.5))
    title = document["definition"]["title"]
    figure.suptitle(f"{title}; seeds {listed(document['seeds'])}")
    figure.tight_layout(rect=(0, 0, 0.86, 1))
    save(figure, out)
    print(printable(f"{out}: {len(lines)} settings"))


def parse(argv):
    cli = Parser(prog="python -m tools.steps_picture", description=__doc__, allow_abbrev=False,
                 formatter_class=RawDescriptionHelpFormatter)
    cli.add_argument("file", metavar="NAME.runs.json")
    cli.add_argument("out", nargs="?", metavar="OUT.png", help="(NAME.steps.png)")
    cli.add_argument("--series", metavar="NAME")
    return cli.parse_args(argv)


def work(args):
    out = args.out or args.file.removesuffix(".runs.json") + ".steps.png"
    draw(load(args.file), out, args.series)


def main(argv=None):
    """Returns the exit code, see program.run_main."""
    return run_main(lambda: parse(argv), work)


if __name__ == "__main__":
    sys.exit(main())
