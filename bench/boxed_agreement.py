"""How often boxed.same agrees with math-verify: python bench/boxed_agreement.py MATH500.jsonl (needs math-verify)

Every gold answer of the file against respellings of itself (RIGHT: the same value) and against spoilt ones (WRONG: another value),
judged by both. Prints a table by kind, every disagreement, and a JSON line. The perturbations are ours, not a model's: what models
really write may be spread otherwise.
"""
import collections
import json
import logging
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from boxed import same

integer = lambda a: re.fullmatch(r"-?\d+", a)
RIGHT = {  # the same value, spelt otherwise; a kind that leaves the text as it was is skipped
    "itself": lambda a: a,
    "\\dfrac": lambda a: a.replace("\\frac", "\\dfrac") if "\\frac" in a else None,
    "\\tfrac to \\frac": lambda a: re.sub(r"\\[dt]frac", r"\\frac", a),
    "spaces added": lambda a: re.sub(r"([-+=,(){}])", r" \1 ", a).replace("\\ ", "\\") if "\\text" not in a and "mbox" not in a and "begin" not in a and "\\!" not in a and not re.search(r"\d,\d{3}", a) else None,
    "spaces dropped": lambda a: re.sub(r"\s+(?![a-zA-Z])", "", a) if "\\text" not in a and "mbox" not in a else None,
    "thin spaces": lambda a: re.sub(r"(?<=[\d}]) ?(?=[-+])", r"\\, ", a),
    "\\left \\right added": lambda a: re.sub(r"[(\[]", r"\\left\g<0>", re.sub(r"[)\]]", r"\\right\g<0>", a)) if "left" not in a and "text" not in a else None,
    "\\left \\right dropped": lambda a: re.sub(r"\\(left|right)(?![a-z])", "", a),
    "$...$": lambda a: "$" + a + "$",
    "trailing dot": lambda a: a + ".",
    "units dropped": lambda a: re.sub(r"\s*\\(text|mbox)\{[^}]*\}(\^2)?$", "", a) if not a.startswith("\\text") else None,
    "units added": lambda a: a + " \\text{ square units}" if integer(a) or re.fullmatch(r"\\frac\{\d+\}\{\d+\}", a) else None,
    "dollar sign": lambda a: "\\$" + a if integer(a) else a.replace("\\$", ""),
    ".0 appended": lambda a: a + ".0" if integer(a) else None,
    "18.5 -> 18.50": lambda a: a + "0" if re.fullmatch(r"-?\d*\.\d+", a) else None,
    "a/b": lambda a: re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", a) if not re.search(r"\d\s*\\[dt]?frac|frac\{\d+\}\{\d+\}\s*[\\a-z]", a) else None,
    "\\frac12": lambda a: re.sub(r"\\frac\{(\d)\}\{(\d)\}", r"\\frac\1\2", a),
    "\\frac{-1}{2}": lambda a: re.sub(r"^-\\frac\{(\d+|\\pi)\}", r"\\frac{-\1}", a),
    "mixed number": lambda a: re.sub(r"^\\frac\{(\d+)\}\{(\d+)\}$", lambda m: f"{int(m[1]) // int(m[2])}\\frac{{{int(m[1]) % int(m[2])}}}{{{m[2]}}}" if int(m[1]) > int(m[2]) else m[0], a),
    "decimal": lambda a: re.sub(r"^\\frac\{(\d+)\}\{(2|4|8|16|5|25|100)\}$", lambda m: str(int(m[1]) / int(m[2])), a),
    "thousands ,": lambda a: f"{int(a):,}" if integer(a) and abs(int(a)) >= 1000 else a.replace(",\\!", ","),
    "thousands ,\\!": lambda a: f"{int(a):,}".replace(",", ",\\!") if integer(a) and abs(int(a)) >= 1000 else re.sub(r"^(\\\$)?(\d+),(\d{3})$", r"\1\2,\\!\3", a),
    "degrees dropped": lambda a: a.replace("^\\circ", ""),
    "^{\\circ}": lambda a: a.replace("^\\circ", "^{\\circ}"),
    "degrees in words": lambda a: a.replace("^\\circ", "\\text{ degrees}"),
    "x=": lambda a: "x = " + a if "=" not in a and "text" not in a and "\\in " not in a and not re.search("[a-z]", re.sub(r"\\[a-z]+", "", a)) else None,
    "x= dropped": lambda a: re.sub(r"^[a-z] ?= ?", "", a),
    "\\sqrt3": lambda a: re.sub(r"\\sqrt\{(\d)\}", r"\\sqrt\1", a),
    "\\cdot\\sqrt": lambda a: re.sub(r"(\d)\s*(\\sqrt|\\pi)", r"\1 \\cdot \2", a),
    "x^{2}": lambda a: re.sub(r"\^(\d)", r"^{\1}", a),
    "base braces": lambda a: re.sub(r"_(\d)$", r"_{\1}", a) if re.search(r"_\d$", a) else re.sub(r"_\{(\d)\}", r"_\1", a),
    "list turned round": lambda a: ", ".join(reversed(a.split(","))) if re.fullmatch(r"[-\d]+(, ?[-\d]{1,2})+", a) else None,
    "\\pm written out": lambda a: re.sub(r"(.*?) ?\\pm ?(.*)", r"\1 + \2, \1 - \2", a) if "\\pm" in a and "\\{" not in a else None,
    "choice, word bare": lambda a: re.sub(r"^\\text\{\(?(\w+)\)?\}$", r"\1", a),
    "bmatrix": lambda a: a.replace("pmatrix", "bmatrix"),
    "matrix a/b": lambda a: re.sub(r"(\d+)/(\d+)", r"\\frac{\1}{\2}", a) if "matrix" in a else None,
    "+\\infty": lambda a: re.sub(r"(?<=[,(] )\\infty|(?<=[,(])\\infty", r"+\\infty", a),
    "unicode": lambda a: a.replace("-", "\u2212").replace("\\pi", "π").replace("^\\circ", "°") if re.search(r"-|\\pi|circ", a) and "matrix" not in a else None,
    "sum turned round": lambda a: re.sub(r"^(\d+) ?\+ ?([^+-]+)$", r"\2 + \1", a),
    "1/sqrt": lambda a: re.sub(r"^\\frac\{\\sqrt\{(\d+)\}\}\{\1\}$", r"\\frac{1}{\\sqrt{\1}}", a),
}


def changed_digit(a, rng, gold):
    spots = [m.start() for m in re.finditer(r"\d", a)]
    if not spots:
        return None
    i = rng.choice(spots)
    return a[:i] + rng.choice([d for d in "123456789" if d != a[i]]) + a[i + 1:]


def element(a, rng, gold):
    if not re.match(r"(\\left)?[(\[]", a) and not re.search(r"\d, ?-?\d{1,2}\b", a) and "&" not in a:
        return None
    return changed_digit(a, rng, gold)


WRONG = {  # another value (a few may happen to agree: the disagreements are read by eye)
    "another's answer": lambda a, rng, gold: rng.choice(gold),
    "another's, same shape": lambda a, rng, gold: rng.choice([b for b in gold if re.sub(r"\d+", "0", b) == re.sub(r"\d+", "0", a)]),
    "a digit changed": changed_digit,
    "sign flipped": lambda a, rng, gold: None if a in ("0",) or re.match(r"\\text|[a-z]|\\begin|.*\\pm", a) else a[1:] if a[0] == "-" else "-" + a,
    "fraction upside down": lambda a, rng, gold: re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\\frac{\2}{\1}", a),
    "an element changed": element,
    "tuple turned round": lambda a, rng, gold: re.sub(r"^(\(|\[)(.*),(.*)(\)|\])$", r"\1\3,\2\4", a) if a.count(",") == 1 and "frac" not in a else None,
    "bracket changed": lambda a, rng, gold: re.sub(r"[)]$", "]", a) if re.match(r"[(\[].*,.*\)$", a) else re.sub(r"\]$", ")", a),
    "point moved": lambda a, rng, gold: a + "0" if integer(a) and a != "0" else None,
    "comma lost": lambda a, rng, gold: re.sub(r"(\d), ?(\d)", r"\1\2", a) if re.search(r"\d, ?\d{1,2}\b(?!\d)", a) else None,
    "base changed": lambda a, rng, gold: re.sub(r"_\{?(\d)\}?$", lambda m: f"_{int(m[1]) % 9 + 1}", a),
    "base dropped": lambda a, rng, gold: re.sub(r"_\{?\d\}?$", "", a),
    "a term dropped": lambda a, rng, gold: re.sub(r" ?[-+] ?[^-+]+$", "", a) if re.search(r".[-+]", a) and "," not in a and "frac" not in a else None,
    "i, x dropped": lambda a, rng, gold: re.sub(r"(?<=\d)[a-z]\b", "", a),
    "root dropped": lambda a, rng, gold: re.sub(r"\\sqrt\{?(\d+)\}?", r"\1", a),
    "a root left out": lambda a, rng, gold: a.split(",")[0] if re.fullmatch(r"[-\d]+(, ?[-\d]{1,2})+", a) else None,
}


def measure(gold):
    """Every pair judged by both: a list of (kind, gold, answer, ours, theirs), the answers that changed nothing left out."""
    from math_verify import parse, verify
    logging.disable(logging.CRITICAL)
    rng, parsed, rows = random.Random(0), {}, []
    pairs = [(kind, a, f(a)) for kind, f in RIGHT.items() for a in gold] + [(kind, a, f(a, rng, gold)) for kind, f in WRONG.items() for a in gold]
    for kind, a, b in pairs:
        if b is None or (a == b and kind != "itself"):
            continue
        for text in (a, b):
            if text not in parsed:
                parsed[text] = parse("\\boxed{" + text + "}")
        rows.append((kind, a, b, same(b, a), verify(parsed[a], parsed[b])))
    return rows


def main(path):
    rows = measure([str(json.loads(line)["answer"]) for line in Path(path).read_text(encoding="utf-8").splitlines()])

    def tell(name, some):
        n = len(some) / 100
        print(f"{name:24} {len(some):5} pairs  agree {sum(x == y for *_, x, y in some) / n:6.2f}%  "
              f"same {sum(x for *_, x, _ in some) / n:6.2f}%  math-verify {sum(y for *_, y in some) / n:6.2f}%")
        return sum(x == y for *_, x, y in some) / len(some)

    for kind in (*RIGHT, *WRONG):
        if some := [row for row in rows if row[0] == kind]:
            tell(kind, some)
    for title, x, y in (("same says yes, math-verify no", True, False), ("math-verify says yes, same no", False, True)):
        print(f"\n{title}")
        for kind, a, b, *verdicts in rows:
            if verdicts == [x, y] and kind != "trailing dot":
                print(f"  {kind:24} {a!r:45} {b!r}")
    print()
    right, wrong = ([row for row in rows if row[0] in kinds] for kinds in (RIGHT, WRONG))
    figures = {"right": tell("all respelt", right), "wrong": tell("all spoilt", wrong), "all": tell("all", rows),
               # math-verify cannot read \\boxed{5.}: 451 pairs that say nothing about us
               "all but trailing dots": tell("all but trailing dots", [row for row in rows if row[0] != "trailing dot"])}
    print(json.dumps({"pairs": len(rows)} | figures))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
