"""Data for SFT made of a model's own right answers (rejection sampling):

    python train.py --eval-only --data toy/train.jsonl --eval-count 4000 --samples 4000 --out EVAL
    python -m tools.own_solutions EVAL toy OUT
    python -m tools.own_solutions EVAL examples/arithmetic.py OUT    a task's: EVAL by --data train

EVAL holds a response to every training problem at T = 1. Those that are right become the solutions
of OUT/train.jsonl, one to a problem; OUT/test.jsonl is the data folder's, and a task's is its own
matter (examples/own_answers.py). A response is right if the task's first score, its reward, is 1:
by gsm8k.py strict, so that it ends in "#### <number>", as GSM8K's files do. SFT on OUT differs from
SFT on the data's own solutions in style, and from RL in having no wrong answers to avoid.
"""
import json
import shutil
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from support.data import load_task
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
            raise InputError(f"{path}, line {number}: its question is not one to train on; "
                             f"evaluate with --data .../train.jsonl, or a task's --data train")
        if list(row.get("scores", {}).values())[:1] == [1]:  # the first is the reward's
            found[question] = {"question": question, "answer": row["response"]}
    if not found:
        raise InputError(f"{path}: has no right answer at T = 1")
    return list(found.values())


def parse(argv):
    cli = Parser(prog="python -m tools.own_solutions", description=__doc__, allow_abbrev=False,
                 formatter_class=RawDescriptionHelpFormatter)
    cli.add_argument("evaluation", metavar="EVAL")
    cli.add_argument("data", metavar="DATA", help="the folder of train.jsonl and test.jsonl, or "
                                                  "a task's Python file")
    cli.add_argument("out", metavar="OUT", help="a new folder")
    return cli.parse_args(argv)


def work(args):
    out = Path(args.out)
    if out.exists():
        raise InputError(f"{out}: exists already; choose another folder")
    data = Path(args.data)
    is_task = data.suffix == ".py"
    if is_task:
        problems, _ = load_task(data).load("gsm8k", False)  # gsm8k: the flag's default
    else:
        problems = [row for _, row in read_jsonl(data / "train.jsonl")]
    questions = {problem.get("question") for problem in problems}
    rows = right_answers(args.evaluation, questions)
    test = data / "test.jsonl"
    if not is_task and not test.is_file():
        raise InputError(f"{test}: no such file")
    make_folder(out)
    if not is_task:
        shutil.copyfile(test, out / "test.jsonl")
    with replacing(out / "train.jsonl") as path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(printable(f"{out}: {len(rows):,} of {len(questions):,} problems, with right answers of "
                    f"the model's own"))


def main(argv=None):
    """Returns the exit code, see program.run_main."""
    return run_main(lambda: parse(argv), work)


if __name__ == "__main__":
    sys.exit(main())
