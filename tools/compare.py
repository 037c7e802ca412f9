"""Did it get better? python -m tools.compare AFTER [BEFORE] [--score NAME]

AFTER and BEFORE are folders of runs or of evaluations whose samples.jsonl keeps every test problem
(`--samples 1000` keeps up to 1000 of an evaluation). Of each, the last evaluation counts; without
BEFORE, the first one of AFTER is what it began with. The same problems are paired: a p-value says
how often a coin would part those that changed so unevenly (the sign test; McNemar's exact test
where a score is 0 or 1). With --eval-data every set has a line, then all problems together.
"""
import json
import math
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from support.errors import InputError
from support.files import read_jsonl
from support.flags import Parser
from support.program import run_main
from support.scores import MODES, main_score


def evaluations(folder):
    """{(step, sampled): {prompt: scores}} of the evaluations in a folder's samples.jsonl.

    With --eval-data a prompt is (set, prompt).
    """
    found = {}
    for number, row in read_jsonl(Path(folder) / "samples.jsonl"):
        if row.get("rollout"):  # one of the responses that a step learned from
            continue
        if "prompt" not in row or not isinstance(row.get("scores"), dict):
            raise InputError(f"{folder}: samples.jsonl, line {number} has no scores; evaluate anew")
        prompt = (row["set"], row["prompt"]) if "set" in row else row["prompt"]
        found.setdefault((row["step"], row["sampled"]), {})[prompt] = row["scores"]
    if not found:
        raise InputError(f"{folder}: its samples.jsonl holds no evaluation")
    return found


def p_value(better, worse):
    """Two-sided: the chance that `better` + `worse` fair coins fall at least so unevenly."""
    coins = better + worse
    tail = sum(math.comb(coins, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**coins)


def compare(before, after, score=None):
    """{prompt: scores} twice -> {"n", "before", "after": means, "better", "worse", "p"}."""
    if before.keys() != after.keys():
        raise InputError("these evaluations are not of the same problems, or --samples kept some")
    names = list(next(iter(after.values())))
    name = score or main_score(names)
    if any(name not in scores for side in (before, after) for scores in side.values()):
        raise InputError(f"--score {name}: the scores are {', '.join(names)}")
    pairs = [(before[prompt][name], after[prompt][name]) for prompt in after]
    better = sum(y > x for x, y in pairs)
    worse = sum(y < x for x, y in pairs)
    return {"score": name, "n": len(pairs), "before": sum(x for x, _ in pairs) / len(pairs),
            "after": sum(y for _, y in pairs) / len(pairs), "better": better, "worse": worse,
            "p": p_value(better, worse)}


def parse():
    cli = Parser(prog="python -m tools.compare", description=__doc__, allow_abbrev=False,
                 formatter_class=RawDescriptionHelpFormatter)
    cli.add_argument("after", metavar="AFTER")
    cli.add_argument("before", metavar="BEFORE", nargs="?")
    cli.add_argument("--score", help="the task's main score, if not given")
    return cli.parse_args()


def work(args):
    last = evaluations(args.after)
    first = evaluations(args.before) if args.before else last
    pick_first = max if args.before else min
    for sampled, mode in enumerate(MODES):
        steps = [[step for step, kind in side if kind == sampled] for side in (first, last)]
        if not all(steps):
            raise InputError(f"{args.after}: nothing to compare, {mode}")
        start = pick_first(steps[0])
        end = max(steps[1])
        if not args.before and start == end:
            raise InputError(f"{args.after}: has one evaluation; name another folder to compare")
        sides = [first[start, bool(sampled)], last[end, bool(sampled)]]
        result = compare(*sides, args.score)
        for name in dict.fromkeys(prompt[0] for prompt in sides[1] if isinstance(prompt, tuple)):
            parts = [{prompt: x for prompt, x in side.items() if prompt[0] == name}
                     for side in sides]
            print(json.dumps({"mode": mode, "set": name} | compare(*parts, args.score)))
        print(json.dumps({"mode": mode} | result))


if __name__ == "__main__":
    sys.exit(run_main(parse, work))
