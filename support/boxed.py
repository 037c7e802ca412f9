r"""Answers in \boxed{}, as in the MATH data sets: finding one in a text, and comparing two.

Answers are LaTeX, and one value can be written in many ways. `normalise` rewrites an answer with
a table of replacements, exact fractions and sums in one order, and `same` compares the results.
Nothing is evaluated, and that is meant: for "Factor x^2-1" algebra would pay x^2-1, which stands in
the question, and a policy learns to copy it. bench/boxed_agreement.py measures the agreement with
math-verify, which does evaluate.

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
        r"|(?<![a-zA-Z])(?:degrees?|dollars|cents|units|inches|feet|cm|percent(?:age)?|pct)")
# A slash with or without spaces around it, or one space; then the unit and its power.
UNITS = r"(?<=[\d)}i])(?:(?: ?/ ?| )?(?:" + UNIT + r")(?:\^\{?\d\}?)?)+[ .]*$"

UNICODE = str.maketrans({
    "\u2212": "-", "π": "\\pi ", "°": "^\\circ ",
    "∞": "\\infty ", "∪": "\\cup ", "±": "\\pm ",
    "≈": "\\approx "})


def without_commas(found):
    return found[0].replace(",", "")


def in_small_letters(found):
    return found[0].lower()


# Pattern and replacement. The order matters: each row works on the result of the rows before it.
SPELLINGS = [(re.compile(pattern), replacement) for pattern, replacement in (
    # thousands: 10,\!080 and 10{,}080
    (r"(?<=\d)(?:,\\!|\{,\})\s*(?=\d{3})", ""),
    # \$5, 5\%, 5^\circ, \left( and the like
    (r"\\!|\\?[$€£]|\\?%|\^\{?\\circ(?![a-z])\}?|\\(?:left|right|displaystyle)(?![a-zA-Z])", ""),
    # any space is one space; (?<!\\) keeps \\, the row end of a matrix
    (r"(?:(?<!\\)\\[,;: ]|\\q?quad(?![a-z])|~|\s)+", " "),
    # 1,000 but not (1,000) and not 0,111
    (r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)(?![^(\[]*(?:[)\]]|\\\}))", without_commas),
    # units at the end: 5\text{ cm}^2, 5\text{ dogs}
    (UNITS, ""),
    # \text{even}, \textbf{(C)}
    (r"(?:" + TEXT + r"|\\mathbf\{)([^{}]*)\}", r"\1"),
    # (1;2) and 1;2
    (r";", ","),
    # relations of one character
    (r"\\lt(?![a-z])", "<"),
    (r"\\gt(?![a-z])", ">"),
    (r"\\le(?:q|qslant)?(?![a-z])|<=", "≤"),
    (r"\\ge(?:q|qslant)?(?![a-z])|>=", "≥"),
    (r"\\neq?(?![a-z])|!=", "≠"),
    # 2, 3, \text{ and } 4, which is "2, 3,  and  4" by now
    (r"(?: ?,)? *\b(?:and|or)\b ?", ","),
    (r"√ ?(\d+)", r"\\sqrt{\1}"),
    (r"\\[dtc]frac", r"\\frac"),
    # the mixed number 1 1/2, which without its space would be 11/2
    (r"(\d) (\d+)/(\d+)", r"\1\\frac{\2}{\3}"),
    (r" ", ""),
    # punctuation at the end
    (r"[.,;]+$", ""),
    # a set is a list, and so is a group
    (r"^\\\{(.*)\\\}$", r"\1"),
    (r"^\{([^{}]*)\}$", r"\1"),
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
    (r"\{[bB]matrix\}|\{array\}(?:\{[^{}]*\})?", "{pmatrix}"),
    (r"^[(\[](\\begin\{pmatrix\}.*\\end\{pmatrix\})[)\]]$", r"\1"),
    # a choice: (C); one value in brackets: (\frac{1}{3})
    (r"^\(([^(),]*)\)$", r"\1"),
    # a word: Even
    (r"^[A-Za-z]{3,}$", in_small_letters),
)]
COMMA_OUTSIDE_BRACKETS = re.compile(r",(?![^(\[]*[)\]])")
# What names a value: x, x_1, f(x), AB; |AB|, A:B; (p,q); \frac{AB}{CD}. Not 2x, x+y or xy.
LETTERS = r"(?:[a-z]|[A-Z]{1,3}|\\[a-z]+)(?:_(?:\w|\{\w+\}))?(?:\([a-z]\))?"
NAME = (rf"(?:\|?{LETTERS}\|?(?::{LETTERS})?|\({LETTERS}(?:,{LETTERS})*\)|"
        rf"\\frac\{{{LETTERS}\}}\{{{LETTERS}\}})")
NAMED = re.compile(rf"^({NAME})(?:=|\\in(?![a-z]))")
# The same kind of table, for each item of a list.
ITEM_SPELLINGS = [(re.compile(pattern), replacement) for pattern, replacement in (
    # \approx11 and x\approx11
    (r"^\\approx", ""),
    (rf"^({NAME})\\approx", r"\1="),
    # x=5+6=11 is x=11
    (rf"^({NAME}=).*=", r"\1"),
    # +\infty
    (r"(^|[=,(\[])\+", r"\1"),
)]
# 1/3\approx0.33 is 1/3
ABOUT = re.compile(r"\\approx.*")
RELATION = re.compile("([<>≤≥])")
TURNED = {">": "<", "≥": "≤"}

NUMBER = r"-?(?:\d+(?:\.\d*)?|\.\d+)"
# sign, whole part of a mixed number, numerator, denominator
FRACTION = re.compile(rf"(-?)(\d*)\\frac\{{({NUMBER})\}}\{{({NUMBER})\}}")
# 1,22 for 1.22; three digits are thousands
DECIMAL_COMMA = re.compile(r"[ $]*(-?\d+),(\d\d|\d{4,})[ $]*")
# What a term of a sum consists of, and what ends a sum. Anything else: the order is left alone.
TOKEN = re.compile(
    r"(?P<end>[,=<>≤≥≠&:]|\\\\|\\cup|\\approx|\\in(?![a-z])|\\(?:begin|end)\{\w*\})|"
    r"(?P<opening>[(\[{])|(?P<closing>[)\]}])|(?P<sign>[+-])|"
    r"(?P<term>[\w.!*/^]|\\(?:frac|sqrt|pi|sin|cos|tan|log|ln|cdot|times))|"
    r"(?P<other>\\[a-zA-Z]+|.)", re.DOTALL)
# After these a sign is no sum's: 2^-1
BINDING = ("^", "_", "/", "*", "\\cdot", "\\times")

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


class Bracket:
    """What stands in a bracket so far: text that is done, and the terms of the sum after it."""

    def __init__(self, opening):
        self.opening = opening
        self.done = ""
        self.begin()

    def begin(self):
        """Begin a sum."""
        self.terms = [""]
        self.fixed = False

    def text(self):
        """All of it. Numbers become exact, but for those in braces, which are parts of numbers."""
        terms = self.terms
        if self.fixed or "+" in terms or "-" in terms:
            return self.done + "".join(terms)
        terms = [term.removeprefix("+") for term in terms]
        if self.opening != "{":
            terms = map(exact, terms)
        signed = sorted(term if term.startswith("-") else "+" + term for term in terms)
        return self.done + "".join(signed).removeprefix("+")


def sums_in_order(text):
    """The text with exact numbers and with the terms of every sum sorted: 2i+1 becomes 1+2i."""
    inner = Bracket("")
    outer = []
    for found in TOKEN.finditer(text):
        token = found[0]
        kind = found.lastgroup
        if kind == "opening":
            outer.append(inner)
            inner = Bracket(token)
        elif kind == "closing" and outer:
            content = inner.opening + inner.text() + token
            inner = outer.pop()
            inner.terms[-1] += content
        elif kind in ("end", "closing"):
            inner.done = inner.text() + token
            inner.begin()
        elif kind == "sign" and inner.terms[-1] and not inner.terms[-1].endswith(BINDING):
            inner.terms.append(token)
        else:
            inner.terms[-1] += token
            inner.fixed = inner.fixed or kind == "other"
    return text if outer else inner.text()


def ascending(item):
    """3>x as x<3, and -x<-3 as 3<x."""
    parts = RELATION.split(item)
    if len(parts) > 1 and set(parts[1::2]) <= set(TURNED):
        parts = [TURNED.get(part, part) for part in reversed(parts)]
    if len(parts) > 1 and all(re.fullmatch("-[^+-]+", side) for side in parts[::2]):
        parts = [part.removeprefix("-") for part in reversed(parts)]
    return "".join(parts)


def items(answer):
    """The items of a LaTeX answer, which is often a list of one, each in one spelling."""
    if len(answer) > LONGEST:
        return [answer]
    text = answer.translate(UNICODE)
    for pattern, replacement in SPELLINGS:
        text = pattern.sub(replacement, text)
    found = []
    for item in COMMA_OUTSIDE_BRACKETS.split(text):
        values = [item]
        if item.count("\\pm") == 1:
            values = [item.replace("\\pm", "+"), item.replace("\\pm", "-")]
        for value in values:
            for pattern, replacement in ITEM_SPELLINGS:
                value = pattern.sub(replacement, value)
            value = sums_in_order(ascending(value))
            # Roots may be double, and count then; a point is in a set of points or not.
            if not (value.startswith("(") and value in found):
                found.append(value)
    return found


def normalise(answer):
    """One spelling for each value of a LaTeX answer. The items of a list are sorted."""
    return ",".join(sorted(items(answer)))


def unnamed(item):
    """The value without its name and its rounding: 5 for x=5, (1,2] for 1<x<=2."""
    parts = RELATION.split(ABOUT.sub("", NAMED.sub("", item)))
    if len(parts) == 3 and re.fullmatch(NAME, parts[0]):
        parts = ["-\\infty", "<", *parts]
    elif len(parts) == 3 and re.fullmatch(NAME, parts[2]):
        parts = [*parts, "<", "\\infty"]
    if len(parts) != 5 or not re.fullmatch(NAME, parts[2]) or set(parts) & set(TURNED):
        return "".join(parts)
    low, left, _, right, high = parts
    return ("(" if left == "<" else "[") + f"{low},{high}" + (")" if right == "<" else "]")


def same_unnamed(named, values):
    """True if these items are those values once their names are gone."""
    names = {found[1] for found in map(NAMED.match, named) if found}
    bare = [unnamed(item) for item in named]
    if len(names) > 1:  # x=1,y=2 is not 2,1
        return bare == values
    return sorted(bare) == sorted(values)


def same(answer, gold):
    """True if two LaTeX answers have one spelling after `normalise`, one of them without names.

    What needs algebra counts as different (1/sqrt 3 = sqrt 3 / 3, (x-1)(x+1) = x^2-1), and so
    does a missing or different base (2516_8).
    """
    given = items(answer)
    wanted = items(gold)
    if given == [""]:
        return False
    if sorted(given) == sorted(wanted):
        return True
    if same_unnamed(given, wanted) or same_unnamed(wanted, given):
        return True
    # The gold answer 2,16 is a list.
    decimal = DECIMAL_COMMA.fullmatch(answer)
    return bool(decimal) and items(f"{decimal[1]}.{decimal[2]}") == wanted
