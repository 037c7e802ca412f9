"""The table at the head of docs/results.md: the paper's claims beside what the toy gave.

Every number comes from results/figures/*.runs.json, and so does the verdict: a rule decides it, so
that a figure made anew with other seeds cannot stand beside an old verdict.
"""
import textwrap
from statistics import mean

from helpers import ROOT

from support.files import read_json
from support.scores import MODES
from tools import factor, needed
from tools.runs import markdown_table

HOLDS = "holds"
NOT = "does not hold"
UNCLEAR = "cannot be told"
OPEN = "not measured yet"
MOST = 0.9  # of a gain: what the paper's claims call recovering it


def document(figure):
    """A finished sweep's JSON, or None."""
    path = ROOT / "results" / "figures" / f"{figure}.runs.json"
    found = read_json(path) if path.is_file() else {}
    return found if found.get("settings") else None


def scores(document, name, mode, which="final", score="strict"):
    """The seeds' scores of a setting."""
    setting = next(s for s in document["settings"] if s["name"] == name)
    return [document["runs"][key][which][mode][score] for key in setting["runs"]]


def gains(document, name):
    """{mode: mean gain of a setting over the untrained model}."""
    return {mode: mean(scores(document, name, mode)) - mean(scores(document, name, mode, "base"))
            for mode in MODES}


def both(values, sign=""):
    """"0.93 greedy, 0.41 at T = 1" """
    return f"{values['greedy']:{sign}.2f} greedy, {values['T = 1']:{sign}.2f} at T = 1"


def where(holds):
    """The verdict of a rule that is applied to both modes. holds: {mode: True, False, or None for
    what cannot be told}."""
    said = {mode: {True: HOLDS, False: NOT, None: UNCLEAR}[x] for mode, x in holds.items()}
    if len(set(said.values())) == 1:
        return said["greedy"]
    if None not in holds.values():
        return "holds greedy, not sampled" if holds["greedy"] else "holds sampled, not greedy"
    return "; ".join(f"{mode}: {x}" for mode, x in said.items())


def better(document, pairs):
    """{mode: whether in each pair (one, other) of settings the first is better}.

    True: every seed of the one is above every seed of the other, in all pairs. False: the reverse
    in at least one pair. None, which cannot be told: all else.
    """
    found = {}
    for mode in MODES:
        ends = [(scores(document, one, mode), scores(document, other, mode))
                for one, other in pairs]
        if any(max(one) < min(other) for one, other in ends):
            found[mode] = False
        else:
            found[mode] = all(min(one) > max(other) for one, other in ends) or None
    return found


def listed(document, names):
    """"r = 1: 0.93 greedy, 0.41 at T = 1; r = 2: ..." """
    means = {name: {mode: mean(scores(document, name, mode)) for mode in MODES} for name in names}
    return "; ".join(f"{name}: {both(x)}" for name, x in means.items())


def enough():
    f1 = document("F1")
    full = gains(f1, "all weights")
    share = {mode: gain / full[mode] for mode, gain in gains(f1, "TinyLoRA, 13").items()}
    return (f"of the gain of all weights, 13 numbers have {both(share)}",
            where({mode: x >= MOST for mode, x in share.items()}))


def more():
    f1 = document("F1")
    sizes = (1, 4, 13, 28, 112)
    means = {mode: [mean(scores(f1, f"TinyLoRA, {n}", mode)) for n in sizes] for mode in MODES}
    columns = "; ".join(f"{mode}: {', '.join(f'{x:.2f}' for x in row)}"
                        for mode, row in means.items())
    return (f"{', '.join(map(str, sizes))} numbers: {columns}",
            where({mode: row == sorted(row) for mode, row in means.items()}))


def lora():
    f1 = document("F1")
    gained = {name: gains(f1, name) for name in ("LoRA, r = 1", "all weights")}
    near = {mode: gained["LoRA, r = 1"][mode] >= 0.95 * gained["all weights"][mode]
            for mode in MODES}
    return "; ".join(f"{name}: +{both(x)}" for name, x in gained.items()), where(near)


def not_format():
    f1 = document("F1")
    control = gains(f1, "control: 13, paid for format")
    paid = {mode: mean(scores(f1, "control: 13, paid for format", mode, score="format"))
            for mode in MODES}
    return (f"paid for format only, 13 numbers: format {both(paid)}; strict {both(control, '+')}",
            where({mode: x < 0.1 * gains(f1, "TinyLoRA, 13")[mode] for mode, x in control.items()}))


def sft():
    """By worked solutions; the median seed."""
    f1 = document("F1")
    [setting] = [s for s in f1["settings"] if s["name"] == "TinyLoRA, 13"]
    found = {mode: factor.factors(setting, f1, document("F2"), "worked", mode) for mode in MODES}
    median = {mode: x[(len(x) - 1) // 2][0] for mode, x in found.items()}
    factors = ", ".join(f"{mode} {factor.text(x)}" for mode, x in found.items())
    return (f"for the scores of 13 numbers, SFT on worked solutions needs more by a factor of "
            f"{factors}", where({mode: x >= 100 for mode, x in median.items()}))


def any_seed():
    sweep = document("HEADLINE")
    name = sweep["settings"][0]["name"]
    lowest = {mode: min(after - before for after, before in
                        zip(scores(sweep, name, mode), scores(sweep, name, mode, "base")))
              for mode in MODES}
    means = gains(sweep, name)
    count = len(scores(sweep, name, "greedy"))
    return (f"the weakest of {count} seeds gains {both(lowest)}, the mean {both(means)}",
            where({mode: lowest[mode] >= MOST * means[mode] for mode in MODES}))


def bytes_alike():
    """At 28 and 56 bytes: half as many numbers in fp32 against 16 bits."""
    f4 = document("F4")
    pairs = [(f"tiled, fp32, {n}", f"tiled, {dtype}, {2 * n}")
             for n in (7, 14) for dtype in ("bf16", "fp16")]
    return (listed(f4, dict.fromkeys(name for pair in pairs for name in pair)),
            where(better(f4, pairs)))


def tying():
    f4 = document("F4")
    kinds = ("fp32, 7", "fp32, 14", "bf16, 14", "fp16, 14")
    pairs = [(f"tiled, {kind}", f"structured, {kind}") for kind in kinds]
    return listed(f4, [name for pair in pairs for name in pair]), where(better(f4, pairs))


def rank_two():
    f7 = document("F7")
    names = [setting["name"] for setting in f7["settings"]]
    pairs = [("r = 2", name) for name in names if name != "r = 2"]
    return listed(f7, names), where(better(f7, pairs))


def u_before_ties():
    """At equal numbers, more groups with a lower u against fewer with a higher one."""
    f8 = document("F8")
    pairs = [(s["against"], s["name"]) for s in f8["settings"] if "against" in s]
    return listed(f8, [s["name"] for s in f8["settings"]]), where(better(f8, pairs))


def off_the_top():
    """arXiv 2511.08567; each of the other directions against the top ones."""
    sweep = document("DIRECTIONS")
    pairs = [(s["name"], s["against"]) for s in sweep["settings"] if "against" in s]
    return listed(sweep, [s["name"] for s in sweep["settings"]]), where(better(sweep, pairs))


def larger_fewer():
    """The largest toy against the smallest: for nine tenths of the gain every seed needs fewer."""
    f3 = document("F3")
    holds = {}
    ends = []
    for mode in MODES:
        sizes = needed.curves(f3, mode)
        found = {size: needed.needed(*curve, MOST) for size, curve in sizes.items()}
        ends.append(f"{mode}: " + ", ".join(f"{needed.text(found[size][0])} ({size})"
                                            for size in found))
        small, *_, large = [[numbers for _, numbers in seeds] for _, seeds in found.values()]
        holds[mode] = (max(large) < min(small)) or (False if min(large) > max(small) else None)
    return f"numbers for 0.9 of the gain: {'; '.join(ends)}", where(holds)


# (claim, the figure's file, how it is measured)
CLAIMS = [
    ("13 numbers have most of what RL on all weights gains", "F1", enough),
    ("more numbers, more gain", "F1", more),
    ("LoRA of rank 1 gains what all weights gain", "F1", lora),
    ("the gain is not answer format", "F1", not_format),
    ("which random directions were drawn does not matter", "HEADLINE", any_seed),
    ("SFT needs at least 100 times more numbers", "F2", sft),
    ("bit for bit, fp32 is best", "F4", bytes_alike),
    ("tiled beats structured", "F4", tying),
    ("a frozen rank of 2 is best", "F7", rank_two),
    ("lower u to 1 before raising n_tie", "F8", u_before_ties),
    ("RL is better off the top directions (arXiv 2511.08567)", "DIRECTIONS", off_the_top),
    ("larger models need fewer numbers", "F3", larger_fewer),
]


def judged():
    """[(claim, what was measured, verdict, figure)]"""
    rows = []
    for claim, figure, measure in CLAIMS:
        if document(figure) is None:
            rows.append((claim, "", OPEN, figure))
        else:
            rows.append((claim, *measure(), figure))
    return rows


def table():
    """For docs/results.md."""
    return markdown_table(("claim", "the toy, means of the seeds", "verdict", "figure"), judged())


def lines():
    """For the README: what is measured, a paragraph for each verdict."""
    claims = {}
    for claim, _, verdict, _ in judged():
        if verdict != OPEN:
            claims.setdefault(verdict, []).append(claim)
    return "\n".join(textwrap.fill(f"- **{verdict}**: {'; '.join(found)}.", 100,
                                   subsequent_indent="  ", break_on_hyphens=False)
                     for verdict, found in claims.items())
