r"""Gold answers of MATH respelt (RIGHT: the same value) and spoilt (WRONG: another value).

Each function returns the changed answer; None, or the answer as it was, where its kind does not
apply. bench/boxed_agreement.py lets two judges compare them with the gold answers.
"""
import re

FRACTION = r"\\frac\{(\d+)\}\{(\d+)\}"


def integer(a):
    return re.fullmatch(r"-?\d+", a)


def has(a, *parts):
    return any(part in a for part in parts)


def replaced(pattern, replacement, unless=None):
    """A function that rewrites all that the pattern matches, but in answers with `unless`."""
    def respell(a):
        if unless and re.search(unless, a):
            return None
        return re.sub(pattern, replacement, a)
    return respell


def spaces_added(a):
    if has(a, "\\text", "mbox", "begin", "\\!") or re.search(r"\d,\d{3}", a):
        return None
    return re.sub(r"([-+=,(){}])", r" \1 ", a).replace("\\ ", "\\")


def left_right_added(a):
    if has(a, "left", "text"):
        return None
    closed = re.sub(r"[)\]]", r"\\right\g<0>", a)
    return re.sub(r"[(\[]", r"\\left\g<0>", closed)


def units_added(a):
    return a + " \\text{ square units}" if integer(a) or re.fullmatch(FRACTION, a) else None


def dollar_sign(a):
    return "\\$" + a if integer(a) else a.replace("\\$", "")


def mixed_number(a):
    def mixed(found):
        top = int(found[1])
        bottom = int(found[2])
        if top <= bottom:
            return found[0]
        return f"{top // bottom}\\frac{{{top % bottom}}}{{{bottom}}}"
    return re.sub("^" + FRACTION + "$", mixed, a)


def decimal(a):
    return re.sub(r"^\\frac\{(\d+)\}\{(2|4|8|16|5|25|100)\}$",
                  lambda found: str(int(found[1]) / int(found[2])), a)


def thousands(separator, otherwise):
    """A function that writes 12345 as 12,345; other answers are respelt by `otherwise`."""
    def respell(a):
        if integer(a) and abs(int(a)) >= 1000:
            return f"{int(a):,}".replace(",", separator)
        return otherwise(a)
    return respell


def named(a):
    if has(a, "=", "text", "\\in ") or re.search("[a-z]", re.sub(r"\\[a-z]+", "", a)):
        return None
    return "x = " + a


def base_braces(a):
    if re.search(r"_\d$", a):
        return re.sub(r"_(\d)$", r"_{\1}", a)
    return re.sub(r"_\{(\d)\}", r"_\1", a)


def list_reversed(a):
    return ", ".join(reversed(a.split(","))) if re.fullmatch(r"[-\d]+(, ?[-\d]{1,2})+", a) else None


def plus_minus(a):
    if "\\pm" not in a or "\\{" in a:
        return None
    return re.sub(r"(.*?) ?\\pm ?(.*)", r"\1 + \2, \1 - \2", a)


def in_unicode(a):
    if not re.search(r"-|\\pi|circ", a) or "matrix" in a:
        return None
    return a.replace("-", "\u2212").replace("\\pi", "π").replace("^\\circ", "°")


RIGHT = {
    "itself": lambda a: a,
    "\\dfrac": lambda a: a.replace("\\frac", "\\dfrac"),
    "\\tfrac to \\frac": replaced(r"\\[dt]frac", r"\\frac"),
    "spaces added": spaces_added,
    "spaces dropped": replaced(r"\s+(?![a-zA-Z])", "", r"\\text|mbox"),
    "thin spaces": replaced(r"(?<=[\d}]) ?(?=[-+])", r"\\, "),
    "\\left \\right added": left_right_added,
    "\\left \\right dropped": replaced(r"\\(left|right)(?![a-z])", ""),
    "$...$": lambda a: "$" + a + "$",
    "trailing dot": lambda a: a + ".",
    "units dropped": replaced(r"\s*\\(text|mbox)\{[^}]*\}(\^2)?$", "", r"^\\text"),
    "units added": units_added,
    "dollar sign": dollar_sign,
    ".0 appended": lambda a: a + ".0" if integer(a) else None,
    "18.5 -> 18.50": lambda a: a + "0" if re.fullmatch(r"-?\d*\.\d+", a) else None,
    "a/b": replaced(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2",
                    r"\d\s*\\[dt]?frac|frac\{\d+\}\{\d+\}\s*[\\a-z]"),
    "\\frac12": replaced(r"\\frac\{(\d)\}\{(\d)\}", r"\\frac\1\2"),
    "\\frac{-1}{2}": replaced(r"^-\\frac\{(\d+|\\pi)\}", r"\\frac{-\1}"),
    "mixed number": mixed_number,
    "decimal": decimal,
    "thousands ,": thousands(",", lambda a: a.replace(",\\!", ",")),
    "thousands ,\\!": thousands(",\\!", replaced(r"^(\\\$)?(\d+),(\d{3})$", r"\1\2,\\!\3")),
    "degrees dropped": lambda a: a.replace("^\\circ", ""),
    "^{\\circ}": lambda a: a.replace("^\\circ", "^{\\circ}"),
    "degrees in words": lambda a: a.replace("^\\circ", "\\text{ degrees}"),
    "x=": named,
    "x= dropped": replaced(r"^[a-z] ?= ?", ""),
    "\\sqrt3": replaced(r"\\sqrt\{(\d)\}", r"\\sqrt\1"),
    "\\cdot\\sqrt": replaced(r"(\d)\s*(\\sqrt|\\pi)", r"\1 \\cdot \2"),
    "x^{2}": replaced(r"\^(\d)", r"^{\1}"),
    "base braces": base_braces,
    "list reversed": list_reversed,
    "\\pm written out": plus_minus,
    "choice, word bare": replaced(r"^\\text\{\(?(\w+)\)?\}$", r"\1"),
    "bmatrix": lambda a: a.replace("pmatrix", "bmatrix"),
    "matrix a/b": replaced(r"(\d+)/(\d+)", r"\\frac{\1}{\2}", r"^(?!.*matrix)"),
    "+\\infty": replaced(r"(?<=[,(] )\\infty|(?<=[,(])\\infty", r"+\\infty"),
    "unicode": in_unicode,
    "sum reversed": replaced(r"^(\d+) ?\+ ?([^+-]+)$", r"\2 + \1"),
    "1/sqrt": replaced(r"^\\frac\{\\sqrt\{(\d+)\}\}\{\1\}$", r"\\frac{1}{\\sqrt{\1}}"),
}


def another(a, rng, gold):
    return rng.choice(gold)


def another_of_its_shape(a, rng, gold):
    def shape(answer):
        return re.sub(r"\d+", "0", answer)
    return rng.choice([b for b in gold if shape(b) == shape(a)])


def changed_digit(a, rng, gold):
    digits = [found.start() for found in re.finditer(r"\d", a)]
    if not digits:
        return None
    i = rng.choice(digits)
    return a[:i] + rng.choice([d for d in "123456789" if d != a[i]]) + a[i + 1:]


def changed_element(a, rng, gold):
    is_list = re.match(r"(\\left)?[(\[]", a) or re.search(r"\d, ?-?\d{1,2}\b", a) or "&" in a
    return changed_digit(a, rng, gold) if is_list else None


def sign_flipped(a):
    if a == "0" or re.match(r"\\text|[a-z]|\\begin|.*\\pm", a):
        return None
    return a[1:] if a[0] == "-" else "-" + a


def tuple_reversed(a):
    if a.count(",") != 1 or "frac" in a:
        return None
    return re.sub(r"^(\(|\[)(.*),(.*)(\)|\])$", r"\1\3,\2\4", a)


def bracket_changed(a):
    return re.sub(r"[)]$", "]", a) if re.match(r"[(\[].*,.*\)$", a) else re.sub(r"\]$", ")", a)


def comma_lost(a):
    if not re.search(r"\d, ?\d{1,2}\b(?!\d)", a):
        return None
    return re.sub(r"(\d), ?(\d)", r"\1\2", a)


def base_changed(a):
    return re.sub(r"_\{?(\d)\}?$", lambda found: f"_{int(found[1]) % 9 + 1}", a)


def term_dropped(a):
    if not re.search(r".[-+]", a) or has(a, ",", "frac"):
        return None
    return re.sub(r" ?[-+] ?[^-+]+$", "", a)


def root_left_out(a):
    return a.split(",")[0] if re.fullmatch(r"[-\d]+(, ?[-\d]{1,2})+", a) else None


def alone(f):
    """A change that needs only the answer, in the form of those that choose at random."""
    return lambda a, rng, gold: f(a)


WRONG = {  # a few may happen to be equal after all: the disagreements are read by eye
    "another's answer": another,
    "another's, same shape": another_of_its_shape,
    "a digit changed": changed_digit,
    "sign flipped": alone(sign_flipped),
    "fraction upside down": alone(replaced(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\\frac{\2}{\1}")),
    "an element changed": changed_element,
    "tuple reversed": alone(tuple_reversed),
    "bracket changed": alone(bracket_changed),
    "point moved": alone(lambda a: a + "0" if integer(a) and a != "0" else None),
    "comma lost": alone(comma_lost),
    "base changed": alone(base_changed),
    "base dropped": alone(replaced(r"_\{?\d\}?$", "")),
    "a term dropped": alone(term_dropped),
    "i, x dropped": alone(replaced(r"(?<=\d)[a-z]\b", "")),
    "root dropped": alone(replaced(r"\\sqrt\{?(\d+)\}?", r"\1")),
    "a root left out": alone(root_left_out),
}
