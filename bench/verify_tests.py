"""How often support/boxed.py's `same` gives the verdict that math-verify's own tests expect:

    git clone https://github.com/huggingface/Math-Verify
    python bench/verify_tests.py Math-Verify/tests

Only cases whose two sides are one answer each are used: what to look for in a long text is another
question. Prints every other verdict and a JSON line.
"""
import ast
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support.boxed import boxed, same


def tables(path):
    """(names, rows) of every @pytest.mark.parametrize of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "parametrize":
            names = [name.strip() for name in ast.literal_eval(node.args[0]).split(",")]
            for row in node.args[1].elts:
                cells = getattr(row, "elts", [])
                if cells and all(isinstance(cell, ast.Constant) for cell in cells):
                    yield dict(zip(names, ast.literal_eval(row)))


def only_answer(text):
    """What a text boxes once, its only formula, or a short text itself; else None."""
    if "\\boxed" in text:
        return boxed(text) if text.count("\\boxed") == 1 else None
    found = re.findall(r"\$\$?([^$\n]+)\$\$?|\\[(\[](.+?)\\[)\]]", text)
    if len(found) == 1:
        answer = found[0][0] or found[0][1]
    elif found or "$" in text or len(text) > 30:
        return None
    else:
        answer = text
    # a backslash escaped twice is a slip of the table
    return None if re.search(r"\\\\(?:left|frac|le)", answer) else answer


def cases(folder):
    """{(gold, answer): is it right}; a pair on which two tests differ is left out."""
    found = {}
    for path in sorted(Path(folder).glob("test_*.py")):
        for row in tables(path):
            expected = row.get("expected", row.get("result"))
            if {"gold", "pred"} <= set(row) and isinstance(expected, int):
                pair = only_answer(row["gold"]), only_answer(row["pred"])
                if None not in pair:
                    found.setdefault(pair, set()).add(bool(expected))
    return {pair: verdicts.pop() for pair, verdicts in found.items() if len(verdicts) == 1}


def main(folder):
    expected = cases(folder)
    paid = {pair: same(pair[1], pair[0]) for pair in expected}
    for title, verdict in (("paid, but wrong", True), ("right, but not paid", False)):
        print(title)
        for pair, right in expected.items():
            if paid[pair] == verdict and right != verdict:
                print(f"  {pair[0]!r:45} {pair[1]!r}")
    print(json.dumps({"cases": len(expected),
                      "agree": sum(paid[pair] == right for pair, right in expected.items()),
                      "paid wrongly": sum(paid[p] and not right for p, right in expected.items())}))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
