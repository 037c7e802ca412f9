"""The table at the head of docs/results.md: the paper's claims beside what the toy gave.

Every number comes from results/figures/*.runs.json, and so does the verdict: a rule decides it, so
that a figure made anew with other seeds cannot stand beside an old verdict.
"""
import math
import textwrap
from statistics import mean, stdev, variance

from helpers import ROOT

from support.errors import InputError
from support.files import LARGEST_DATA, read_json
from support.scores import MODES
from tools import factor, needed
from tools.runs import markdown_table

HOLDS = "holds"
NOT = "does not hold"
UNCLEAR = "cannot be told"
OPEN = "not measured yet"
AGAIN = "other-seeds"  # the folder of the figures that were made again
MOST = 0.9  # of a gain: what the paper's claims call recovering it


def read(figure, folder="."):
    """A finished sweep's JSON, or None."""
    path = ROOT / "results" / "figures" / folder / f"{figure}.runs.json"
    found = read_json(path, LARGEST_DATA) if path.is_file() else {}
    return found if found.get("settings") else None


def document(figure):
    """A finished sweep, with all its seeds if it was made again with others; or None."""
    first = read(figure)
    again = read(figure, AGAIN)
    return pooled(first, again) if first and again else first


def pooled(first, again):
    """Two sweeps of the same settings at the same rates, as one with the seeds of both.

    InputError if settings or rates are others, or a seed would count twice.
    """
    names, others = ([(s["name"], s["lr"]) for s in x["settings"]] for x in (first, again))
    if names != others or set(first["seeds"]) & set(again["seeds"]):
        raise InputError(f"a sweep in results/figures/{AGAIN} has other settings or rates than the "
                         f"first one, or a seed of its; make it anew")
    settings = [one | {"runs": one["runs"] + other["runs"]}
                for one, other in zip(first["settings"], again["settings"])]
    return first | {"settings": settings, "seeds": first["seeds"] + again["seeds"],
                    "runs": first["runs"] | again["runs"]}


def runs_of(document, name):
    setting = next(s for s in document["settings"] if s["name"] == name)
    return [document["runs"][key] for key in setting["runs"]]


def scores(document, name, mode, which="final", score="strict"):
    """The seeds' scores of a setting."""
    return [run[which][mode][score] for run in runs_of(document, name)]


def gains(document, name, score="strict"):
    """{mode: mean gain of a setting over the untrained model}."""
    return {mode: mean(scores(document, name, mode, score=score))
            - mean(scores(document, name, mode, "base", score)) for mode in MODES}


def both(values, sign="", digits=2):
    """"0.93 greedy, 0.41 at T = 1" """
    greedy, sampled = (f"{values[mode]:{sign}.{digits}f}" for mode in MODES)
    return f"{greedy} greedy, {sampled} at T = 1"


def where(holds):
    """The verdict of a rule that is applied to both modes. holds: {mode: True, False, or None for
    what cannot be told}."""
    said = {mode: {True: HOLDS, False: NOT, None: UNCLEAR}[x] for mode, x in holds.items()}
    if len(set(said.values())) == 1:
        return said["greedy"]
    if None not in holds.values():
        return "holds greedy, not sampled" if holds["greedy"] else "holds sampled, not greedy"
    return "; ".join(f"{mode}: {x}" for mode, x in said.items())


def told(document, weights, mode, constant=0.0):
    """Is the sum of weight x mean score, plus the constant, above 0? None: cannot be told.

    What is told is three standard errors from 0: those of means of seeds, with one variance for all
    settings, and that not below an evaluation's own.
    """
    total = constant
    variances = []
    for name, weight in weights.items():
        ends = scores(document, name, mode)
        total += weight * mean(ends)
        variances.append(max(variance(ends), evaluation_variance(document, name, mode)))
    error = math.sqrt(mean(variances) * sum(w * w for w in weights.values()) / len(ends))
    return None if abs(total) <= 3 * error else total > 0


def evaluation_variance(document, name, mode):
    """p (1 - p) / n of a setting's mean score p."""
    share = mean(scores(document, name, mode))
    return share * (1 - share) / runs_of(document, name)[0]["count"]


def better(document, pairs):
    """{mode: is the first of each pair of settings better, on the mean of the pairs?}"""
    weights = {}
    for one, other in pairs:
        weights[one] = weights.get(one, 0) + 1 / len(pairs)
        weights[other] = weights.get(other, 0) - 1 / len(pairs)
    return {mode: told(document, weights, mode) for mode in MODES}


def share_of(document, name, whole, least):
    """{mode: has a setting at least so much of another's gain over the untrained model?}"""
    base = {mode: mean(scores(document, whole, mode, "base")) for mode in MODES}
    return {mode: told(document, {name: 1, whole: -least}, mode, -(1 - least) * base[mode])
            for mode in MODES}


def listed(document, names):
    """"r = 1: 0.93 greedy, 0.41 at T = 1; r = 2: ..." """
    means = {name: {mode: mean(scores(document, name, mode)) for mode in MODES} for name in names}
    return "; ".join(f"{name}: {both(x)}" for name, x in means.items())


# ---- the rules

def enough():
    f1 = document("F1")
    full = gains(f1, "all weights")
    share = {mode: gain / full[mode] for mode, gain in gains(f1, "TinyLoRA, 13").items()}
    return (f"of the gain of all weights, 13 numbers have {both(share)}",
            where(share_of(f1, "TinyLoRA, 13", "all weights", MOST)))


def more():
    """The most numbers are better than the fewest, and no step between neighbours is for worse."""
    f1 = document("F1")
    names = [s["name"] for s in f1["settings"] if s["name"].startswith("TinyLoRA, ")]
    names.sort(key=lambda name: int(name.split()[1]))
    holds = {}
    for mode in MODES:
        steps = [told(f1, {after: 1, before: -1}, mode) for before, after in zip(names, names[1:])]
        holds[mode] = False if False in steps else told(f1, {names[-1]: 1, names[0]: -1}, mode)
    columns = "; ".join(
        f"{mode}: {', '.join(f'{mean(scores(f1, name, mode)):.2f}' for name in names)}"
        for mode in MODES)
    return f"{', '.join(name.split()[1] for name in names)} numbers: {columns}", where(holds)


def lora():
    f1 = document("F1")
    gained = {name: gains(f1, name) for name in ("LoRA, r = 1", "all weights")}
    return ("; ".join(f"{name}: {both(x, '+')}" for name, x in gained.items()),
            where(share_of(f1, "LoRA, r = 1", "all weights", MOST)))


def not_format():
    """The lenient score, which format does not move, gains as the strict one. Paired: the same
    responses."""
    f1 = document("F1")
    strict = gains(f1, "TinyLoRA, 13")
    lenient = gains(f1, "TinyLoRA, 13", "lenient")
    control = gains(f1, "control: 13, paid for format")
    return (f"13 numbers: strict {both(strict, '+')}, lenient {both(lenient, '+')}; paid for "
            f"format only: strict {both(control, '+')}",
            where({mode: lenient[mode] >= MOST * strict[mode] for mode in MODES}))


def any_seed():
    """The seeds' spread against that of evaluations alone, which 500 problems give; at both ranks.
    """
    said = []
    alike = dict.fromkeys(MODES, True)
    for figure in ("HEADLINE", "RANK2"):
        sweep = document(figure)
        [setting] = sweep["settings"]
        name = setting["name"]
        spread = {mode: stdev(scores(sweep, name, mode)) for mode in MODES}
        noise = {mode: math.sqrt(evaluation_variance(sweep, name, mode)) for mode in MODES}
        said.append(f"{both(spread, digits=3)} (r = {setting['flags']['rank']}; of an evaluation "
                    f"alone {both(noise, digits=3)})")
        alike = {mode: alike[mode] and spread[mode] <= 2 * noise[mode] for mode in MODES}
    count = len(scores(sweep, name, "greedy"))
    return f"standard deviation of {count} seeds: {'; '.join(said)}", where(alike)


def sft(kind):
    """Every seed, by the measured numbers beside it: a line between two points decides nothing."""
    f1 = document("F1")
    f2 = document("F2")
    [setting] = [s for s in f1["settings"] if s["name"] == "TinyLoRA, 13"]
    said = []
    holds = dict.fromkeys(MODES)
    for mode in MODES:
        seeds = factor.between(setting, f1, f2, kind, mode)
        if all(low >= 100 for low, _ in seeds):
            holds[mode] = True
        elif all(high < 100 for _, high in seeds):
            holds[mode] = False
        low, high = min(low for low, _ in seeds), max(high for _, high in seeds)
        said.append(f"{mode} {factor.text(factor.factors(setting, f1, f2, kind, mode))}, measured "
                    f"between {low:.3g} and {high:.3g}")
    return f"for the scores of 13 numbers, more by a factor of {'; '.join(said)}", where(holds)


def bytes_alike():
    """At 28 and 56 bytes: half as many numbers in fp32 against bf16. (fp16 is bf16's like.)"""
    f4 = document("F4")
    pairs = [(f"tiled, fp32, {n}", f"tiled, bf16, {2 * n}") for n in (7, 14)]
    names = [f"tiled, {kind}" for kind in ("fp32, 7", "bf16, 14", "fp16, 14", "fp32, 14",
                                           "bf16, 28", "fp16, 28")]
    return listed(f4, names), where(better(f4, pairs))


def tying():
    f4 = document("F4")
    pairs = [(f"tiled, fp32, {n}", f"structured, fp32, {n}") for n in (7, 14)]
    return listed(f4, [name for pair in pairs for name in pair]), where(better(f4, pairs))


def rank_two(f7=None):
    """Against the best of the other ranks."""
    f7 = f7 or document("F7")
    names = [setting["name"] for setting in f7["settings"]]
    others = [name for name in names if name != "r = 2"]
    best = {mode: max(others, key=lambda name: mean(scores(f7, name, mode))) for mode in MODES}
    return (listed(f7, names),
            where({mode: told(f7, {"r = 2": 1, best[mode]: -1}, mode) for mode in MODES}))


def u_before_ties():
    """At equal numbers, more groups with a lower u against fewer with a higher one."""
    f8 = document("F8")
    pairs = [(s["against"], s["name"]) for s in f8["settings"] if "against" in s]
    return listed(f8, [s["name"] for s in f8["settings"]]), where(better(f8, pairs))


def off_the_top(sweep=None):
    sweep = sweep or document("DIRECTIONS")
    pairs = [(f"middle, {n}", f"top, {n}") for n in (13, 112)]
    return listed(sweep, [s["name"] for s in sweep["settings"]]), where(better(sweep, pairs))


def larger_fewer():
    """The largest toy against the smallest: for nine tenths of the gain every seed needs fewer."""
    f3 = document("F3")
    holds = {}
    measured = []
    for mode in MODES:
        sizes = needed.curves(f3, mode)
        found = {size: needed.needed(*curve, MOST) for size, curve in sizes.items()}
        measured.append(f"{mode}: " + ", ".join(f"{needed.text(of_means)} ({size})"
                                                for size, (of_means, _) in found.items()))
        small, *_, large = [[limits(x) for x in seeds] for _, seeds in found.values()]
        gains_enough = all(peak - base >= needed.LEAST for base, peak, _ in sizes.values())
        holds[mode] = None
        if gains_enough and max(high for _, high in large) < min(low for low, _ in small):
            holds[mode] = True
        elif gains_enough and min(low for low, _ in large) > max(high for _, high in small):
            holds[mode] = False
    return f"numbers for {MOST} of the gain: {'; '.join(measured)}", where(holds)


def limits(found):
    """(lowest, highest) numbers that may be needed, of (sign, numbers)."""
    sign, numbers = found
    return 0 if sign == "<" else numbers, math.inf if sign == ">" else numbers


# (claim, the figure's file, how it is measured)
CLAIMS = [
    ("13 numbers have most of what RL on all weights gains", "F1", enough),
    ("more numbers, more gain", "F1", more),
    ("LoRA of rank 1 has most of what RL on all weights gains", "F1", lora),
    ("the gain is not answer format", "F1", not_format),
    ("every seed gains alike", "RANK2", any_seed),
    ("SFT on worked solutions needs 100 times more numbers", "F2", lambda: sft("worked")),
    ("SFT on own right answers needs 100 times more numbers", "F2", lambda: sft("own")),
    ("bit for bit, fp32 is better than bf16", "F4", bytes_alike),
    ("tiled is better than structured", "F4", tying),
    ("a frozen rank of 2 is best", "F7", rank_two),
    ("lower u to 1 before raising n_tie", "F8", u_before_ties),
    ("the middle directions are better than the top ones (arXiv 2511.08567)", "DIRECTIONS",
     off_the_top),
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


def redrawn():
    """For docs/results.md: figures that were made again, by the first seeds, by the others and by
    all."""
    rows = []
    for claim, figure, measure in CLAIMS:
        first = read(figure)
        again = read(figure, AGAIN)
        if first and again:
            for sweep in (first, again, pooled(first, again)):
                seeds = ", ".join(map(str, sweep["seeds"]))
                rows.append((claim, figure, seeds, *measure(sweep)))
    return markdown_table(("claim", "figure", "seeds", "the toy, means of the seeds", "verdict"),
                          rows)


def lines():
    """For the README: what is measured, a paragraph for each verdict."""
    claims = {}
    for claim, _, verdict, _ in judged():
        if verdict != OPEN:
            claims.setdefault(verdict, []).append(claim)
    return "\n".join(textwrap.fill(f"- **{verdict}**: {'; '.join(found)}.", 100,
                                   subsequent_indent="  ", break_on_hyphens=False)
                     for verdict, found in claims.items())
