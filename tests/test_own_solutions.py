"""tools/own_solutions.py: SFT data made of a model's own right answers."""
import json

from helpers import ROOT, TOY, one_error, read_rows

import gsm8k
from support.data import load_task
from tools import own_solutions


def test_own_solutions_are_the_models_right_answers(tmp_path, capsys):
    """Wrong ones, greedy ones and those of test problems must not get in; the committed ones are
    right answers to training problems."""
    rows = read_rows(TOY / "train.jsonl")[:3]
    samples = [{"question": row["question"], "sampled": sampled, "step": 0, "response": response,
                "scores": {"strict": float(right)}}
               for i, row in enumerate(rows)
               for sampled, response, right in ((False, "greedy", 1), (True, f"#### {i}", i != 1))]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    out = tmp_path / "out"
    assert own_solutions.main([str(tmp_path), str(TOY), str(out)]) == 0
    assert read_rows(out / "train.jsonl") == [
        {"question": rows[i]["question"], "answer": f"#### {i}"} for i in (0, 2)]
    capsys.readouterr()
    assert own_solutions.main([str(tmp_path), str(TOY), str(out)]) == 2
    one_error(capsys, "exists already")
    samples[1]["question"] = read_rows(TOY / "test.jsonl")[0]["question"]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    assert own_solutions.main([str(tmp_path), str(TOY), str(tmp_path / "new")]) == 2
    one_error(capsys, "line 2: its question is not one to train on")

    committed = ROOT / "results" / "figures" / "own-solutions"
    gold = {row["question"]: gsm8k.checked(row, "")["gold"]
            for row in read_rows(TOY / "train.jsonl")}
    problems, test = gsm8k.load(committed)
    assert all(problem["gold"] == gold[problem["question"]] for problem in problems)
    assert test == gsm8k.read_problems(TOY / "test.jsonl")


def test_own_solutions_of_a_task(tmp_path):
    """They are right by its first score, to questions that it trains on, and SFT learns them."""
    arithmetic = load_task(ROOT / "examples" / "arithmetic.py")
    questions = [problem["question"] for problem in arithmetic.load("gsm8k", False)[0][:2]]
    rows = [{"question": question, "sampled": True, "step": 0, "response": f"It is {i}.",
             "scores": {"lenient": float(i), "strict": float(1 - i)}}
            for i, question in enumerate(questions)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    task = str(ROOT / "examples" / "arithmetic.py")
    assert own_solutions.main([str(tmp_path), task, str(out)]) == 0
    assert read_rows(out / "train.jsonl") == [{"question": questions[1], "answer": "It is 1."}]
    assert [path.name for path in out.iterdir()] == ["train.jsonl"]

    own = load_task(ROOT / "examples" / "own_answers.py")
    for data in ("gsm8k", "validation"):  # gsm8k: the flag's default
        training, problems = own.load(data, False)
        all_training, same_problems = arithmetic.load(data, False)
        assert problems == same_problems
        answers = {problem["question"]: problem["answer"] for problem in all_training}
        assert training
        for problem in training:
            assert problem["answer"] == answers[problem["question"]]
            assert own.score(problem["solution"], problem)["lenient"] == 1
