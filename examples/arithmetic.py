"""One-digit sums, products and differences: a task that a small real model can almost do.

    python train.py --task examples/arithmetic.py --model HuggingFaceTB/SmolLM2-135M-Instruct ...

Made here from a fixed seed: there is no file to download. What is tested was never trained on: the
45 pairs of numbers from 1 to 9 are shared out to the splits (3 + 4 and 4 + 3 stay together), and so
are the phrasings, the names and the things in the stories.

    --data       evaluated on
    (none)       the test questions
    validation   questions to choose a learning rate by, in phrasings of their own: those of the
                 training would not show whether what is learned carries over to others
    confirmation to be looked at once, at the end
"""
import numpy as np

import gsm8k
from support.errors import InputError

INSTRUCTION = ' Answer with "#### " followed by the number.'

# The phrasings of each split, for each operation.
PHRASINGS = {
    "add": {
        "train": [
          "What is {a} + {b}?",
          "What is the sum of {a} and {b}?",
          "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
          "There are {a} {things} on the table and {b} in the box. How many are there in all?",
          "Find {a} + {b}.",
          "{name} sees {a} {things} at home and {b} at school. How many {things} is that?",
          "Yesterday {name} made {a} {things}, today {b}. How many {things} did {name} make?",
          "A box has {a} {things} and another one has {b}. How many {things} are in both boxes?"],
        "validation": [
          "What do {a} and {b} make together?",
          "{name} borrows {a} {things} from one friend and {b} from another. How many is that?",
          "A shop sells {a} {things} before noon, {b} after. How many {things} does it sell?"],
        "test": [
          "Calculate {a} + {b}.",
          "How much is {a} plus {b}?",
          "{name} buys {a} {things} on Monday and {b} on Friday. How many {things} is that?",
          "A bag holds {a} {things}. {name} puts in {b} more. How many {things} are in the bag?",
          "{name} found {a} {things} and then {b} others. How many {things} did {name} find?"],
        "confirmation": [
          "{a} + {b} = ?",
          "Please add {a} and {b}.",
          "First there were {a} {things}, then {b} more came. How many {things} are there?",
          "{name} picks {a} {things} in the morning and {b} at noon. How many is that together?",
          "On one shelf are {a} {things}, on another {b}. How many {things} are on the shelves?"]
    },
    "multiply": {
        "train": [
          "What is {a} * {b}?",
          "What is the product of {a} and {b}?",
          "{name} has {a} boxes with {b} {things} each. How many {things} is that?",
          "There are {a} rows of {b} {things}. How many {things} are there in all?",
          "Find {a} * {b}.",
          "{name} makes {b} {things} an hour. How many {things} does {name} make in {a} hours?",
          "A wall has {a} shelves with {b} {things} each. How many {things} are on the wall?",
          "{a} friends get {b} {things} each. How many {things} do they get?"],
        "validation": [
          "What is {a} multiplied by {b}?",
          "{name} carries {b} {things} on a trip and makes {a} trips. How many {things} is that?",
          "A train has {a} cars with {b} {things} in each. How many {things} does it carry?"],
        "test": [
          "Calculate {a} * {b}.",
          "How much is {a} times {b}?",
          "{name} fills {a} bags. Each bag holds {b} {things}. How many {things} are in the bags?",
          "A pack has {b} {things}. How many {things} are in {a} packs?",
          "Each of {a} children brings {b} {things}. How many {things} do they bring?"],
        "confirmation": [
          "{a} * {b} = ?",
          "Please multiply {a} by {b}.",
          "{name} buys {a} nets of {b} {things}. How many {things} does {name} buy?",
          "Every day {name} finds {b} {things}. How many {things} are that in {a} days?",
          "On each of {a} plates lie {b} {things}. How many {things} lie there?"]
    },
    "subtract": {
        "train": [
          "What is {c} - {a}?",
          "What is the difference of {c} and {a}?",
          "{name} has {c} {things} and gives away {a}. How many {things} does {name} have left?",
          "There were {c} {things} and {a} are gone. How many are left?",
          "Find {c} - {a}.",
          "{name} has {c} {things} and {a} of them are red. How many {things} are not red?",
          "There are {c} {things} and {name} hides {a}. How many {things} can be seen?",
          "{name} made {c} {things}, a friend {a} fewer. How many {things} did the friend make?"],
        "validation": [
          "What is left of {c} after taking away {a}?",
          "A box had {c} {things} and {a} fell out. How many {things} are in the box?",
          "{name} carries {c} {things} and drops {a}. How many {things} does {name} carry now?"],
        "test": [
          "Calculate {c} - {a}.",
          "How much is {c} minus {a}?",
          "{name} bought {c} {things} and lost {a} of them. How many {things} are left?",
          "A bag holds {c} {things}. {name} takes out {a}. How many {things} stay in the bag?",
          "Of {c} {things} {name} sells {a}. How many {things} does {name} keep?"],
        "confirmation": [
          "{c} - {a} = ?",
          "Please subtract {a} from {c}.",
          "First there were {c} {things}, then {a} broke. How many {things} are whole?",
          "{name} needs {c} {things} and has {a}. How many {things} are missing?",
          "On a shelf are {c} {things}; {name} removes {a}. How many {things} remain there?"]
    },
}
NAMES = {"train": ["Tom", "Anna", "Ben", "Mia"], "validation": ["Jack", "Emma", "Leo", "Rosa"],
         "test": ["Sam", "Lucy", "Paul", "Eva"], "confirmation": ["Kim", "Nora", "Max", "Lea"]}
THINGS = {"train": ["apples", "books", "stones", "coins"],
          "validation": ["keys", "plums", "bricks", "toys"],
          "test": ["pens", "shells", "cards", "cups"],
          "confirmation": ["eggs", "nuts", "balls", "stamps"]}
# split: (its pairs, of 45; questions of each pair and phrasing)
SPLITS = {"train": (slice(0, 24), 2), "validation": (slice(24, 28), 3),
          "test": (slice(28, 36), 3), "confirmation": (slice(36, 45), 4)}


def questions(split):
    """All questions of a split in an order that is always the same, as problems."""
    pairs = [(a, b) for a in range(1, 10) for b in range(a, 10)]
    order = np.random.RandomState(0).permutation(len(pairs))
    chosen, repeats = SPLITS[split]
    rng = np.random.RandomState(1 + list(SPLITS).index(split))
    problems = []
    for i in order[chosen]:
        for a, b in dict.fromkeys((pairs[i], pairs[i][::-1])):  # one where a is b
            for operation, phrasings in PHRASINGS.items():
                answer = {"add": a + b, "multiply": a * b, "subtract": b}[operation]
                for phrasing in phrasings[split] * repeats:
                    name = NAMES[split][rng.randint(len(NAMES[split]))]
                    things = THINGS[split][rng.randint(len(THINGS[split]))]
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
