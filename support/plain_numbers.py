"""The number after "####": where it ends, what makes another value of it, and its one spelling."""
import re

# [0-9] and not \d, which takes the digits of every script.
NUMBER = r"[-+]?[$€£]?[-+]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"

# Digits of every script, superscripts and subscripts, fractions like ½.
DIGIT = r"[\d¹²³¼-¾⁰-₉⅐-↉]"
# Anything on the line but words and the end of the sentence; a LaTeX command is no word.
GAP = r"(?:[^\w\n.]|\.(?=\S)|_|\\[a-zA-Z]+)*"
# What, after a number, makes another value of it. Units, words, full stops and markup do not.
CONTINUATIONS = (
    # 5/2, 5², 5½, 1,0000, 5'000, 5:30, 5, 6, 5 1/2, 5 - 6, 5^{2}, 5 \times 10, 5\frac{1}{2},
    # 5 (6)
    rf"{GAP}{DIGIT}",
    # 5 million, 5 \text{ million}, 5 or six, 5 and a half, 5 squared, 5\pi
    rf"{GAP}(?i:hundred|thousand|milliard|million|billion|trillion|dozen|lakh|crore|squared|cubed|"
    r"(?:bn|mn|mil|bil|or|half|and (?:a|one)|pi)\b|π|\\pi)",
    # 5k, 5 M, 5x
    r"[ \t]*[kKMBxX]\b",
    # 1e3, 5 to 6, 5 out of 6, 5 times 2, 5 hours 30, 5 dollars and 50; but 5 m^2, and 4 then 9
    rf"{GAP}(?!(?:[ckm]?m|ft|in)\^?[23²³]\b|then\b)(?:[^\W\d_]+[ \t]+(?:and|of|by)\b|[^\W\d_]+)"
    rf"{GAP}{DIGIT}",
)
# A number that ends where it seems to.
PLAIN_NUMBER = rf"{NUMBER}(?!{'|'.join(CONTINUATIONS)})"


def canonical(number):
    """One spelling per value: "$1,800.00" -> "1800", "-07.50" -> "-7.5", "-0" -> "0"."""
    sign = "-" if "-" in number else ""
    whole, _, fraction = re.sub(r"[^0-9.]", "", number).partition(".")
    text = (whole.lstrip("0") or "0") + ("." + fraction.rstrip("0")).rstrip(".")
    return text if text == "0" else sign + text
