"""tools/own_solutions.py: SFT data made of a model's own right answers."""
import json

from helpers import ROOT, TOY, one_error, read_rows

import gsm8k
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
    one_error(capsys, "line 2: its question is not in the training file")

    committed = ROOT / "results" / "figures" / "own-solutions"
    gold = {row["question"]: gsm8k.checked(row, "")["gold"]
            for row in read_rows(TOY / "train.jsonl")}
    problems, test = gsm8k.load(committed)
    assert all(problem["gold"] == gold[problem["question"]] for problem in problems)
    assert test == gsm8k.read_problems(TOY / "test.jsonl")
