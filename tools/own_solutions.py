"""Data for SFT made of a model's own right answers (rejection sampling):

    python train.py --eval-only --data toy/train.jsonl --eval-count 4000 --samples 4000 --out EVAL
    python -m tools.own_solutions EVAL toy OUT

EVAL holds a response to every training problem at T = 1. Those that are right become the solutions
of OUT/train.jsonl, one to a problem; OUT/test.jsonl is the data folder's. A response is right if
its strict score is 1, so that it ends in "#### <number>", as GSM8K's files do. SFT on OUT differs
from SFT on the data's own solutions in style, and from RL in having no wrong answers to avoid.
"""
import json
import shutil
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from support.errors import InputError
from support.files import make_folder, read_jsonl, replacing
from support.flags import Parser
from support.program import run_main
from support.terminal import printable


def right_answers(evaluation, questions):
    """Rows of a train.jsonl: the sampled responses that are right, to these questions."""
    path = Path(evaluation) / "samples.jsonl"
    found = {}
    for number, row in read_jsonl(path):
        if row.get("rollout") or row.get("sampled") is not True:
            continue
        question = row.get("question")
        if question not in questions:
            raise InputError(f"{path}, line {number}: its question is not in the training file; "
                             f"evaluate with --data .../train.jsonl")
        if row.get("scores", {}).get("strict") == 1:
            found[question] = {"question": question, "answer": row["response"]}
    if not found:
        raise InputError(f"{path}: has no right answer at T = 1")
    return list(found.values())


def parse(argv):
    cli = Parser(prog="python -m tools.own_solutions", description=__doc__, allow_abbrev=False,
                 formatter_class=RawDescriptionHelpFormatter)
    cli.add_argument("evaluation", metavar="EVAL")
    cli.add_argument("data", metavar="DATA", help="the folder of train.jsonl and test.jsonl")
    cli.add_argument("out", metavar="OUT", help="a new folder")
    return cli.parse_args(argv)


def work(args):
    out = Path(args.out)
    if out.exists():
        raise InputError(f"{out}: exists already; choose another folder")
    data = Path(args.data)
    questions = {row.get("question") for _, row in read_jsonl(data / "train.jsonl")}
    rows = right_answers(args.evaluation, questions)
    make_folder(out)
    shutil.copyfile(data / "test.jsonl", out / "test.jsonl")
    with replacing(out / "train.jsonl") as path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(printable(f"{out}: {len(rows):,} of {len(questions):,} problems, with right answers of "
                    f"the model's own"))


def main(argv=None):
    """Returns the exit code, see program.run_main."""
    return run_main(lambda: parse(argv), work)


if __name__ == "__main__":
    sys.exit(main())
