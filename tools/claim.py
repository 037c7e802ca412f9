"""python -m tools.plot --claim: one panel with held-out accuracy, greedy and at T = 1, by step.

The runs of --method tinylora (or lora-xs) are the curve, their seeds a band; they must have one
setting. Runs of other methods are dashed lines at what they reached, and so is the untrained model.
"""
from pathlib import Path

from support.errors import InputError
from support.terminal import printable
from tools.runs import by_setting, mean_and_band, panel, pyplot, save

MODES = (("greedy", "tab:blue"), ("T = 1", "tab:orange"))
NAMES = {"lora": "LoRA", "full": "full"}
DISTANCE = 0.06  # between two texts at the right side, in units of the accuracy axis
CLOSE = 0.02  # two dashed lines of one mode this close get one text


def choose(runs):
    """(the runs of the curve, {name: runs of a dashed line}). InputError if they do not fit."""
    curves = []
    others = {}
    for settings, members in by_setting(runs):
        method = settings.get("method", "tinylora")
        if method in ("tinylora", "lora-xs"):
            curves.append(members)
            continue
        name = NAMES.get(method, method)
        if name in others:
            raise InputError(f"--claim: {others[name][0].folder} and {members[0].folder} are two "
                             f"settings of --method {method}; give one")
        others[name] = members
    if len(curves) != 1:
        raise InputError(f"--claim: needs runs of one setting of --method tinylora or lora-xs, "
                         f"these have {len(curves)}")
    return curves[0], others


def last_mean(members, title):
    """What the runs reached in the mean, or None."""
    _, means, _, _ = mean_and_band(members, title)
    return means[-1] if means else None


def numbers_of(members):
    """" (9,728 numbers)", where a run's summary says so."""
    count = members[0].summary.get("params")
    return f" ({count:,} numbers)" if isinstance(count, int) else ""


def dashed_lines(score, members, others):
    """[(accuracy, name, mode, colour)] of the untrained model and of the other methods."""
    lines = []
    for mode, colour in MODES:
        title = panel(score, mode)
        _, means, _, _ = mean_and_band(members, title)
        found = {"untrained": means[0] if means else None}
        found |= {name: last_mean(some, title) for name, some in others.items()}
        lines += [(x, name, mode, colour) for name, x in found.items() if x is not None]
    return lines


def texts_for(lines):
    """[(accuracy, text, colour)]: neighbours of one mode share a text."""
    shared = []
    for x, name, mode, colour in sorted(lines, key=lambda line: (line[2], -line[0])):
        if shared and shared[-1][1] == mode and shared[-1][0] - x <= CLOSE:
            shared[-1][3].append(f"{name} {x:.2f}")
        else:
            shared.append((x, mode, colour, [f"{name} {x:.2f}"]))
    return [(x, f"{', '.join(names)} ({mode})", colour) for x, mode, colour, names in shared]


def spread(heights):
    """Heights in descending order -> heights for texts, DISTANCE apart at least."""
    placed = []
    for height in heights:
        placed.append(min([height, *(y - DISTANCE for y in placed[-1:])]))
    return placed


def write_texts(axis, texts, right):
    """Each text beside its line, outside the panel; a thin line leads there where it must move."""
    texts = sorted(texts, key=lambda text: -text[0])
    places = spread([x + DISTANCE / 3 if x > 0.9 else x for x, *_ in texts])
    for (x, text, colour), y in zip(texts, places):
        axis.annotate(text, xy=(right, x), xytext=(right * 1.05, y), color=colour, fontsize=9,
                      va="center", annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6,
                                  "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 0})


def draw_curve(axis, members, score, mode, colour):
    """The mean of the seeds and their band; only two evaluations: two points with error bars."""
    steps, means, low, high = mean_and_band(members, panel(score, mode))
    if not steps:
        return None
    seeds = f"mean of {len(members)} seeds, band" if len(members) > 1 else "one run"
    if len(steps) > 2:
        axis.plot(steps, means, "o-", color=colour, markersize=4, zorder=3,
                  label=f"{mode}: {seeds}" + " from lowest to highest" * (len(members) > 1))
        axis.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    else:
        bars = [[m - a for m, a in zip(means, low)], [b - m for m, b in zip(means, high)]]
        seeds = seeds.replace("band", "bars")
        axis.errorbar(steps, means, yerr=bars, fmt="o:", color=colour, markersize=5, capsize=4,
                      linewidth=1, zorder=3,
                      label=f"{mode}, before and after: {seeds}"
                            + " from lowest to highest" * (len(members) > 1))
    return means[-1]


def draw(runs, out):
    """The picture. InputError if the runs do not make one curve."""
    plt = pyplot()
    members, others = choose(runs)
    if not members[0].scores:
        raise InputError(f"{members[0].folder}: has no evaluation (yet) that could be drawn")
    score = "strict" if "strict" in members[0].scores else members[0].scores[0]
    summary = next((run.summary for run in members if run.summary), {})
    settings = members[0].settings
    figure, axis = plt.subplots(figsize=(9.5, 5.2), dpi=120)
    lines = dashed_lines(score, members, others)
    texts = texts_for(lines)
    for mode, colour in MODES:
        end = draw_curve(axis, members, score, mode, colour)
        if end is not None:
            texts.append((end, f"{settings.get('params')} numbers {end:.2f} ({mode})", colour))
    for x, _, _, colour in lines:
        axis.axhline(x, color=colour, linestyle="--", linewidth=1, alpha=0.7)
    names = ", ".join(["untrained", *(name + numbers_of(some) for name, some in others.items())])
    dashed = f"{names}; colours as above"
    axis.plot([], [], "--", color="grey", linewidth=1, label=dashed)
    right = max(step for run in members for step in run.points[panel(score, "greedy")])
    right = right * 1.02 or 1
    axis.set_xlim(-0.02 * right, right)
    axis.set_ylim(0, 1.03)
    write_texts(axis, texts, right)
    title = Path(str(settings.get("model", "model"))).name
    if "params" in summary and "adapter_bytes" in summary:
        title += (f": {summary['params']:,} trained numbers, "
                  f"{summary['adapter_bytes']:,} bytes")
    axis.set_title(title, fontsize=13)
    axis.set_xlabel("training step")
    count = f" on {summary['eval_count']} held-out problems" if "eval_count" in summary else ""
    axis.set_ylabel(f"accuracy ({score}){count}")
    axis.grid(alpha=0.3)
    handles, words = axis.get_legend_handles_labels()
    order = sorted(range(len(words)), key=lambda i: words[i] == dashed)  # the dashed ones last
    figure.legend([handles[i] for i in order], [words[i] for i in order], loc="lower left",
                  bbox_to_anchor=(0.065, 0), fontsize=9, frameon=False)
    figure.subplots_adjust(left=0.075, right=0.76, top=0.92, bottom=0.255)
    save(figure, out)
    print(printable(f"{out}: {len(members)} run{'s' if len(members) > 1 else ''} as the curve, "
                    f"dashed: {', '.join(['untrained', *others])}"))
