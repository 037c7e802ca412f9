"""tools/compare.py: paired evaluations; examples/arithmetic.py: the task it was made for."""
import argparse
import itertools
import json
import re

import pytest
from helpers import ROOT, one_error

from support.data import module_at
from support.errors import InputError
from support.program import run_main
from tools import compare


def write(folder, evaluations):
    """samples.jsonl from {(step, sampled): [score of each problem]}."""
    folder.mkdir()
    rows = [{"step": step, "sampled": sampled, "prompt": f"p{i}", "response": "",
             "scores": {"strict": float(x), "format": 1.0}}
            for (step, sampled), scores in evaluations.items() for i, x in enumerate(scores)]
    rows.append({"step": 1, "rollout": True, "prompt": "p0", "scores": {"strict": 1.0}})
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.mark.parametrize("better, worse", [(0, 0), (1, 0), (5, 1), (2, 7), (5, 5), (0, 9)])
def test_p_value_is_counted_out(better, worse):
    """Of all ways in which the coins can fall: the share that is at least so uneven."""
    coins = better + worse
    falls = [sum(fall) for fall in itertools.product((0, 1), repeat=coins)]
    uneven = [abs(2 * heads - coins) >= abs(better - worse) for heads in falls]
    assert compare.p_value(better, worse) == pytest.approx(sum(uneven) / len(falls), rel=1e-12)


def test_a_run_is_compared_with_its_own_beginning(tmp_path, capsys):
    run = write(tmp_path / "run", {(0, False): [0, 0, 1, 1], (0, True): [0, 0, 0, 0],
                                   (10, False): [1, 0, 0, 0],
                                   (20, False): [1, 1, 1, 0], (20, True): [1, 1, 1, 1]})
    args = argparse.Namespace(after=run, before=None, score=None)
    compare.work(args)
    greedy, sampled = map(json.loads, capsys.readouterr().out.splitlines())
    assert greedy == {"mode": "greedy", "score": "strict", "n": 4, "before": 0.5, "after": 0.75,
                      "better": 2, "worse": 1, "p": 1.0}
    assert sampled == {"mode": "T = 1", "score": "strict", "n": 4, "before": 0.0, "after": 1.0,
                       "better": 4, "worse": 0, "p": 0.125}


def test_two_folders_are_compared_at_their_ends(tmp_path, capsys):
    first = write(tmp_path / "a", {(0, False): [1, 1], (5, False): [0, 1], (5, True): [0, 0]})
    second = write(tmp_path / "b", {(0, False): [1, 1], (0, True): [1, 0]})
    compare.work(argparse.Namespace(after=second, before=first, score="strict"))
    greedy, sampled = map(json.loads, capsys.readouterr().out.splitlines())
    assert (greedy["before"], greedy["after"]) == (0.5, 1.0)
    assert (sampled["before"], sampled["after"]) == (0.0, 0.5)


@pytest.mark.parametrize("case, message", [
    ("other problems", "not of the same problems"), ("one evaluation", "has one evaluation"),
    ("no scores", "has no scores"), ("other score", "--score taste: the scores are strict, format"),
    ("no file", "samples.jsonl")])
def test_what_cannot_be_compared_is_told_in_one_line(tmp_path, case, message):
    scores = {(0, False): [0, 1], (0, True): [0, 1]}
    before = write(tmp_path / "before", scores)
    after = write(tmp_path / "after", {(5, False): [1], (5, True): [1]}
                  if case == "other problems" else scores)
    if case == "no scores":
        path = tmp_path / "after" / "samples.jsonl"
        path.write_text(json.dumps({"step": 0, "sampled": False, "prompt": "p0"}) + "\n")
    args = argparse.Namespace(after=after, before=before, score=None)
    if case == "one evaluation":
        args.before = None
    if case == "other score":
        args.score = "taste"
    if case == "no file":
        args.after = str(tmp_path / "nowhere")
    with pytest.raises((InputError, OSError), match=message):
        compare.work(args)


@pytest.fixture(scope="module")
def arithmetic():
    return module_at(ROOT / "examples/arithmetic.py")


def test_arithmetic_has_right_answers_and_splits_that_share_nothing(arithmetic):
    splits = {name: arithmetic.questions(name) for name in arithmetic.SPLITS}
    assert {len(problems) for problems in splits.values()} == {1691, 126, 449, 450}
    compute = {"add": lambda a, b: a + b, "multiply": lambda a, b: a * b,
               "subtract": lambda a, b: (a + b) - a}
    for name, problems in splits.items():
        assert arithmetic.questions(name) == problems, "the same every time"
        for problem in problems:
            a, b = problem["numbers"]
            assert int(problem["answer"]) == compute[problem["operation"]](a, b)
            asked = {int(n) for n in re.findall(r"\d+", problem["question"])}
            assert asked == ({a + b, a} if problem["operation"] == "subtract" else {a, b})
    for one, other in itertools.combinations(splits, 2):
        for what in (lambda p: p["question"], lambda p: tuple(sorted(p["numbers"]))):
            assert not {what(p) for p in splits[one]} & {what(p) for p in splits[other]}
        for words in (*arithmetic.PHRASINGS.values(), arithmetic.NAMES, arithmetic.THINGS):
            assert not set(words[one]) & set(words[other])


def test_arithmetic_refuses_a_split_it_does_not_have(arithmetic):
    train, test = arithmetic.load("gsm8k", False)
    assert test == arithmetic.questions("test") and train == arithmetic.questions("train")
    assert arithmetic.load("validation", True)[1] == arithmetic.questions("validation")
    with pytest.raises(InputError, match="--data somewhere: this task has train, validation"):
        arithmetic.load("somewhere", False)


def test_misuse_ends_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["compare", "--foo", "x"])
    assert run_main(compare.parse, compare.work) == 2
    one_error(capsys, "unrecognized arguments: --foo")


def test_two_digit_sums_are_another_task(arithmetic):
    task = module_at(ROOT / "examples/two_digit.py")
    train, test = task.load("gsm8k", True)
    assert train == arithmetic.questions("train")
    assert len({problem["question"] for problem in test}) == len(test) == 300
    assert (train, test) == task.load("gsm8k", True), "the same every time"
    for problem in test:
        a, b = (int(n) for n in re.findall(r"\d+", problem["question"]))
        assert min(a, b) >= 10 and max(a, b) < 100 and int(problem["answer"]) == a + b
    with pytest.raises(InputError, match="--data validation: this task has no other data"):
        task.load("validation", True)


def test_arithmetic_pays_the_last_number(arithmetic):
    problem = {"answer": "12"}
    assert arithmetic.score("3 + 9 = 12.", problem) == {"lenient": 1, "strict": 0, "format": 0}
    assert arithmetic.score("so #### 12", problem) == {"lenient": 1, "strict": 1, "format": 1}
    assert list(arithmetic.score("", problem).values()) == [0, 0, 0]
