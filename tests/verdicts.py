"""The table at the head of docs/results.md: the paper's claims beside what the toy gave.

Every number comes from results/figures/*.runs.json, and so does the verdict: a rule decides it, so
that a figure made anew with other seeds cannot stand beside an old verdict.
"""
from statistics import mean

from helpers import ROOT

from support.files import read_json
from support.scores import MODES
from tools import factor
from tools.runs import markdown_table

HOLDS = "holds"
NOT = "does not hold"
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
    """The verdict of a rule that is applied to both modes. holds: {mode: bool}."""
    if all(holds.values()) or not any(holds.values()):
        return HOLDS if all(holds.values()) else NOT
    return "holds greedy, not sampled" if holds["greedy"] else "holds sampled, not greedy"


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
    listed = "; ".join(f"{mode}: {', '.join(f'{x:.2f}' for x in row)}"
                       for mode, row in means.items())
    return (f"{', '.join(map(str, sizes))} numbers: {listed}",
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
    listed = ", ".join(f"{mode} {factor.text(x)}" for mode, x in found.items())
    return (f"for the scores of 13 numbers, SFT on worked solutions needs more by a factor of "
            f"{listed}", where({mode: x >= 100 for mode, x in median.items()}))


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


# (claim, the figure's file, how it is measured)
CLAIMS = [
    ("13 numbers have most of what RL on all weights gains", "F1", enough),
    ("more numbers, more gain", "F1", more),
    ("LoRA of rank 1 gains what all weights gain", "F1", lora),
    ("the gain is not answer format", "F1", not_format),
    ("which random directions were drawn does not matter", "HEADLINE", any_seed),
    ("SFT needs at least 100 times more numbers", "F2", sft),
    ("bit for bit, fp32 is best; tiled beats structured", "F4", None),
    ("a frozen rank of 2 is best", "F7", None),
    ("lower u to 1 before raising n_tie", "F8", None),
    ("larger models need fewer numbers", "F3", None),
]


def judged():
    """[(claim, what was measured, verdict, figure)]"""
    rows = []
    for claim, figure, measure in CLAIMS:
        if measure is None or document(figure) is None:
            rows.append((claim, "", OPEN, figure))
        else:
            rows.append((claim, *measure(), figure))
    return rows


def table():
    """For docs/results.md."""
    return markdown_table(("claim", "the toy, means of the seeds", "verdict", "figure"), judged())


def lines():
    """For the README: what is measured, a line each."""
    return "\n".join(f"- {claim}: **{verdict}**."
                     for claim, _, verdict, _ in judged() if verdict != OPEN)
