"""Tables and pictures of the JSON that tools/path.py wrote, from it alone:

    python -m tools.path_picture FILE.json

Beside it: FILE.png, v by step, a panel a run; FILE.line.png, the score at multiples of the trained
v, and of what the early steps predict; FILE.coordinates.png, the score with one number of v alone
and with all but one, where they were measured.
"""
import math
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from support.errors import InputError
from support.files import LARGEST_DATA, read_json
from support.flags import Parser
from support.program import run_main
from support.scores import MODES, main_score
from support.terminal import printable
from tools.runs import markdown_table, pyplot, reading, save

LINES = {" x": "trained", " x predicted": "predicted"}  # the points' names after the multiple
ENDS = {"0 x": "untrained", "early": "early", "extrapolated": "extrapolated", "1 x": "trained"}
MARKS = {"early": "s", "extrapolated": "X"}
COLUMNS = 3  # panels side by side


def load(path):
    """{run: its entry} of a JSON, those with evaluations. InputError if there is none."""
    runs = read_json(path, LARGEST_DATA).get("runs")
    if not isinstance(runs, dict):
        raise InputError(f"{path}: was not written by tools.path")
    runs = {folder: run for folder, run in runs.items() if {"0 x", "1 x"} <= run["points"].keys()}
    if not runs:
        raise InputError(f"{path}: has no run that is measured; run tools.path again")
    return runs


def titles(runs):
    """{run: what a legend calls it}: its seed, or its folder where two have one seed."""
    seeds = [run["seed"] for run in runs.values()]
    if len(set(seeds)) == len(seeds):
        return {folder: f"seed {run['seed']}" for folder, run in runs.items()}
    return {folder: printable(folder) for folder in runs}


def score_of(run):
    """The name of the task's main score."""
    names = [name for name in run["points"]["1 x"][MODES[0]] if name != "length"]
    return main_score(names)


def multiples(run, end):
    """[(s, point)] along one of LINES, by s."""
    found = [(float(name.split()[0]), point) for name, point in run["points"].items()
             if name.endswith(end) or name == "0 x"]  # where all lines begin
    return sorted(found, key=lambda pair: pair[0])


# ---- tables

def markdown(runs, each_number=True):
    """The tables; cells of several modes hold them in the order greedy, T = 1.

    each_number: with those of single numbers, as far as they were measured.
    """
    names = titles(runs)
    parts = [path_table(runs, names), ends_table(runs, names), line_table(runs, names)]
    parts += [coordinates_table(run, names[folder]) for folder, run in runs.items()
              if each_number and "only 1" in run["points"]]
    parts.append(notes(runs))
    return "\n\n".join(parts)


def path_table(runs, names):
    rows = []
    for folder, run in runs.items():
        own = run["straightness"]
        walk = run["random_walk"]
        pairs = [f"{own[name]:.2f} ({walk[name]:.2f})" for name in own]
        rows.append((names[folder], len(run["path"]) - 1, f"{norm(run['path'][-1]):.3g}", *pairs,
                     f"{run['cosine']:.2f}", f"{run['length_ratio']:.2f}"))
    header = ("run", "steps", "length of v", "distance by length (random walk)",
              "variance in one direction (random walk)", "cosine of the prediction with v",
              "its length by that of v")
    return markdown_table(header, rows)


def cell(run, name):
    """The main score of a point, greedy and at T = 1."""
    point = run["points"].get(name)
    return ", ".join(f"{point[mode][score_of(run)]:.3f}" for mode in MODES) if point else ""


def ends_table(runs, names):
    rows = [(names[folder], run["early_steps"], *(cell(run, name) for name in ENDS))
            for folder, run in runs.items()]
    return markdown_table(("run", "early steps", *ENDS.values()), rows)


def line_table(runs, names):
    steps = sorted({s for run in runs.values() for s, _ in multiples(run, " x")})
    rows = [(names[folder], line, *(cell(run, f"{s:g}{end if s else ' x'}") for s in steps))
            for folder, run in runs.items() for end, line in LINES.items()]
    return markdown_table(("run", "direction", *(f"{s:g} x" for s in steps)), rows)


def coordinates_table(run, name):
    rows = [(i + 1, f"{x:+.3f}", cell(run, f"only {i + 1}"), cell(run, f"without {i + 1}"))
            for i, x in enumerate(run["path"][-1])]
    return markdown_table((f"{name}: number", "its value", "alone", "all but it"), rows)


def notes(runs):
    counts = sorted({f"{run['count']} problems" for run in runs.values()})
    scores = sorted({score_of(run) for run in runs.values()})
    return (f"{', '.join(scores)} on {', '.join(counts)}: {', then '.join(MODES)}. early: v after "
            f"so many steps.\nextrapolated: the line that those steps predict, at the last step; "
            f"predicted: its direction.")


def norm(v):
    return math.sqrt(sum(x * x for x in v))


# ---- pictures

def panels(plt, count, columns, height=3.1):
    lines = math.ceil(count / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.4 * columns, height * lines), dpi=110,
                                squeeze=False, sharey=True)
    for axis in axes.flat[count:]:
        axis.axis("off")
    for axis in axes.flat[:count]:
        axis.grid(alpha=0.3)
    return figure, axes.flat[:count]


def draw_curves(plt, runs, out):
    """v by step: a line a number, the early steps on grey."""
    figure, axes = panels(plt, len(runs), min(COLUMNS, len(runs)))
    for axis, (folder, run) in zip(axes, runs.items()):
        axis.axvspan(0, run["early_steps"], color="grey", alpha=0.15, linewidth=0)
        axis.plot(range(len(run["path"])), run["path"], linewidth=1.2)
        axis.set(title=titles(runs)[folder], xlabel="step")
    axes[0].set_ylabel("the trained numbers")
    figure.tight_layout()
    save(figure, out)


def draw_line(plt, runs, out):
    """The score at s v, and marks where the early steps lead, at their length by that of v."""
    figure, axes = panels(plt, len(MODES), len(MODES), height=3.8)
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for axis, mode in zip(axes, MODES):
        for i, (folder, run) in enumerate(runs.items()):
            colour = colours[i % len(colours)]
            score = score_of(run)
            for end, style in zip(LINES, ("o-", "o:")):
                line = [(s, point[mode][score]) for s, point in multiples(run, end)]
                label = titles(runs)[folder] + (": predicted" if end != " x" else "")
                axis.plot(*zip(*line), style, markersize=3, color=colour, label=label)
            for name, mark in MARKS.items():
                point = run["points"].get(name)
                if point:
                    x = norm(point["v"]) / norm(run["path"][-1])
                    axis.plot(x, point[mode][score], mark, color=colour, markersize=7,
                              markeredgecolor="black", label=name if i == len(runs) - 1 else None)
        axis.set(title=f"{score}, {mode}", xlabel="length, by that of the trained v")
    axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    save(figure, out)


def draw_coordinates(plt, runs, out):
    """Bars: the score with one number alone, from the untrained one; without it, from the trained
    one. A line of panels a run, a column a mode."""
    figure, axes = panels(plt, len(MODES) * len(runs), len(MODES), height=2.4)
    places = [(folder, run, mode) for folder, run in runs.items() for mode in MODES]
    for axis, (folder, run, mode) in zip(axes, places):
        score = score_of(run)
        for kind, base, shift in (("only", "0 x", -0.2), ("without", "1 x", 0.2)):
            level = run["points"][base][mode][score]
            found = [(i, run["points"].get(f"{kind} {i}"))
                     for i in range(1, len(run["path"][-1]) + 1)]
            bars = [(i + shift, point[mode][score] - level) for i, point in found if point]
            label = "alone" if kind == "only" else "all but it"
            handle = axis.bar(*zip(*bars), width=0.4, bottom=level, label=label)
            axis.axhline(level, linewidth=0.8, color=handle[0].get_facecolor())
        axis.set(title=f"{titles(runs)[folder]}: {score}, {mode}", xlabel="number")
        axis.use_sticky_edges = False  # a line at the highest bar stays in sight
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    save(figure, out)


def report(path):
    """Print the tables of a JSON, then draw its pictures beside it."""
    with reading("tools.path's", path):
        runs = load(path)
        print(markdown(runs))
        pictures = draw(runs, str(path).removesuffix(".json"))
    print()
    for picture in pictures:
        print(printable(picture))


def draw(runs, stem):
    """The pictures of some entries; returns their paths."""
    plt = pyplot()
    drawings = [(draw_curves, runs, f"{stem}.png"), (draw_line, runs, f"{stem}.line.png")]
    measured = {folder: run for folder, run in runs.items() if "only 1" in run["points"]}
    if measured:
        drawings.append((draw_coordinates, measured, f"{stem}.coordinates.png"))
    for picture, some, out in drawings:
        picture(plt, some, out)
    return [out for _, _, out in drawings]


def parse(argv):
    cli = Parser(prog="python -m tools.path_picture", description=__doc__, allow_abbrev=False,
                 formatter_class=RawDescriptionHelpFormatter)
    cli.add_argument("file", metavar="FILE.json")
    return cli.parse_args(argv)


def main(argv=None):
    """Returns the exit code, see program.run_main."""
    return run_main(lambda: parse(argv), lambda args: report(Path(args.file)))


if __name__ == "__main__":
    sys.exit(main())
