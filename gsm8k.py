"""The task: problems, prompts and scores of GSM8K and of files shaped like it or like MATH.

A task is a module of two functions (python train.py --task FILE.py; docs/your-own-task.md):

    prompt(problem, instruction) -> the user's turn; instruction: --instruction, or None
    score(text, problem)         -> {"name": reward, ...}: what a response earns; text may be ""

and, where problems are more than JSON lines of train.jsonl and test.jsonl, a third:

    load(data, eval_only) -> (training problems, test problems): dicts; "solution" is for SFT

Three scores side by side, because much of a gain can be mere format (the paper reports
strict; on lenient a reproduction gained far less):

    strict   the last number that follows a "####" in the last 300 characters is right. Unlike the
             paper's rule, it needs no space there, takes $18 and 18.00 for 18, and cuts no number
             out of a longer expression (support/plain_numbers.py).
    lenient  strict's number is right or, if there is none, the last number anywhere in the text.
    format   strict's number exists. As the reward, the control for mere format.

A "problem" instead of a "question" is of MATH's kind: the prompt asks for \\boxed{}, strict and
format want the last \\boxed{}, and answers are LaTeX, compared by support/boxed.py.
"""
import re

from support.boxed import boxed, same
from support.datasets import find_data
from support.errors import InputError
from support.files import read_jsonl
from support.plain_numbers import NUMBER, PLAIN_NUMBER, canonical

# The paper's, after the question, in one user turn; SimpleRL's boxed template for MATH.
INSTRUCTION = ' Let\'s think step by step and output the final answer after "####".'
BOXED_INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."

# PLAIN_NUMBER is a number that stands alone: not the 5 of 5/2, of 5² or of 5 million.
STRICT = re.compile(rf"####[ \t]*({PLAIN_NUMBER})")
ANY = re.compile(NUMBER)


def plain_text(text):
    """Typographic minus and LaTeX's dollar made plain; no thin space inside a number (1 800)."""
    text = text.replace("\u2212", "-").replace("\\$", "$")
    return re.sub("(?<=[0-9])[\u00a0\u2009\u202f](?=[0-9]{3})", "", text)


def every_number(text):
    """The numbers of a plain text, as they stand there. A minus after a number or a word is a
    subtraction or a hyphen: "10-3" ends in 3, not -3."""
    return ANY.findall(re.sub(r"(?<=[\w)])-(?=[0-9])", " ", text))


def extract_answer(text, strict=True):
    """The answer that a text gives, as a canonical number, or None; see the module docstring."""
    text = plain_text(text)
    found = STRICT.findall(text[-300:])
    if not found and not strict:
        found = every_number(text)
    return canonical(found[-1]) if found else None


def score(text, problem):
    """{"strict", "lenient", "format": 1.0 or 0.0} of a response."""
    if problem["boxed"]:
        answer = boxed(text)
        strict = answer is not None and same(answer, problem["answer"])
        last = extract_answer(text, strict=False) if answer is None else None
        lenient = strict or (last is not None and same(last, problem["answer"]))
    else:
        answer = extract_answer(text)
        strict = answer == problem["gold"]
        lenient = extract_answer(text, strict=False) == problem["gold"]
    return {"strict": float(strict), "lenient": float(lenient), "format": float(bool(answer))}


def prompt(problem, instruction=None):
    """The user's turn: the question and what is asked of the answer."""
    if instruction is None:
        instruction = BOXED_INSTRUCTION if problem["boxed"] else INSTRUCTION
    return problem["question"] + instruction


def checked(row, where):
    """A JSON object of the file -> {"question", "answer", "gold", "boxed", "solution"}.

    With "question", "answer" is a solution that ends in "#### <number>", or the number; with
    "problem", LaTeX. None for an empty LaTeX answer: copies of MATH hold a few.
    """
    is_boxed = isinstance(row.get("problem"), str)
    question = row.get("problem" if is_boxed else "question")
    answer = row.get("answer")
    solution = row.get("solution")
    if type(answer) in (int, float):
        answer = str(answer)
    if not isinstance(question, str) or not question.strip() or not isinstance(answer, str):
        raise InputError(f'{where}: needs "question" or "problem", and "answer", as text')
    gold = None
    if is_boxed:
        if not answer.strip():
            return None
    else:
        if "####" in answer:
            solution = re.sub("<<[^<>]*>>", "", answer)  # <<2*3=6>> is for calculators
        final = answer.rpartition("####")[2].strip()
        gold = extract_answer("#### " + final)
        if gold is None:
            raise InputError(f"{where}: its answer {final[:50]!r} is no plain number")
    solution = solution if isinstance(solution, str) else None
    return {"question": question, "answer": answer, "gold": gold, "boxed": is_boxed,
            "solution": solution}


def read_problems(path):
    """A jsonl file -> problems, see checked. InputError names the file and the line."""
    found = [checked(row, f"{path}, line {number}") for number, row in read_jsonl(path)]
    problems = [problem for problem in found if problem is not None]
    if not problems:
        raise InputError(f"{path}: holds no problems")
    return problems


def load(data, eval_only=False):
    """--data -> (train, test): a set's name (support/datasets.py), a folder, or one test file."""
    return tuple(read_problems(path) if path else [] for path in find_data(data, eval_only))
