r"""python -m pytest -q tests/test_boxed.py

Answers in \boxed{}: finding and comparing them, and the agreement with math-verify.
"""
import importlib.util
import json
import os
from pathlib import Path

import pytest

from support.boxed import boxed, normalise, same
from support.data import module_at

ROOT = Path(__file__).resolve().parent.parent
ASSETS = Path(os.environ.get("TINYLORA_ASSETS") or "/nonexistent")
needs_assets = pytest.mark.skipif(
    not ASSETS.is_dir(), reason="needs the data folder named by TINYLORA_ASSETS")

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
    (r"2, 3, \text{ and } 4", "2,3,4", True),
    (r"2, 3 \text{ and } 4", "2,3,4", True),
    (r"7, -2, \text{ and } -5", "-5,-2,7", True),
    (r"2, 3, \text{ and } 4", "2,3", False),
    ("(1,2),(3,4)", "(1,3),(2,4)", False),
    (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}",
     r"\begin{bmatrix}-\frac{1}{3}\\\frac23\end{bmatrix}", True),
    (r"\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}",
     r"\begin{pmatrix} 1 & 0 \\ 1 & 0 \end{pmatrix}", False),
    # expressions: spelling only
    (r"11\sqrt2", r"11 \cdot \sqrt{2}", True),
    (r"\frac{\sqrt{3}}{3}", r"\sqrt{3}/3", True),
    ("x^{2}y", "x^2y", True),
    ("x^{2y}", "x^2y", False),
    ("1/2x", r"\frac{1}{2x}", False),
    ("2516_8", "2516_{8}", True),
    ("2516_8", "2516", False),
    ("2516_8", "2516_9", False),
    # sums in one order, inside brackets too; products and equations as they stand
    ("2i+1", "1 + 2i", True),
    ("-x+1", "1-x", True),
    (r"x + 0.5", r"\frac12+x", True),
    (r"\frac{1}{2\sqrt{33}+15}", r"\frac{1}{15+2\sqrt{33}}", True),
    (r"10^{\frac{-5+\sqrt{13}}{6}}", r"10^{\frac{\sqrt{13} - 5}{6}}", True),
    ("(y-1,2+x)", "(-1+y,x+2)", True),
    ("a-b", "b-a", False),
    ("a-b+c", "a-c+b", False),
    ("2^-1+3", "2^3-1", False),
    ("|x-1|+2", "|x+2-1|", False),
    (r"\begin{pmatrix} a+b \\ c-d \end{pmatrix}",
     r"\begin{pmatrix} a-d+b \\ c \end{pmatrix}", False),
    (r"a+b\equiv c+d", r"a+d+b\equiv c", False),
    ("-a+", "-a", False),
    ("(x-1)(x+1)", "x^2-1", False),  # "Factor x^2-1": what algebra would pay stands in the question
    ("9+1", "10", False),
    # relations, intervals
    ("x >= 5", r"x \geq 5", True),
    (r"x \leqslant 5", "x ≤ 5", True),
    (r"x \lt 3", "x<3", True),
    ("3 > x", "x < 3", True),
    (r"5 \geq x", r"x \le 5", True),
    ("f(4) > f(1) > f(2)", "f(2) < f(1) < f(4)", True),
    (r"x \neq 3", "x != 3", True),
    ("-x > -1", "x < 1", True),
    (r"-5 < -x \leq -2", "2 <= x < 5", True),
    ("-x > 1", "x < 1", False),
    ("x > 5", "x < 5", False),
    ("x > 5", r"x \geq 5", False),
    (r"-2 < x \le 7", "(-2,7]", True),
    (r"7 \ge x > -2", "(-2,7]", True),
    ("0 < f(x) < 1", "(0,1)", True),
    ("x > 3", r"(3,\infty)", True),
    (r"x \leq 3", r"(-\infty,3]", True),
    (r"-2 < x < 7", "(-2,7]", False),
    ("5 > x < 3", "(3,5)", False),
    ("2x < 3", r"(-\infty,3)", False),
    # several names, and names of other kinds
    ("(p,q) = (3,2)", "(3,2)", True),
    (r"(x, y) = (5, 8) \quad \text{and} \quad (8, 5)", "(5,8),(8,5)", True),
    ("AB=4, CD=5", "4, 5", True),
    ("AB=5, CD=4", "5, 4", True),
    ("x=1,y=2", "2,1", False),
    (r"V_{1}:V_{2}=11:21", "11:21", True),
    ("|AB| = 1", "1", True),
    (r"\frac{NO}{BO} = \frac{1}{\sqrt{6}}", r"\frac{1}{\sqrt6}", True),
    ("7 = 11a+c", "11a+c", False),
    ("2x + z = 1", "1", False),
    ("xy=5", "5", False),
    ("x = 5+5+1 = 11", "11", True),
    ("z = 1+1 = 2", "z = 3-1 = 2", True),
    (r"x \approx 11", "11", True),
    (r"x = \frac13 \approx 0.33", r"\frac{1}{3}", True),
    (r"\frac13 \approx 0.33", "0.33", False),
    (r"\frac13 \approx 0.33", "1/3", True),
    (r"\frac13 \approx 0.337", r"\frac13 \approx 0.33", False),
    # percent in words, other separators, brackets, points given twice
    ("28 percent", r"28\%", True),
    ("28 pct", "28", True),
    ("28 percentage", "28", True),
    (r"\left( \frac13 \right)", "1/3", True),
    ("(0;-2;6),(4;0;0)", "(4,0,0),(0,-2,6)", True),
    ("-12;-11", r"\{-11, -12\}", True),
    ("1,000;2", "2,1000", True),
    (r"\pm 2021", "{-2021, 2021}", True),
    ("(1,2),(3,4),(1,2)", "(3,4),(1,2)", True),
    (r"\left[\begin{array}{cc}1 & 2 \\3 & 4\end{array}\right]",
     r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", True),
    ("16.50 €", "16.5", True),
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
    (r"\boxed{\boxed 5}", "5"),
    (r"\boxed{\boxed 5\}}", "5"),
    (r"\boxed{1} {\boxed{\boxed{2}, 3", "2"),
    (r"\boxed{1\\} \\boxed{2}", r"1\\"),
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


def test_a_decimal_comma():
    """Of the answer only: MATH's gold answer 2,16 is a list, and three digits are thousands."""
    assert same("1000,99", "1000.99") and same("-1,22", "-1.22")
    assert not same("1000.99", "1000,99") and not same("2.16", "2,16")
    assert not same("1,000", "1") and not same("1,2", "1.2") and not same("(1,22)", "1.22")
    assert not same("0,111", "111")


@pytest.mark.parametrize("text,content", BOXED, ids=lambda x: repr(x)[:24])
def test_boxed(text, content):
    assert boxed(text) == content


def test_long_answers_are_compared_as_they_are():
    """Only the first 500 characters compared; or 500 characters too few for a real answer."""
    long = "1+" * 250
    assert same(long + "1", long + "1") and not same(long + "1", long + "2")
    assert normalise("\\dfrac12" * 62) == normalise("\\frac12" * 62) == "\\frac{1}{2}" * 62


@needs_assets
@pytest.mark.parametrize("name,count",
                         [("math500", 500), ("aime24", 30), ("amc23", 40), ("train_12k", 11998)])
def test_every_gold_answer_is_found_and_told_from_others(name, count):
    """MATH500, AIME24, AMC23 and MATH's training set, two rows of which have no answer: the last
    box is read, another spelling is paid, one more digit is not."""
    golds = read_golds(name)
    assert len(golds) == count
    for gold in golds:
        assert boxed("first $\\boxed{-999}$, then $\\boxed{" + gold + "}$.") == gold
        assert same("$" + gold.replace("\\frac", "\\dfrac") + "$.", gold), gold
        assert not same(gold + "7", gold) and not same("7" + gold, gold), gold


def read_golds(name):
    lines = (ASSETS / "math" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    answers = [json.loads(line)["answer"] for line in lines if line.strip()]
    texts = [f"{x:.0f}" if type(x) is float else str(x) for x in answers]
    return [text for text in texts if text.strip()]


@needs_assets
@pytest.mark.skipif(not importlib.util.find_spec("math_verify"),
                    reason="needs math-verify (requirements-dev.txt)")
def test_agreement_with_math_verify(monkeypatch):
    """On MATH500's gold answers, respelt and spoilt: at least 99% of the verdicts agree.

    Answers with a full stop are left out, math-verify cannot read them. Of the spoilt answers
    only 90 degrees against 90 may be paid.
    """
    path = ROOT / "bench" / "boxed_agreement.py"
    monkeypatch.syspath_prepend(path.parent)  # it imports its neighbour
    bench = module_at(path)
    bench.same = same
    judged = bench.measure(read_golds("math500"))
    counted = [pair for pair in judged if pair.kind != bench.UNREADABLE]
    agree = sum(pair.ours == pair.theirs for pair in counted)
    assert len(counted) > 5000 and agree / len(counted) >= 0.99
    respelt = [pair for pair in judged if pair.kind in bench.RIGHT]
    assert sum(pair.ours for pair in respelt) / len(respelt) >= 0.99
    paid = [(pair.gold, pair.answer) for pair in judged
            if pair.kind in bench.WRONG and pair.ours and pair.gold != pair.answer]
    for pair in paid:
        assert {text.replace("^\\circ", "") for text in pair} == {"90"}, paid
