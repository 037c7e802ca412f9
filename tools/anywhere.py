"""Where the right number stands in the responses: is a gain one of place or of format?

    python -m tools.anywhere AFTER BEFORE

AFTER and BEFORE are folders of runs or evaluations whose samples.jsonl keeps every test problem
(`--samples 1000`); of each, the last evaluation counts. The lenient score takes the number after
"####", or else the last one, so it can rise because a model stops in time or leaves out "####".
Beside it, a line for each mode: `anywhere`, the share of responses that have the right number at
any place; `last`, the share whose last number is right, whatever stands after "####"; and how many
numbers a response has, as more numbers find the right one sooner.
"""
import json
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from statistics import mean

from gsm8k import canonical, every_number, extract_answer, plain_text
from support.errors import InputError
from support.files import read_jsonl
from support.flags import Parser
from support.program import run_main
from support.scores import MODES


def numbers(text):
    """Every number of a text, canonical, as the lenient score reads them."""
    return [canonical(word) for word in every_number(plain_text(text))]


def shares(folder):
    """{mode: {"prompts", "n", "lenient", "anywhere", "last", "numbers"}} of a folder's last
    evaluation."""
    rows = [row for _, row in read_jsonl(Path(folder) / "samples.jsonl") if not row.get("rollout")]
    if not rows or any("lenient" not in row.get("scores", {}) for row in rows):
        raise InputError(f"{folder}: its samples.jsonl holds no evaluation with a lenient score")
    step = max(row["step"] for row in rows)
    found = {}
    for mode, sampled in zip(MODES, (False, True)):
        kept = [row for row in rows if row["step"] == step and row["sampled"] == sampled]
        if not kept:
            raise InputError(f"{folder}: its last evaluation has nothing {mode}")
        gold = [extract_answer(row["answer"], strict=False) for row in kept]
        said = [numbers(row["response"]) for row in kept]
        found[mode] = {"prompts": {row.get("prompt") for row in kept}, "n": len(kept),
                       "lenient": mean(row["scores"]["lenient"] for row in kept),
                       "anywhere": mean(right in all_of for right, all_of in zip(gold, said)),
                       "last": mean(all_of[-1:] == [right] for right, all_of in zip(gold, said)),
                       "numbers": mean(map(len, said))}
    return found


def parse(argv):
    cli = Parser(prog="python -m tools.anywhere", description=__doc__, allow_abbrev=False,
                 formatter_class=RawDescriptionHelpFormatter)
    cli.add_argument("after", metavar="AFTER")
    cli.add_argument("before", metavar="BEFORE")
    return cli.parse_args(argv)


def work(args):
    after = shares(args.after)
    before = shares(args.before)
    for mode in MODES:
        if before[mode].pop("prompts") != after[mode].pop("prompts"):
            raise InputError("these evaluations are not of the same problems, or --samples kept "
                             "some")
        print(json.dumps({"mode": mode, "before": before[mode], "after": after[mode]}))


def main(argv=None):
    """Returns the exit code, see program.run_main."""
    return run_main(lambda: parse(argv), work)


if __name__ == "__main__":
    sys.exit(main())
