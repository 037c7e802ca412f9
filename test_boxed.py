r"""python -m pytest -q test_boxed.py        \boxed{} answers: finding, comparing, MATH-style data, agreement with math-verify."""
import importlib.util
import json
import time

import pytest

import gsm8k
import train
from boxed import boxed, same
from files import InputError
from test_tinylora import ASSETS, ROOT, needs_assets

CASES = [
    # fractions and numbers
    (r"\dfrac{1}{2}", r"\frac12", True),
    (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}", True),
    (r"\frac{1}{2}", "0.50", True),
    ("1/2", ".5", True),
    (r"-\frac{3}{8}", r"\frac{-3}{8}", True),
    (r"\frac{2}{4}", r"\frac{1}{2}", True),
    (r"\frac{1}{3}", "0.3333", False),
    (r"\frac{1}{2}", r"\frac{2}{1}", False),
    (r"137 \frac{1}{2}", "137.5", True),
    ("1 1/2", "1.5", True),
    ("1 1/2", "5.5", False),  # without its space it would be 11/2
    (r"2\cdot\frac{1}{2}", "2.5", False),  # a product, not a mixed number
    (r"-1\frac{1}{2}", "-1.5", True),
    (r"\frac{1}{0}", "0", False),
    ("18.00", "18", True),
    ("-0", "0", True),
    ("\u22125", "-5", True),
    ("025", "25", True),
    ("10", "100", False),
    # commas: thousands or a list
    (r"10,\!080", "10080", True),
    ("58,500", "58500", True),
    ("1{,}000{,}000", "1,000,000", True),
    ("1,2,3", "123", False),
    ("(1,000)", "(1000)", False),
    ("(6,235)", "(6235)", False),
    # units, words, choices
    (r"5.4 \text{ cents}", "5.4", True),
    (r"864 \mbox{ inches}^2", r"864 \text{ square inches}", True),
    (r"60\text{ miles}/\text{hour}", "60", True),
    (r"\$32,\!348", "32348", True),
    (r"50\%", "50", True),
    (r"50\%", "0.5", False),
    (r"90^{\circ}", "90°", True),
    (r"3 \text{ million}", "3", False),
    (r"4\text{ p.m.}", r"4\text{ a.m.}", False),
    (r"\text{(C)}", "C", True),
    (r"\text{(C)}", r"\textbf{(D)}", False),
    (r"\text{Even}", "even", True),
    (r"\text{even}", r"\text{odd}", False),
    (r"n=\text{odd}", r"n=\text{even}", False),
    ("5x", "5", False),
    ("5i", "5", False),
    # names
    ("x=5", "5", True),
    (r"x \in [-2,7]", "[-2,7]", True),
    ("y = -1", "x = -1", False),  # two different lines
    ("x=1,y=2", "x=2,y=1", False),
    (r"x = 1 \text{ or } x = -2", "-2,1", True),
    # tuples, intervals, lists, matrices
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)", True),
    ("(1,2)", "(2,1)", False),
    ("(1,2)", "(1,3)", False),
    ("(1,2)", "1,2", False),
    ("(3,4]", "(3,4)", False),
    (r"(-\infty, 2) \cup (3, \infty)", r"(-\infty,2.0)\cup(3,+\infty)", True),
    ("1,-2", "-2, 1", True),
    ("1,1,2", "1,2", False),
    (r"\{1,2\}", "2,1", True),
    (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}", True),
    ("(1,2),(3,4)", "(3,4),(1,2)", True),
    ("(1,2),(3,4)", "(1,3),(2,4)", False),
    (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"\begin{bmatrix}-\frac{1}{3}\\\frac23\end{bmatrix}", True),
    (r"\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}", r"\begin{pmatrix} 1 & 0 \\ 1 & 0 \end{pmatrix}", False),
    # expressions: spelling only
    (r"11\sqrt2", r"11 \cdot \sqrt{2}", True),
    (r"\frac{\sqrt{3}}{3}", r"\sqrt{3}/3", True),
    ("x^{2}y", "x^2y", True),
    ("x^{2y}", "x^2y", False),
    ("1/2x", r"\frac{1}{2x}", False),
    ("2516_8", "2516_{8}", True),
    ("2516_8", "2516", False),
    ("2516_8", "2516_9", False),
    # rubbish
    ("", "", False),
    ("9" * 10000, "9" * 9999, False),
    ("1e999999999", "1", False),
    (r"\frac{" * 2000, "1", False),
]
BOXED = [
    (r"so \boxed{5}.", "5"),
    (r"\boxed{1} and then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\fbox{7}", "7"),
    (r"$\boxed 5$", "5"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"\boxed{x \in \left\{ 1 \right.}", r"x \in \left\{ 1 \right."),
    (r"{ \boxed{3} and \boxed{4", "3"),  # cut off: the last complete one
    (r"\boxed{\boxed{5}}", "5"),
    ("\\boxed{\n8\n}", "\n8\n"),
    (r"\boxed{5}, in \boxed form", "5"),
    ("the answer is 5", None),
    (r"\boxed{", None),
    ("\\boxed{" * 2000 + "9" + "}" * 2000, "9"),
    ("{" * 100000, None),
]


@pytest.mark.parametrize("a,b,agree", CASES, ids=lambda x: repr(x)[:24])
def test_same(a, b, agree):
    assert same(a, b) == same(b, a) == agree


@pytest.mark.parametrize("text,content", BOXED, ids=lambda x: repr(x)[:24])
def test_boxed(text, content):
    assert boxed(text) == content


def test_nasty_answers_take_no_time():
    """10 kB of anything: no recursion, no backtracking, no int() of too many digits."""
    start = time.time()
    for unit in ("1", "{", "}", "\\frac", "\\frac{", ",", "\\boxed{", "\\boxed ", "(", "1,000", " ", "\\text{", "-", "\\pm", "^{", "x=", "&", "$", "\n"):
        for text in (unit * (10000 // len(unit)), unit * (490 // len(unit))):
            boxed(text), same(text, "1"), same(text, text + " ")
    assert time.time() - start < 5


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_math_rows_and_scores(tmp_path):
    """The boxed prompt, numbers as answers, the three scores, an empty answer left out; a row without text is named."""
    rows = gsm8k.read_problems(write(tmp_path / "a.jsonl", {"problem": "P?", "answer": "\\frac{1}{2}", "solution": "S \\boxed{1/2}"}, {"problem": "Q?", "answer": 27.0}, {"problem": "R?", "answer": ""}))
    assert [(r["prompt"], r["answer"], r["solution"]) for r in rows] == [("P?" + gsm8k.BOXED_INSTRUCTION, "\\frac{1}{2}", "S \\boxed{1/2}"), ("Q?" + gsm8k.BOXED_INSTRUCTION, "27", None)]
    for text, scores in (("so \\boxed{0.5}", (1, 1, 1)), ("so \\boxed{2}, or 0.5", (0, 0, 1)), ("it is 0.5", (0, 1, 0)), ("\\boxed{}", (0, 0, 0)), ("", (0, 0, 0)), ("#### 0.5", (0, 1, 0))):
        assert tuple(gsm8k.score(text, rows[0]).values()) == scores, text
    for row in ({"problem": "P?"}, {"problem": "", "answer": "1"}, {"problem": 3, "answer": "1"}, {"problem": "P?", "answer": True}, {"problem": "P?", "answer": None}):
        with pytest.raises(InputError, match="line 1"):
            gsm8k.read_problems(write(tmp_path / "b.jsonl", row))


def test_a_file_of_math_problems_evaluates(tmp_path, capsys):
    """--eval-only --data FILE; training wants a folder, and SFT wants solutions."""
    path = write(tmp_path / "math.jsonl", {"problem": "What is 1 + 1?", "answer": "2"}, {"problem": "And 2 + 3?", "answer": "\\boxed{5}"})
    assert train.main(["--eval-only", "--data", path, "--max-new-tokens", "8", "--out", str(tmp_path / "a")]) == 0
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["eval_count"] == 2
    assert "put your final answer within \\boxed{}" in json.loads((tmp_path / "a" / "samples.jsonl").read_text().splitlines()[0])["prompt"]
    for name in ("train", "test"):
        write(tmp_path / f"{name}.jsonl", {"problem": "What is 1 + 1?", "answer": "2"})
    assert train.main(["--algo", "sft", "--data", str(tmp_path), "--out", str(tmp_path / "b")]) == 2
    assert "without a worked solution" in capsys.readouterr().err


@needs_assets
@pytest.mark.parametrize("name,count", [("math500", 500), ("aime24", 30), ("amc23", 40), ("train_12k", 11998)])
def test_real_files_read_and_agree_with_themselves(name, count):
    """MATH500, AIME24, AMC23 and MATH's training set, two rows of which have no answer: every gold answer, boxed, earns all three scores."""
    rows = gsm8k.read_problems(ASSETS / "math" / f"{name}.jsonl")
    assert len(rows) == count
    for row in rows:
        assert set(gsm8k.score("so $\\boxed{" + row["answer"] + "}$.", row).values()) == {1.0}, row["answer"]


@needs_assets
@pytest.mark.skipif(not importlib.util.find_spec("math_verify"), reason="needs math-verify (requirements-dev.txt)")
def test_agreement_with_math_verify():
    """On MATH500's gold answers, respelt and spoilt: at least 99% of verdicts agree (trailing dots apart, which math-verify cannot read), and
    of the spoilt ones only 90 degrees against 90 is paid."""
    spec = importlib.util.spec_from_file_location("boxed_agreement", ROOT / "bench" / "boxed_agreement.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    rows = bench.measure([r["answer"] for r in gsm8k.read_problems(ASSETS / "math" / "math500.jsonl")])
    counted = [row for row in rows if row[0] != "trailing dot"]
    assert len(counted) > 5000 and sum(x == y for *_, x, y in counted) / len(counted) >= 0.99
    assert sum(x for kind, *_, x, _ in rows if kind in bench.RIGHT) / sum(row[0] in bench.RIGHT for row in rows) >= 0.99
    paid = [(a, b) for kind, a, b, x, _ in rows if kind in bench.WRONG and x and a != b]
    assert all({a.replace("^\\circ", ""), b.replace("^\\circ", "")} == {"90"} for a, b in paid), paid
