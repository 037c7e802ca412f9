"""In which of the toy's three styles the responses of runs are, and how often each is right.

    python -m tools.styles results/figures/HEADLINE.runs.json --out HEADLINE.styles.json

A plain question may be answered step by step, in one go or by a guess (toy/make.py), and mostly
the first way alone finds the answer. So the greedy score is about the share of questions for which
it is the likeliest style, the score at T = 1 about how likely it is. Reads the samples that
results/sweep.py's test runs keep; --runs is its folder of runs.
"""
import math
import sys
import textwrap
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from statistics import mean

from support.errors import InputError
from support.files import read_jsonl, write_json
from support.flags import Parser
from support.program import run_main
from support.scores import MODES, main_score
from tools.runs import markdown_table
from tools.sweep_table import load

STYLES = ("step by step", "in one go", "a guess")


def style(response):
    """Told by how it begins: "Let's go step by step.", "Maybe", or the sum itself."""
    words = response.split()
    if words[:1] == ["Let's"]:
        return STYLES[0]
    return STYLES[2] if words[:1] == ["Maybe"] else STYLES[1]


def counted(folder):
    """{"base" and "final": {mode: {style: [responses, right ones]}}} of a run's evaluations."""
    rows = [row for _, row in read_jsonl(folder / "samples.jsonl") if not row.get("rollout")]
    last = max(row["step"] for row in rows)
    found = {when: {mode: {name: [0, 0] for name in STYLES} for mode in MODES}
             for when in ("base", "final")}
    for row in rows:
        if row["step"] in (0, last):
            when = "base" if row["step"] == 0 else "final"
            cell = found[when][MODES[row["sampled"]]][style(row["response"])]
            cell[0] += 1
            cell[1] += row["scores"][main_score(list(row["scores"]))] >= 1
    return found


def measured(document, folder):
    """{setting: {seed: counted}} of a sweep's test runs."""
    return {setting["name"]: {document["runs"][key]["seed"]: counted(folder / key)
                              for key in setting["runs"]}
            for setting in document["settings"]}


def cells(styles):
    """Each style's share and how much of it is right."""
    total = sum(count for count, _ in styles.values())
    return [f"{count / total:.3f}" + (f" ({right / count:.2f})" if count else "")
            for count, right in styles.values()]


def shown(seeds):
    """The seeds with the lowest, the middle and the highest score at T = 1."""
    def score(seed):
        return sum(right for _, right in seeds[seed]["final"]["T = 1"].values())
    ranked = sorted(seeds, key=score)
    return dict.fromkeys([ranked[0], ranked[len(ranked) // 2], ranked[-1]])


def steps_right(seeds):
    """How many of the step-by-step responses are right: mean, lowest and highest of the seeds."""
    parts = []
    for mode in MODES:
        shares = []
        for styles in seeds.values():
            count, right = styles["final"][mode][STYLES[0]]
            shares += [right / count] if count else []
        spread = (mean(shares), min(shares), max(shares)) if shares else (math.nan,) * 3
        parts.append("{:.2f} ({:.2f} to {:.2f}) {}".format(*spread, mode))
    return ", ".join(parts)


def markdown(found):
    """A table of every setting: untrained, and three of its seeds."""
    header = ["", *(f"{mode}: {name}" for mode in MODES for name in STYLES)]
    lines = []
    for name, seeds in found.items():
        base = next(iter(seeds.values()))["base"]
        lines.append(["untrained", *(cell for mode in MODES for cell in cells(base[mode]))])
        for seed in shown(seeds):
            final = seeds[seed]["final"]
            lines.append([f"{name}, seed {seed}",
                          *(cell for mode in MODES for cell in cells(final[mode]))])
    right = [f"{name}, right among the step-by-step responses, mean (lowest to highest) of all "
             f"{len(seeds)} seeds: {steps_right(seeds)}." for name, seeds in found.items()]
    return "\n\n".join([markdown_table(header, lines), *(textwrap.fill(line, 100)
                                                         for line in right)])


def parse(argv):
    cli = Parser(prog="python -m tools.styles", description=__doc__, allow_abbrev=False,
                 formatter_class=RawDescriptionHelpFormatter)
    cli.add_argument("sweep", metavar="NAME.runs.json")
    cli.add_argument("--runs", default="runs/sweeps", help="the runs' folders (runs/sweeps)")
    cli.add_argument("--out", required=True, help="a JSON file")
    return cli.parse_args(argv)


def work(args):
    document = load(args.sweep)
    missing = [key for setting in document["settings"] for key in setting["runs"]
               if not (Path(args.runs) / key / "samples.jsonl").is_file()]
    if missing:
        raise InputError(f"{args.runs}: {len(missing)} of the sweep's runs are not there, the "
                         f"first is {missing[0]}; make them with results/sweep.py")
    found = measured(document, Path(args.runs))
    write_json(args.out, found)
    print(markdown(found))


def main(argv=None):
    """Returns the exit code, see program.run_main."""
    return run_main(lambda: parse(argv), work)


if __name__ == "__main__":
    sys.exit(main())
