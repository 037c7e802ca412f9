"""One-digit sums, products and differences: a task that a small real model can almost do.

    python train.py --task examples/arithmetic.py --model HuggingFaceTB/SmolLM2-135M-Instruct ...

Made here from a fixed seed: there is no file to download. What is tested was never trained on: the
45 pairs of numbers from 1 to 9 are shared out to the splits (3 + 4 and 4 + 3 stay together), and so
are the phrasings, the names and the things in the stories.

    --data       evaluated on
    (none)       the test questions
    validation   questions to choose a learning rate by, in the phrasings of the training
    confirmation pairs and phrasings that are in no other split: to be looked at once, at the end
"""
import numpy as np

import gsm8k
from support.errors import InputError

INSTRUCTION = ' Answer with "#### " followed by the number.'

# (phrasings of the training and validation, of the test, of the confirmation) for each operation
PHRASINGS = {
    "add": (
        ["What is {a} + {b}?",
         "What is the sum of {a} and {b}?",
         "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
         "There are {a} {things} on the table and {b} in the box. How many are there in all?"],
        ["Calculate {a} + {b}.",
         "How much is {a} plus {b}?",
         "{name} buys {a} {things} on Monday and {b} on Friday. How many {things} is that?",
         "A bag holds {a} {things}. {name} puts in {b} more. How many {things} are in the bag?",
         "{name} found {a} {things} and then {b} others. How many {things} did {name} find?"],
        ["{a} + {b} = ?",
         "Please add {a} and {b}.",
         "First there were {a} {things}, then {b} more came. How many {things} are there?",
         "{name} picks {a} {things} in the morning and {b} at noon. How many is that together?",
         "On one shelf are {a} {things}, on another {b}. How many {things} are on the shelves?"]),
    "multiply": (
        ["What is {a} * {b}?",
         "What is the product of {a} and {b}?",
         "{name} has {a} boxes with {b} {things} each. How many {things} is that?",
         "There are {a} rows of {b} {things}. How many {things} are there in all?"],
        ["Calculate {a} * {b}.",
         "How much is {a} times {b}?",
         "{name} fills {a} bags. Each bag holds {b} {things}. How many {things} are in the bags?",
         "A pack has {b} {things}. How many {things} are in {a} packs?",
         "Each of {a} children brings {b} {things}. How many {things} do they bring?"],
        ["{a} * {b} = ?",
         "Please multiply {a} by {b}.",
         "{name} buys {a} nets of {b} {things}. How many {things} does {name} buy?",
         "Every day {name} finds {b} {things}. How many {things} are that in {a} days?",
         "On each of {a} plates lie {b} {things}. How many {things} lie there?"]),
    "subtract": (
        ["What is {c} - {a}?",
         "What is the difference of {c} and {a}?",
         "{name} has {c} {things} and gives away {a}. How many {things} does {name} have left?",
         "There were {c} {things} and {a} are gone. How many are left?"],
        ["Calculate {c} - {a}.",
         "How much is {c} minus {a}?",
         "{name} bought {c} {things} and lost {a} of them. How many {things} are left?",
         "A bag holds {c} {things}. {name} takes out {a}. How many {things} stay in the bag?",
         "Of {c} {things} {name} sells {a}. How many {things} does {name} keep?"],
        ["{c} - {a} = ?",
         "Please subtract {a} from {c}.",
         "First there were {c} {things}, then {a} broke. How many {things} are whole?",
         "{name} needs {c} {things} and has {a}. How many {things} are missing?",
         "On a shelf are {c} {things}; {name} removes {a}. How many {things} remain there?"]),
}
NAMES = (["Tom", "Anna", "Ben", "Mia"], ["Sam", "Lucy", "Paul", "Eva"],
         ["Kim", "Nora", "Max", "Lea"])
THINGS = (["apples", "books", "stones", "coins"], ["pens", "shells", "cards", "cups"],
          ["eggs", "nuts", "balls", "stamps"])
# split: (its pairs, of 45; its phrasings, names and things; questions of each pair and phrasing)
SPLITS = {"train": (slice(0, 24), 0, 2), "validation": (slice(24, 28), 0, 2),
          "test": (slice(28, 36), 1, 3), "confirmation": (slice(36, 45), 2, 4)}


def questions(split):
    """All questions of a split in an order that is always the same, as problems."""
    pairs = [(a, b) for a in range(1, 10) for b in range(a, 10)]
    order = np.random.RandomState(0).permutation(len(pairs))
    chosen, part, repeats = SPLITS[split]
    rng = np.random.RandomState(1 + list(SPLITS).index(split))
    problems = []
    for i in order[chosen]:
        for a, b in dict.fromkeys((pairs[i], pairs[i][::-1])):  # one where a is b
            for operation, phrasings in PHRASINGS.items():
                answer = {"add": a + b, "multiply": a * b, "subtract": b}[operation]
                for phrasing in phrasings[part] * repeats:
                    name = NAMES[part][rng.randint(len(NAMES[part]))]
                    things = THINGS[part][rng.randint(len(THINGS[part]))]
                    question = phrasing.format(a=a, b=b, c=a + b, name=name, things=things)
                    problems.append({"question": question, "answer": str(answer),
                                     "solution": f"#### {answer}", "operation": operation,
                                     "numbers": (a, b)})
    unique = list({problem["question"]: problem for problem in problems}.values())
    return [unique[i] for i in rng.permutation(len(unique))]


def load(data, eval_only):
    split = "test" if data == "gsm8k" else data  # gsm8k: the flag's default
    if split not in SPLITS:
        raise InputError(f"--data {data}: this task has {', '.join(SPLITS)}")
    return questions("train"), questions(split)


def prompt(problem, instruction):
    return problem["question"] + (INSTRUCTION if instruction is None else instruction)


def score(text, problem):
    """gsm8k.py's scores; the reward is `lenient`, the last number of the text."""
    scores = gsm8k.score(text, {"boxed": False, "gold": problem["answer"]})
    return {name: scores[name] for name in ("lenient", "strict", "format")}
