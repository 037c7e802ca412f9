"""arithmetic.py, but the solutions, which SFT learns, are the untrained model's own right answers.

They lie in results/figures/own-arithmetic, and were made of one response at T = 1 to every training
question, about as many responses as a run of CURVE samples:

    python train.py --task examples/arithmetic.py --model HuggingFaceTB/SmolLM2-135M-Instruct \
        --data train --eval-only --samples 2000 --max-new-tokens 24 --dtype bf16 --out EVAL
    python -m tools.own_solutions EVAL examples/arithmetic.py results/figures/own-arithmetic

A question that has no right answer there is left out of the training.
"""
from pathlib import Path

from support.data import module_at
from support.files import read_jsonl

ANSWERS = Path(__file__).resolve().parent.parent / "results/figures/own-arithmetic/train.jsonl"
arithmetic = module_at(Path(__file__).with_name("arithmetic.py"))
prompt = arithmetic.prompt
score = arithmetic.score


def load(data, eval_only):
    training, problems = arithmetic.load(data, eval_only)
    answers = {row["question"]: row["answer"] for _, row in read_jsonl(ANSWERS)}
    return [problem | {"solution": answers[problem["question"]]}
            for problem in training if problem["question"] in answers], problems
