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
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.errors import InputError
from support.files import read_json, read_jsonl
from support.flags import Parser
from support.program import run_main

PICTURES = (".png", ".svg", ".pdf")
# What does not make two runs two settings: the seed, where and with what they ran, how it was
# written down; and sums over texts, which nobody could read in a legend.
IGNORED = {"seed", "out", "trained", "torch", "numpy", "device", "resume", "save_every", "wandb",
           "tensorboard", "threads", "ranks", "chat", "chat_format", "problems", "samples",
           "engine", "eval_only", "tokens_per_micro_batch", "rollout_rows", "recompute",
           "cuda_graph", "sample_every"}
COLUMNS = 3  # panels side by side
# A row's rollouts come from the policy before its update: step - 1. Its v_norm from after it.
BEFORE = {"length": "length (tokens)", "entropy": "entropy (nats per token)",
          "loss": "loss (--algo sft)"}
REWARD = "reward of the samples trained on"
NORM = "norm of what is trained"


@dataclass
class Run:
    folder: Path
    settings: dict
    summary: dict  # {} while it goes on
    points: dict  # what of: {step: value}
    scores: list  # names of the task's scores


def read_run(folder):
    """A run's folder -> Run. InputError if it is something else."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if config.get("eval_only"):
        raise InputError(f"{folder}: is an evaluation, without steps that could be drawn")
    if not (folder / "log.jsonl").is_file():
        raise InputError(f"{folder}: has no log.jsonl: it is no run, or has made no step yet")
    rows = [row for _, row in read_jsonl(folder / "log.jsonl")]
    if not all(isinstance(row.get("step"), int) for row in rows):
        raise InputError(f"{folder / 'log.jsonl'}: its rows are not those of a run")
    path = folder / "summary.json"
    summary = read_json(path) if path.is_file() else {}
    scores = score_names(rows, summary)
    return Run(folder, settings_of(config), summary, points_of(config, rows, summary, scores),
               scores)


def score_names(rows, summary):
    """The task's scores: what evaluations after a step or of the whole run have measured."""
    names = [name.removeprefix("final_") for name in summary if name.startswith("final_")]
    names += [name.removeprefix("eval_") for row in rows for name in row
              if name.startswith("eval_") and name != "eval_length"]
    return [name for name in dict.fromkeys(names) if not name.startswith("sampled")]


def settings_of(config):
    """The settings that make a run what it is; those left at their defaults as they came out."""
    trained = config.get("trained")
    trained = trained if isinstance(trained, dict) else {}
    settings = {name: x for name, x in config.items() if name not in IGNORED}
    settings |= {name: trained[name] for name in ("rank", "alpha", "u", "tie", "n_tie")
                 if name in trained}
    if "groups" in trained:  # ties, in the file format's words
        settings["params"] = trained["groups"] * trained["u"]
    return {name: x for name, x in settings.items() if x not in (None, False, "")}


def points_of(config, rows, summary, scores):
    """{title of a panel: {step: value}}; panels without a point are left out."""
    main = "strict" if "strict" in scores else (scores or [None])[0]
    panels = {}
    for sampled, words in ((False, "greedy"), (True, "T = 1")):
        for name in scores:
            key = f"eval_sampled_{name}" if sampled else f"eval_{name}"
            points = {row["step"]: row[key] for row in rows if row.get(key) is not None}
            if sampled and not points and name != main:
                continue
            key = name
            if sampled:  # as in summary.json, see support/report.py
                key = "sampled" if name == main else f"sampled_{name}"
            if summary:
                points[0] = summary.get(f"base_{key}")
                points[summary.get("steps", len(rows))] = summary.get(f"final_{key}")
                points = {step: x for step, x in points.items() if x is not None}
            panels[panel(name, words)] = points
    reward = config.get("reward") or main
    before = {reward: REWARD} | BEFORE
    for key, title in before.items():
        panels[title] = {row["step"] - 1: row[key] for row in rows if row.get(key) is not None}
    panels[NORM] = {row["step"]: row["v_norm"] for row in rows if row.get("v_norm") is not None}
    return {title: points for title, points in panels.items() if points}


def panel(score, mode):
    return f"held-out {score}, {mode}"


def by_setting(runs):
    """[(settings, runs with them)], in order."""
    groups = {}
    for run in runs:
        groups.setdefault(json.dumps(run.settings, sort_keys=True), []).append(run)
    return [(members[0].settings, members) for members in groups.values()]


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


def mean_and_band(members, title):
    """steps, means, lowest, highest of the members' points at each step."""
    points = [run.points.get(title, {}) for run in members]
    steps = sorted({step for some in points for step in some})
    values = [[some[step] for some in points if step in some] for step in steps]
    means = [sum(x) / len(x) for x in values]
    return steps, means, [min(x) for x in values], [max(x) for x in values]


def pyplot():
    """matplotlib, drawing into files only. InputError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("drawing needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def save(figure, out):
    try:
        figure.savefig(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error})") from None


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
    print(f"{out}: {len(runs)} run{'s' if len(runs) > 1 else ''} "
          f"of {len(groups)} setting{'s' if len(groups) > 1 else ''}")


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
        from tools import claim
        claim.draw(runs, args.out)
    else:
        draw(runs, args.out)


def main(argv=None):
    """Returns the exit code: 0, or 2 (a mistake of the user's, told in one line)."""
    return run_main(lambda: parse(argv), work)


if __name__ == "__main__":
    sys.exit(main())
