"""Sums of two numbers from 10 to 99: what else has a run on arithmetic.py changed?

    python train.py --task examples/two_digit.py --eval-only --adapter ADAPTER --model M \
        --max-new-tokens 24

300 questions in the phrasings of arithmetic.py's training, which is what would be trained on here,
too.
"""
from pathlib import Path

import numpy as np

from support.data import module_at
from support.errors import InputError

arithmetic = module_at(Path(__file__).with_name("arithmetic.py"))
prompt = arithmetic.prompt
score = arithmetic.score


def load(data, eval_only):
    if data != "gsm8k":  # the flag's default
        raise InputError(f"--data {data}: this task has no other data than its own")
    rng = np.random.RandomState(0)
    phrasings = arithmetic.PHRASINGS["add"]["train"]
    lists = arithmetic.NAMES, arithmetic.THINGS
    problems = {}
    while len(problems) < 300:
        phrasing = phrasings[len(problems) % len(phrasings)]
        a, b = rng.randint(10, 100, 2).tolist()
        name, things = (words["train"][rng.randint(4)] for words in lists)
        question = phrasing.format(a=a, b=b, name=name, things=things)
        problems[question] = {"question": question, "answer": str(a + b),
                              "solution": f"#### {a + b}"}
    return arithmetic.questions("train"), list(problems.values())
