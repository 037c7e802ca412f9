"""Sweeps: settings of train.py compared fairly, each at its best learning rate, over seeds.

    python results/sweep.py F7 --seeds 3            make what is missing, then table and picture
    python results/sweep.py F7 --report             table and picture from the JSON alone
    python results/sweep.py my.json --seeds 3 --first-seed 20 --out elsewhere

A figure's name means results/figures/NAME.json, a short list of settings (tools/sweep_file.py).
The protocol is the same for every setting:

1. Rates. Three learning rates, a factor of 3 apart; with each, one run for every tuning seed
   (100, 101, ...), evaluated on validation problems, which are neither training nor test problems.
   The best rate has the highest mean validation accuracy: the mean over the tuning seeds, and over
   greedy and T = 1. While the best rate is at an end of the grid, the grid grows by one there.
2. Seeds. At the best rate, runs with other seeds (0, 1, ...), evaluated on the test problems.
3. Reported: every score, greedy and at T = 1, mean, lowest and highest of the seeds; exact McNemar
   tests per seed, against the untrained model and against a neighbour. Whatever samples has the
   same number of responses to learn from, whatever learns by SFT the same number of examples.

NAME.runs.json keeps every run that is done, so stopping costs nothing (Ctrl-C, kill -9): the same
command goes on. Runs are known by what decides their result: flags, seed, rate, the contents of
model and data. The code's version is noted with each; after a change of the code that changes
results, delete the file, and the folder of the runs.
"""
import json
import shlex
import subprocess
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from support.errors import InputError
from support.files import LARGEST_DATA, make_folder, read_json, read_jsonl, replacing
from support.flags import TOY, Parser, count, natural
from support.program import run_main
from support.scores import MODES, key, main_score
from support.terminal import printable
from support.threads import usable_cores
from tools import compare, jobs, sweep_table
from tools.runs import score_names
from tools.sweep_file import check_budgets, find, prepare, read_definition, request

ROOT = TOY.parent
FACTOR = 3  # between neighbouring learning rates
MOST_RATES = 9
FEW = 16  # trained numbers up to which NAME.runs.json keeps the path of v
TUNING = 100  # the first tuning seed, of at most 100


# ---- the protocol

def progress(setting, splits, runs, spec, seeds):
    """(the requests of a setting that are missing now, what is known when none is)."""
    tuning = range(TUNING, TUNING + spec.get("tuning_seeds", 2))
    places = [-1, 0, 1]  # on the grid: powers of FACTOR
    while True:
        grid = {k: [request(splits, rate(setting["lr"], k), seed, "validation") for seed in tuning]
                for k in places}
        missing = [r for k in places for r in grid[k] if r["key"] not in runs]
        if missing:
            return missing, None
        means = {k: sum(sweep_table.accuracy(runs[r["key"]]) for r in grid[k]) / len(tuning)
                 for k in places}
        best = best_place(means)
        if best not in (places[0], places[-1]) or len(places) == MOST_RATES:
            break
        places = [places[0] - 1, *places] if best == places[0] else [*places, places[-1] + 1]
    lr = rate(setting["lr"], best)
    final = [request(splits, lr, seed, "test") for seed in seeds]
    known = {"lr": lr, "grid": [{"lr": rate(setting["lr"], k), "validation": means[k],
                                 "runs": [r["key"] for r in grid[k]]} for k in places],
             "runs": [r["key"] for r in final]}
    return [r for r in final if r["key"] not in runs], known


def rate(middle, k):
    return float(f"{middle * FACTOR**k:.3g}")


def best_place(means):
    """Where the mean is highest; of equals the one nearest the middle, which extends no grid."""
    top = max(means.values())
    middle = (min(means) + max(means)) / 2
    return min((k for k in means if means[k] == top), key=lambda k: abs(k - middle))


# ---- results

def record(run, folder, score):
    """What NAME.runs.json keeps of a run that is over."""
    summary = read_json(folder / "summary.json")
    names = score_names([], summary)
    main = main_score(names)
    score = score or main
    if score not in names:
        raise InputError(f"score {score!r}: the scores are {', '.join(names)}")
    scores = {when: {mode: {name: summary[f"{when}_{key(name, bool(sampled), main)}"]
                            for name in names} for sampled, mode in enumerate(MODES)}
              for when in ("base", "final")}
    flags = run["settings"]
    each = flags["prompts"] * (1 if flags["algo"] == "sft" else flags["group"])
    kept = {name: run[name] for name in ("split", "lr", "seed")}
    kept |= {"command": f"python train.py {shlex.join(run['words'])}", "version": version(),
             "score": score, "count": summary["eval_count"], "params": summary["params"],
             "bytes": summary["adapter_bytes"], "algo": flags["algo"],
             "budget": summary["steps"] * each, "tokens": summary["tokens"],
             "seconds": round(summary["seconds"], 1)} | scores
    if run["split"] == "test":
        found = compare.evaluations(folder)
        for when, step in (("base", 0), ("final", summary["steps"])):
            kept[f"{when}_right"] = {
                mode: right(found[step, bool(sampled)], score, summary["eval_count"], folder)
                for sampled, mode in enumerate(MODES)}
        kept["steps"] = steps(folder, flags.get("reward", score))
    return kept


def steps(folder, reward):
    """{column: a value a step} of a run's log: what its rollouts earned, how long they were, how
    far sampler and trainer lay apart, and v, if it is small. What the log lacks is left out."""
    rows = [row for _, row in read_jsonl(folder / "log.jsonl")]
    columns = {}
    for name, column in (("reward", reward), ("length", "length"), ("gap", "gap")):
        if column in rows[0]:  # SFT has no reward
            values = [row[column] for row in rows]
            columns[name] = [None if x is None else float(f"{x:.4g}") for x in values]
    if len(rows[0].get("v", [])) in range(1, FEW + 1):
        columns["v"] = [[round(x, 6) for x in row["v"]] for row in rows]
    return columns


def right(evaluation, score, number, folder):
    """Which problems got the full score: bits, the first problem first, as a hexadecimal number."""
    if len(evaluation) != number:
        raise InputError(f"{folder}: some of its {number} problems are asked twice, so they "
                         f"cannot be paired")
    bits = "".join("1" if scores[score] >= 1 else "0" for scores in evaluation.values())
    return f"{int(bits, 2):x}"


def version():
    """The commit that the code stands at, with -dirty if it was changed since.

    What lies in results/ is no code: a sweep writes there itself.
    """
    describe = ["git", "describe", "--always", "--abbrev=12"]
    changed = ["git", "diff", "--quiet", "HEAD", "--", ".", ":!results"]
    try:
        done = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
        dirty = subprocess.run(changed, cwd=ROOT, capture_output=True).returncode == 1
    except OSError:
        return "unknown"
    return done.stdout.strip() + "-dirty" * dirty or "unknown"


def sweep(path, args):
    """Make what is missing of one sweep; write its JSON."""
    spec = read_definition(path)
    seeds = list(range(args.first_seed, args.first_seed + args.seeds))
    if set(seeds) & set(range(TUNING, TUNING + 100)):
        raise InputError(f"--first-seed {args.first_seed}: rates are chosen on seeds {TUNING} to "
                         f"{TUNING + 99}, so results come from others")
    folder = Path(args.runs)  # as given: the commands that are kept name no machine's folders
    prepared = [prepare(spec, setting, folder) for setting in spec["settings"]]
    check_budgets(path, prepared)
    results = results_file(path, args)
    make_folder(results.parent)
    with jobs.alone(results):
        make(spec, prepared, seeds, results, folder, args.jobs)


def earlier(path, spec):
    """What NAME.runs.json has already. InputError if its runs cannot be gone on with."""
    found = read_json(path, LARGEST_DATA) if path.is_file() else {"definition": spec, "runs": {}}
    if not (isinstance(found.get("runs"), dict) and isinstance(found.get("definition"), dict)):
        raise InputError(f"{path}: was not written by a sweep; delete it")
    if found["runs"] and found["definition"].get("score") != spec.get("score"):
        raise InputError(f"{path}: keeps another score than {spec.get('score') or 'the main one'}; "
                         f"delete it (the runs' folders stay, so they are not made again)")
    return found


def make(spec, prepared, seeds, results, folder, at_once):
    """The missing runs, then the table. Until that is complete the file keeps the one it had."""
    before = earlier(results, spec)
    runs = before["runs"]
    document = {"definition": spec, "seeds": seeds, "settings": [], "table": [], "runs": runs}
    meanwhile = before if before.get("settings") else document

    def states():
        return [progress(setting, splits, runs, spec, seeds)
                for setting, splits in zip(spec["settings"], prepared)]

    def needed():
        missing = [run for found, _ in states() for run in found]
        return list({run["key"]: run for run in missing}.values())

    def collect(run, out):
        runs[run["key"]] = kept = record(run, out, spec.get("score"))
        write(results, meanwhile)
        values = ", ".join(f"{kept['final'][mode][kept['score']]:.3f} {mode}" for mode in MODES)
        print(printable(f"done: {run['split']} {kept['score']} {values}; {kept['command']}"),
              flush=True)

    jobs.work_off(needed, collect, folder, at_once)
    document["settings"] = [setting | known for setting, (_, known)
                            in zip(spec["settings"], states())]
    document["table"] = sweep_table.rows(document)
    write(results, document)


def write(path, document):
    """NAME.runs.json, completely or not at all; a run is a line."""
    head = {name: value for name, value in document.items() if name != "runs"}
    runs = ",\n".join(f"  {json.dumps(key)}: {json.dumps(run)}"
                      for key, run in document["runs"].items())
    text = json.dumps(head, indent=1).removesuffix("\n}")
    with replacing(path) as temporary:
        temporary.write_text(f'{text},\n "runs": {{\n{runs}\n }}\n}}\n', encoding="utf-8")


def results_file(path, args):
    return Path(args.out or path.parent) / f"{path.stem}.runs.json"


def parse(argv):
    cli = Parser(prog="python results/sweep.py", description=__doc__, allow_abbrev=False,
                 formatter_class=RawDescriptionHelpFormatter)
    cli.add_argument("sweeps", nargs="+", metavar="FILE_OR_FIGURE")
    cli.add_argument("--seeds", type=count, default=3, help="reported seeds (3)")
    cli.add_argument("--first-seed", type=natural, default=0, help="the first of them (0)")
    cli.add_argument("--jobs", type=count, default=usable_cores(), help="runs at a time (cores)")
    cli.add_argument("--runs", default="runs/sweeps", help="the runs' folders (runs/sweeps)")
    cli.add_argument("--out", help="where NAME.runs.json and NAME.png go (beside the file)")
    cli.add_argument("--report", action="store_true", help="run nothing")
    return cli.parse_args(argv)


def work(args):
    paths = [find(word) for word in args.sweeps]
    for path in paths:
        if not args.report:
            sweep(path, args)
        results = results_file(path, args)
        if not results.is_file():
            raise InputError(f"{results}: no such file; make it without --report")
        sweep_table.report(results)


def main(argv=None):
    """Returns the exit code, see program.run_main."""
    return run_main(lambda: parse(argv), work)


if __name__ == "__main__":
    sys.exit(main())
