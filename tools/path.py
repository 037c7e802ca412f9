"""The path that v takes in training, and what lies on and beside it:

    python -m tools.path RUN [RUN ...] --out FILE.json
    python -m tools.path_picture FILE.json               tables and pictures again, from it alone

RUN is a run of train.py's that trained at most 128 numbers, finished: log.jsonl has them after each
step, as "v". Below, v is what was added to the start (0, or what --adapter brought). Measured are,
of every run,

    straightness  |v_T| by the length of the path; and the share of the variance of the path's
                  points that is along one line (their first principal component). Beside them the
                  same of random walks with steps of the same lengths: even they are far from 0.
    extrapolation what the first 15% of the steps predict (after arXiv 2605.21468): `early`, v
                  there; `extrapolated`, v at the last step, each coordinate straight from the start
                  through what was seen, by least squares, over the sum of the learning rates so
                  far (two points' difference would be one step's noise, enlarged). Steps of v get
                  shorter than the rates say, so such a line goes too far
    line          s x v_T for s from 0 (untrained) to 2; and the predicted direction at the same
                  lengths, which are known only at the end: how good its best multiple is
    coordinates   each number of v_T alone, and v_T without it

and each of these is evaluated on the run's test problems, greedy and at T = 1, by train.py's own
evaluation. FILE.json is written after every evaluation. What it has already is not made again, but
with another --count, all of it.
"""
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch

import train
from support import adapter_file
from support.errors import InputError
from support.files import LARGEST_DATA, read_json, read_jsonl, write_json
from support.flags import Parser, count
from support.params import with_values
from support.program import run_main
from support.report import FEW
from support.terminal import printable
from tools import opened, path_picture
from tools.runs import IGNORED, read_run, reading

EARLY = 0.15  # share of the steps that are seen before the rest is predicted
MULTIPLES = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2)
WALKS = 200  # random ones, to compare with
DIGITS = 7  # of v in the JSON, after the point


# ---- the path

def read_path(folder):
    """(v (T + 1, n) less its start, which is row 0; the start (n,); learning rates (T,)) of a run.

    InputError: a run without "v" in its log, or not of tinylora.py's methods, or not finished.
    """
    run = read_run(folder)
    log = Path(folder) / "log.jsonl"
    if not run.summary:
        raise InputError(f"{folder}: is not finished: python train.py --resume {folder}")
    if run.summary.get("method") not in adapter_file.METHODS:
        raise InputError(f"{folder}: trained by --method {run.summary.get('method')}; its numbers "
                         f"are no v, so a multiple of them is no adapter")
    rows = [row for _, row in read_jsonl(log)]
    v = [row.get("v") for row in rows]
    if not rows or not all(isinstance(x, list) and len(x) == len(v[0] or []) for x in v):
        raise InputError(f"{log}: does not hold v at each step; only runs of at most {FEW} numbers "
                         f"do, and none of older versions")
    adapter = read_json(Path(folder) / "config.json").get("adapter")
    start = np.zeros(len(v[0]))
    if adapter:
        start = adapter_file.read(adapter)[0].double().numpy()
    path = np.array([start, *v], dtype=float) - start
    if not np.isfinite(path).all() or not path[-1].any():
        raise InputError(f"{log}: v ends where it began, or is no number")
    return path, start, np.array([row["lr"] for row in rows], dtype=float)


def straightness(path):
    """(distance by length, share of the variance in one direction) of a path (T + 1, n)."""
    steps = np.linalg.norm(np.diff(path, axis=0), axis=1)
    variances = np.linalg.svd(path - path.mean(0), compute_uv=False) ** 2
    return np.linalg.norm(path[-1] - path[0]) / steps.sum(), variances[0] / variances.sum()


def random_walks(path):
    """The mean straightness of walks with steps as long as the path's, in random directions."""
    stream = np.random.RandomState(0)
    lengths = np.linalg.norm(np.diff(path, axis=0), axis=1)
    found = []
    for _ in range(WALKS):
        steps = stream.standard_normal((len(lengths), path.shape[1]))
        steps *= (lengths / np.linalg.norm(steps, axis=1))[:, None]
        found.append(straightness(np.vstack([path[:1], steps.cumsum(0)])))
    return np.mean(found, axis=0)


def extrapolate(path, rates):
    """(steps seen, the predicted v_T (n,)): least squares through the start, over the sum of the
    learning rates; see the docstring above."""
    seen = max(1, round(EARLY * len(rates)))
    time = rates.cumsum()
    early = time[:seen]
    return seen, early @ path[1:seen + 1] / (early @ early) * time[-1]


def numbers(path, rates):
    """What needs no model: the entry's "straightness", "random_walk", "early_steps", "cosine",
    "length_ratio" (of the prediction to v_T)."""
    seen, predicted = extrapolate(path, rates)
    last = path[-1]
    size = np.linalg.norm(predicted)
    names = ("distance_by_length", "first_component")
    return {"straightness": dict(zip(names, map(float, straightness(path)))),
            "random_walk": dict(zip(names, map(float, random_walks(path)))),
            "early_steps": seen,
            "cosine": float(predicted @ last / (size * np.linalg.norm(last))) if size else 0.0,
            "length_ratio": float(size / np.linalg.norm(last))}


def points(path, rates):
    """{name: v (n,)} to evaluate, those of the line first: 1 x is the trained v, 0 x is none."""
    seen, predicted = extrapolate(path, rates)
    last = path[-1]
    found = {f"{s:g} x": s * last for s in MULTIPLES}
    found["early"] = path[seen]
    found["extrapolated"] = predicted
    size = np.linalg.norm(predicted)
    rescaled = predicted * (np.linalg.norm(last) / size if size else 0)
    found |= {f"{s:g} x predicted": s * rescaled for s in MULTIPLES if s}
    for i in range(len(last)):
        one = np.eye(len(last))[i] * last
        found[f"only {i + 1}"] = one
        found[f"without {i + 1}"] = last - one
    return {name: [round(float(x), DIGITS) for x in v] for name, v in found.items()}


# ---- evaluations

def measure(folder, args, document):
    """Fill document["runs"][folder]; the model is loaded if an evaluation is missing."""
    path, start, rates = read_path(folder)
    flags = train.flags(["--resume", folder] + (["--device", args.device] if args.device else []))
    settings = {name: x for name, x in vars(flags).items() if name not in IGNORED}
    settings["eval_count"] = args.count or flags.eval_count
    before = document["runs"].get(folder, {})
    if before.get("settings") != settings:
        before = {}
    # by v, not by name: if the run was made anew, all v are others
    with reading("tools.path's", args.out):
        done = {tuple(point["v"]): point for point in before.get("points", {}).values()}
    entry = {"settings": settings, "seed": flags.seed, "count": before.get("count"),
             **numbers(path, rates), "path": path.round(DIGITS).tolist(), "points": {}}
    wanted = points(path, rates)
    missing = [name for name, v in wanted.items() if tuple(v) not in done
               and not (args.no_coordinates and name.startswith(("only", "without")))]
    document["runs"][folder] = entry

    def keep():
        entry["points"] = {name: done[tuple(v)] for name, v in wanted.items() if tuple(v) in done}
        write_json(args.out, document)

    keep()
    if not missing:
        return
    with opened.opened(flags, args.count) as (run, params, problems):
        entry["count"] = len(problems)
        for name in missing:
            v = wanted[name]
            if tuple(v) not in done:  # a number of v that is 0: without it is all of v
                value = torch.from_numpy(start + np.array(v)).float().view_as(params[0])
                with with_values(params, [value]):
                    label = f"{printable(folder)}, {name}"
                    done[tuple(v)] = {"v": v} | opened.scores(run, problems, label)
                keep()


def parse(argv):
    cli = Parser(prog="python -m tools.path", description=__doc__, allow_abbrev=False,
                 formatter_class=RawDescriptionHelpFormatter)
    cli.add_argument("runs", nargs="+", metavar="RUN")
    cli.add_argument("--out", required=True, metavar="FILE.json")
    cli.add_argument("--count", type=count, help="test problems, the first N (the run's)")
    cli.add_argument("--no-coordinates", action="store_true", help="leave out single coordinates")
    cli.add_argument("--device", default="", help="where to evaluate (the run's)")
    return cli.parse_args(argv)


def work(args):
    out = Path(args.out)
    if out.suffix != ".json":
        raise InputError(f"--out {out}: its name must end in .json")
    document = read_json(out, LARGEST_DATA) if out.exists() else {"runs": {}}
    if not isinstance(document.get("runs"), dict) or "settings" in document:
        raise InputError(f"{out}: was not written by tools.path")
    runs = dict.fromkeys(str(Path(folder)) for folder in args.runs)  # RUN/ is RUN
    for folder in runs:
        read_path(folder)  # complain before anything is measured
    for folder in runs:
        measure(folder, args, document)
    path_picture.report(out)


def main(argv=None):
    """Returns the exit code, see program.run_main."""
    return run_main(lambda: parse(argv), work)


if __name__ == "__main__":
    sys.exit(main())
