r"""Answers in \boxed{}, as in the MATH data sets: finding one in a text, and comparing two.

Answers are LaTeX, and one value can be written in many ways. `normalise` rewrites an answer with
a table of replacements and exact fractions, `same` compares the results. Nothing is evaluated, so
what needs algebra counts as different. bench/boxed_agreement.py measures the agreement with
math-verify.

No answer may hang the program. A pattern takes exponential time if two of its parts can match the
same characters inside a repetition, so no such parts are allowed here.
"""
import re
from fractions import Fraction

LONGEST = 500  # characters; the longest answer in MATH has 159. int() refuses 4,300 digits

# \text{...} and its relatives, up to the opening brace.
TEXT = r"\\(?:text\w*|mbox|mathrm)\s*\{"
# MATH's answers have units or not, at random, so units are dropped. These words change the value.
MEANINGFUL = r"\b(?:[ap]m|hundred|thousand|million|billion|dozen|base|mod|if|and|or)\b"
# A unit: \text{...} that holds two small letters in a row or the single letter m, or a bare word.
# The letters are found by looking ahead, so that [^{}]* is the only part that matches the content.
UNIT = (TEXT + r"(?![^{}]*" + MEANINGFUL + r")(?:(?=[^{}]*[a-z][a-z])[^{}]*|\s*m\s*)\}"
        r"|(?<![a-zA-Z])(?:degrees?|dollars|cents|units|inches|feet|cm)")
# A slash with or without spaces around it, or one space; then the unit and its power.
UNITS = r"(?<=[\d)}i])(?:(?: ?/ ?| )?(?:" + UNIT + r")(?:\^\{?\d\}?)?)+[ .]*$"

UNICODE = str.maketrans({
    "\u2212": "-", "π": "\\pi ", "°": "^\\circ ", "∞": "\\infty ", "∪": "\\cup ", "±": "\\pm "})


def without_commas(found):
    return found[0].replace(",", "")


def in_small_letters(found):
    return found[0].lower()


# Pattern and replacement. The order matters: each row works on the result of the rows before it.
SPELLINGS = [(re.compile(pattern), replacement) for pattern, replacement in (
    # thousands: 10,\!080 and 10{,}080
    (r"(?<=\d)(?:,\\!|\{,\})\s*(?=\d{3})", ""),
    # \$5, 5\%, 5^\circ, \left( and the like
    (r"\\!|\\?\$|\\?%|\^\{?\\circ(?![a-z])\}?|\\(?:left|right|displaystyle)(?![a-zA-Z])", ""),
    # any space is one space; (?<!\\) keeps \\, the row end of a matrix
    (r"(?:(?<!\\)\\[,;: ]|\\q?quad(?![a-z])|~|\s)+", " "),
    # 1,000 but not (1,000)
    (r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?!\d|,\d)(?![^(\[]*(?:[)\]]|\\\}))", without_commas),
    # units at the end: 5\text{ cm}^2, 5\text{ dogs}
    (UNITS, ""),
    # \text{even}, \textbf{(C)}
    (r"(?:" + TEXT + r"|\\mathbf\{)([^{}]*)\}", r"\1"),
    # 2, 3, \text{ and } 4, which is "2, 3,  and  4" by now
    (r"(?: ?,)? *\b(?:and|or)\b ?", ","),
    (r"√ ?(\d+)", r"\\sqrt{\1}"),
    (r"\\[dtc]frac", r"\\frac"),
    # the mixed number 1 1/2, which without its space would be 11/2
    (r"(\d) (\d+)/(\d+)", r"\1\\frac{\2}{\3}"),
    (r" ", ""),
    # punctuation at the end
    (r"[.,;]+$", ""),
    # a set is a list
    (r"^\\\{(.*)\\\}$", r"\1"),
    # \frac12, \sqrt3
    (r"\\(frac|sqrt)(\w|\\pi)", r"\\\1{\2}"),
    # \frac{1}2
    (r"(\\frac\{(?:[^{}]|\{[^{}]*\})*\})(\w|\\pi)", r"\1{\2}"),
    # 3/4 and \pi/2, not 1/2x
    (r"(?<![\w.}^/)])(\d*(?:\\pi|\\sqrt\{\d+\})|\d+)/(\d+|\\sqrt\{\d+\})"
     r"(?![\w{}^.(/]|\\(?!\\|end))", r"\\frac{\1}{\2}"),
    # \frac{-\pi}{6}
    (r"(^|[=,(\[&])\\frac\{-([^{}+-]*)\}", r"\1-\\frac{\2}"),
    # x^{2}, 204_{5}
    (r"([_^])\{(\d+|\w)\}", r"\1\2"),
    # 2\cdot\sqrt{3}; not 2\cdot\frac{1}{2}, which would become a mixed number
    (r"\\(?:cdot|times)(?=\\sqrt|\\pi|[a-z])", ""),
    (r"\{[bB]matrix\}", "{pmatrix}"),
    # a choice: (C)
    (r"^\(([A-Z])\)$", r"\1"),
    # a word: Even
    (r"^[A-Za-z]{3,}$", in_small_letters),
)]
# What names a value: x=5, f(x)=5, x\in[0,1]
NAME = re.compile(r"(^|,)((?:[a-z]|[A-Z]{1,3}|\\[a-z]+)(?:\([a-z]\))?(?:=|\\in(?![a-z])))")
# What stands between the numbers of tuples, intervals and matrices.
PARTS = re.compile(r"([,=()\[\]&]|\\\\|\\cup|\\(?:begin|end)\{pmatrix\})")
COMMA_OUTSIDE_BRACKETS = re.compile(r",(?![^(\[]*[)\]])")
NUMBER = r"-?(?:\d+(?:\.\d*)?|\.\d+)"
# sign, whole part of a mixed number, numerator, denominator
FRACTION = re.compile(rf"(-?)(\d*)\\frac\{{({NUMBER})\}}\{{({NUMBER})\}}")

ESCAPED = re.compile(r"\\[\\{}]")
# group 1: \boxed{, whose content ends at the matching brace; group 2: the content of "\boxed 5"
BOX = re.compile(r"\\f?box(?:ed)?(?:\s*(\{)|\s+(-?\d[^\s{}\\$]*))")


def boxed(text):
    r"""The content of the last complete \boxed{...} or \fbox{...} (also "\boxed 5"), or None.

    Each character is looked at once, however deep the braces are nested.
    """
    # \\ and \{ and \} are no braces and start no box. "$$" has their length and ends a number.
    masked = ESCAPED.sub("$$", text)
    end = len(masked)
    for box in reversed(list(BOX.finditer(masked))):
        if not box[1]:
            return box[2]
        depth = 1
        for i, character in enumerate(masked[box.end():end], box.end()):
            if character == "{":
                depth += 1
            elif character == "}":
                depth -= 1
                if depth == 0:
                    return text[box.end():i]
        # This box is never closed, so all that follows lies inside it: an earlier box is closed
        # before this one starts, or not at all.
        end = box.start()
    return None


def exact(text):
    """The exact value of a number, fraction or mixed number, as "-7" or "3/2"; else the text."""
    if re.fullmatch(NUMBER, text):
        return str(Fraction(text))
    found = FRACTION.fullmatch(text)
    if not found:
        return text
    sign, whole, numerator, denominator = found.groups()
    if Fraction(denominator) == 0 or (whole and "-" in numerator + denominator):
        return text
    value = int(whole or 0) + Fraction(numerator) / Fraction(denominator)
    return str(-value if sign else value)


def normalise(answer, names=True):
    """One spelling for each value of a LaTeX answer. The items of a list are sorted.

    names=False drops the name of a value: "x=5" becomes 5, and "x=1,x=2" becomes 1,2.
    """
    if len(answer) > LONGEST:
        return answer
    text = answer.translate(UNICODE)
    for pattern, replacement in SPELLINGS:
        text = pattern.sub(replacement, text)
    if not names and len({name for _, name in NAME.findall(text)}) == 1:  # not "x=1,y=2"
        text = NAME.sub(r"\1", text)
    items = []
    for item in COMMA_OUTSIDE_BRACKETS.split(text):
        values = [item]
        if item.count("\\pm") == 1:
            values = [item.replace("\\pm", "+"), item.replace("\\pm", "-")]
        for value in values:
            value = re.sub(r"(^|[=,(\[])\+", r"\1", value)  # +\infty
            items.append("".join(map(exact, PARTS.split(value))))
    return ",".join(sorted(items))


def same(a, b):
    """True if two LaTeX answers have one spelling after `normalise`, with or without a name.

    What needs algebra counts as different (1/sqrt 3 = sqrt 3 / 3, 2i + 1 = 1 + 2i), and so does a
    missing or different base (2516_8).
    """
    x = normalise(a)
    y = normalise(b)
    if x == "":
        return False
    return x == y or normalise(a, names=False) == y or x == normalise(b, names=False)
