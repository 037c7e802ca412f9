"""\\boxed{} answers, MATH's kind: finding them in a text, and comparing two of them.

Answers are LaTeX, and one value has many spellings. `normalise` makes them one by a table of replacements and exact fractions;
`same` compares. Nothing is evaluated, so no answer can hang or crash it, and what takes algebra counts as different. How often
that agrees with math-verify is measured by bench/boxed_agreement.py; the README has the figures.
"""
import re
from fractions import Fraction

# Answers of MATH's kind are LaTeX. Each row makes two spellings of one value one, and the order of the rows matters.
# Units go too (MATH's own answers have them or not at random): all but words that change the value, as in 3 million or 4 p.m.
TEXT = r"\\(?:text\w*|mbox|mathrm)\s*\{"
UNIT = TEXT + r"(?![^{}]*\b(?:[ap]m|hundred|thousand|million|billion|dozen|base|mod|if|and|or)\b)(?:[^{}]*[a-z][a-z][^{}]*|\s*m\s*)\}"
UNIT += r"|(?<![a-zA-Z])(?:degrees?|dollars|cents|units|inches|feet|cm)"
UNICODE = str.maketrans({"\u2212": "-", "π": "\\pi ", "°": "^\\circ ", "∞": "\\infty ", "∪": "\\cup ", "±": "\\pm "})
SPELLINGS = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"(?<=\d)(?:,\\!|\{,\})\s*(?=\d{3})", ""),  # 10,\!080 and 10{,}080
    (r"\\!|\\?\$|\\?%|\^\{?\\circ(?![a-z])\}?|\\(?:left|right|displaystyle)(?![a-zA-Z])", ""),  # \$5, 5\%, 5^\circ
    (r"(?:(?<!\\)\\[,;: ]|\\q?quad(?![a-z])|~|\s)+", " "),  # any space; the (?<!\\) spares \\, the row end of a matrix
    (r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?!\d|,\d)(?![^(\[]*(?:[)\]]|\\\}))", lambda m: m[0].replace(",", "")),  # 1,000 but not (1,000)
    (rf"(?<=[\d)}}i])(?: ?/? ?(?:{UNIT})(?:\^\{{?\d\}}?)?)+[ .]*$", ""),  # units at the end: 5\text{ cm}^2, 5\text{ dogs}
    (r"(?:" + TEXT + r"|\\mathbf\{)([^{}]*)\}", r"\1"),  # \text{even}, \textbf{(C)}
    (r" ?,? ?\b(?:and|or)\b ?", ","),  # 2, 3, \text{ and } 4
    (r"√ ?(\d+)", r"\\sqrt{\1}"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"(\d) (\d+)/(\d+)", r"\1\\frac{\2}{\3}"),  # the mixed number 1 1/2, which without its space would be 11/2
    (r" ", ""),
    (r"[.,;]+$", ""),  # a full stop
    (r"^\\\{(.*)\\\}$", r"\1"),  # a set is a list
    (r"\\(frac|sqrt)(\w|\\pi)", r"\\\1{\2}"),  # \frac12, \sqrt3
    (r"(\\frac\{(?:[^{}]|\{[^{}]*\})*\})(\w|\\pi)", r"\1{\2}"),  # \frac{1}2
    (r"(?<![\w.}^/)])(\d*(?:\\pi|\\sqrt\{\d+\})|\d+)/(\d+|\\sqrt\{\d+\})(?![\w{}^.(/]|\\(?!\\|end))", r"\\frac{\1}{\2}"),  # \pi/2, not 1/2x
    (r"(^|[=,(\[&])\\frac\{-([^{}+-]*)\}", r"\1-\\frac{\2}"),  # \frac{-\pi}{6}
    (r"([_^])\{(\d+|\w)\}", r"\1\2"),  # x^{2}, 204_{5}
    (r"\\(?:cdot|times)(?=\\sqrt|\\pi|[a-z])", ""),  # 2\cdot\sqrt{3}; 2\cdot\frac{1}{2} must not become a mixed number
    (r"\{[bB]matrix\}", "{pmatrix}"),
    (r"^\(([A-Z])\)$", r"\1"),  # a choice, (C)
    (r"^[A-Za-z]{3,}$", lambda m: m[0].lower()),  # a word, Even
)]
NAME = re.compile(r"(^|,)((?:[a-z]|[A-Z]{1,3}|\\[a-z]+)(?:\([a-z]\))?(?:=|\\in(?![a-z])))")  # x=5, f(x)=5, x\in[0,1]
PARTS = re.compile(r"([,=()\[\]&]|\\\\|\\cup|\\(?:begin|end)\{pmatrix\})")  # what stands between the numbers of tuples, intervals, matrices
NUMBER = r"-?(?:\d+(?:\.\d*)?|\.\d+)"


def boxed(text):
    """What the last complete \\boxed{...} or \\fbox{...} of a text holds (also \\boxed 5), or None. One pass, however deep the nesting."""
    last, opened = (-1, None), []
    for found in re.finditer(r"\\f?box(?:ed)?(?:\s*(\{)|\s+(-?\d[^\s{}\\$]*))|\\.|[{}]", text, re.DOTALL):  # \\. so that \{ is no brace
        if found[2]:
            last = found.start(), found[2]
        elif found[0] == "}":
            start, is_box = opened.pop() if opened else (0, False)
            if is_box:
                last = max(last, (start, text[start:found.start()]))  # the one that opened last: in \boxed{\boxed{5}}, 5
        elif found[1] or found[0] == "{":
            opened.append((found.end(), bool(found[1])))
    return last[1]


def exact(text):
    """A plain number, fraction or mixed number -> its exact value, as "-7" or "3/2"; any other text as it is."""
    if re.fullmatch(NUMBER, text):
        return str(Fraction(text))
    found = re.fullmatch(rf"(-?)(\d*)\\frac\{{({NUMBER})\}}\{{({NUMBER})\}}", text)
    if not found or not Fraction(found[4]) or (found[2] and "-" in found[3] + found[4]):
        return text
    value = int(found[2] or 0) + Fraction(found[3]) / Fraction(found[4])
    return str(-value if found[1] else value)


def normalise(answer, names=True):
    """One spelling per value of a LaTeX answer; without order for a bare list. names=False: "x=5" is 5, "x=1,x=2" is 1,2."""
    if len(answer) > 500:
        return answer  # the longest of MATH's has 159; below 500 every number is short enough for int() and no pattern is slow
    text = answer.translate(UNICODE)
    for pattern, replacement in SPELLINGS:
        text = pattern.sub(replacement, text)
    if not names and len({name for _, name in NAME.findall(text)}) == 1:  # not "x=1,y=2"
        text = NAME.sub(r"\1", text)
    items = []
    for item in re.split(r",(?![^(\[]*[)\]])", text):  # at the commas outside brackets
        for one in (item.replace("\\pm", "+"), item.replace("\\pm", "-")) if item.count("\\pm") == 1 else (item,):
            one = re.sub(r"(^|[=,(\[])\+", r"\1", one)  # +\infty
            items.append("".join(map(exact, PARTS.split(one))))
    return ",".join(sorted(items))


def same(a, b):
    """Do two LaTeX answers agree? By spelling and exact fractions alone: nothing is evaluated, so no answer can hang or crash it.

    What takes algebra counts as different (1/sqrt 3 = sqrt 3 / 3, 2i + 1 = 1 + 2i), and so does a missing or another base (2516_8).
    """
    x, y = normalise(a), normalise(b)
    return x != "" and (x == y or normalise(a, names=False) == y or x == normalise(b, names=False))
