"""How often support/boxed.py's `same` agrees with math-verify (pip install math-verify):

    python bench/boxed_agreement.py MATH500.jsonl

Every gold answer of the file is compared with respellings of itself and with spoilt ones
(bench/respellings.py) by both. Prints a table by kind, every disagreement, and a JSON line. The
changes are made up, not a model's: what models really write may be spread otherwise.

Rows with a "problem" show how many of them each pays for a formula copied from the question.
"""
import json
import logging
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from respellings import RIGHT, WRONG
from support.boxed import same

UNREADABLE = "trailing dot"  # math-verify cannot read \boxed{5.}, which says nothing about `same`


@dataclass
class Pair:
    kind: str
    gold: str
    answer: str
    ours: bool
    theirs: bool


def changes(gold):
    """(kind, gold answer, changed answer) of all that did change."""
    rng = random.Random(0)
    for kind, change in RIGHT.items():
        for a in gold:
            yield kind, a, change(a)
    for kind, change in WRONG.items():
        for a in gold:
            yield kind, a, change(a, rng, gold)


def measure(gold):
    """Every pair as both judge it."""
    from math_verify import parse, verify
    logging.disable(logging.CRITICAL)
    parsed = {}
    pairs = []
    for kind, a, b in changes(gold):
        if b is None or (a == b and kind != "itself"):
            continue
        for text in (a, b):
            if text not in parsed:
                parsed[text] = parse("\\boxed{" + text + "}")
        pairs.append(Pair(kind, a, b, same(b, a), verify(parsed[a], parsed[b])))
    return pairs


def paid_for_a_copy(rows):
    """How many questions hold a formula that is paid as their answer: {judge: number}."""
    from math_verify import parse, verify
    paid = {"same": 0, "math-verify": 0}
    for row in rows:
        found = re.findall(r"\$([^$]+)\$|\\\[(.+?)\\\]", row.get("problem", ""), re.DOTALL)
        formulas = {(a or b).strip().rstrip(".,;?") for a, b in found}
        formulas = [text for text in formulas if 1 < len(text) < 200]
        gold = parse("\\boxed{" + row["answer"] + "}")
        paid["same"] += any(same(text, row["answer"]) for text in formulas)
        boxes = ["\\boxed{" + text + "}" for text in formulas]
        paid["math-verify"] += any(verify(gold, parse(box)) for box in boxes)
    return paid


def report(name, pairs):
    """A line of the table; returns the share on which both agree."""
    agree = sum(p.ours == p.theirs for p in pairs) / len(pairs)
    ours = sum(p.ours for p in pairs) / len(pairs)
    theirs = sum(p.theirs for p in pairs) / len(pairs)
    print(f"{name:24} {len(pairs):5} pairs  agree {agree:7.2%}  same {ours:7.2%}  "
          f"math-verify {theirs:7.2%}")
    return agree


def main(path):
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [row | {"answer": str(row["answer"])} for row in rows]
    pairs = measure([row["answer"] for row in rows])
    for kind in (*RIGHT, *WRONG):
        some = [p for p in pairs if p.kind == kind]
        if some:
            report(kind, some)
    for title, ours in (("same says yes, math-verify no", True),
                        ("math-verify says yes, same no", False)):
        print(f"\n{title}")
        for p in pairs:
            if p.ours == ours and p.theirs != ours and p.kind != UNREADABLE:
                print(f"  {p.kind:24} {p.gold!r:45} {p.answer!r}")
    print()
    figures = {"right": report("all respelt", [p for p in pairs if p.kind in RIGHT]),
               "wrong": report("all spoilt", [p for p in pairs if p.kind in WRONG]),
               "all": report("all", pairs),
               "all but trailing dots": report("all but trailing dots",
                                               [p for p in pairs if p.kind != UNREADABLE])}
    figures["paid for a copy of the question"] = paid_for_a_copy(rows)
    print(json.dumps({"pairs": len(pairs)} | figures))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
