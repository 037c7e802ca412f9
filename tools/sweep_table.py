"""What tools/sweep.py reports, from NAME.runs.json alone: rows, a table in markdown, a picture."""
import textwrap
from statistics import mean

from support.errors import InputError
from support.files import LARGEST_DATA, read_json
from support.scores import MODES
from support.terminal import printable
from tools.compare import p_value
from tools.runs import markdown_table, pyplot, reading, save


def rows(document):
    """One for each setting: its rate, its runs' scores as [mean, lowest, highest], p-values."""
    runs = document["runs"]
    by_name = {s["name"]: [runs[k] for k in s["runs"]] for s in document["settings"]}
    found = []
    last = {}  # of each series
    for setting in document["settings"]:
        name = setting["name"]
        own = by_name[name]
        against = setting.get("against", last.get(setting["series"]))
        last[setting["series"]] = name
        first = own[0]
        rates = [place["lr"] for place in setting["grid"]]
        row = {"name": name, "series": setting["series"], "x": setting.get("x", first["params"]),
               "params": first["params"], "bytes": first["bytes"], "lr": setting["lr"],
               "rates": rates, "at_end": setting["lr"] in (rates[0], rates[-1]),
               "seeds": len(own), "against": against}
        for mode in MODES:
            row[mode] = spreads([run["final"] for run in own], mode)
        row["p_base"] = p_values([(run, "base_right") for run in own], own)
        if against is not None:
            row["p_against"] = p_values([(run, "final_right") for run in by_name[against]], own)
        found.append(row)
    return found


def spreads(scores, mode):
    """{score: [mean, lowest, highest]} of a mode's scores in several runs."""
    columns = {name: [each[mode][name] for each in scores] for name in scores[0][mode]}
    # not sum / len: rounding may put that outside its own range, which a picture refuses
    return {name: [mean(x), min(x), max(x)] for name, x in columns.items()}


def p_values(before, after):
    """{mode: [p of each seed]} of McNemar's exact test. before: (run, which of its answers)."""
    found = {mode: [] for mode in MODES}
    for (old, which), new in zip(before, after):
        for mode in MODES:
            x = int(old[which][mode], 16)
            y = int(new["final_right"][mode], 16)
            found[mode].append(p_value((y & ~x).bit_count(), (x & ~y).bit_count()))
    return found


def accuracy(run, when="final"):
    """The accuracy by which rates are chosen: the mean of greedy and T = 1."""
    return sum(run[when][mode][run["score"]] for mode in MODES) / len(MODES)


def bases(document):
    """{"untrained": {mode: {score: spread}}}: the zero-adapter control of every run. Where settings
    begin with several models, one for each, by its settings' series."""
    by_model = {}
    for setting in document["settings"]:
        by_model.setdefault(setting["flags"].get("model"), []).append(setting)
    found = {}
    for settings in by_model.values():
        name = "untrained" if len(by_model) == 1 else f"untrained, {settings[0]['series']}"
        used = [document["runs"][k]["base"] for s in settings for k in s["runs"]]
        found[name] = {mode: spreads(used, mode) for mode in MODES}
    return found


def markdown(document):
    """The table, and a line that says how its numbers came about."""
    table = rows(document)
    runs = [document["runs"][k] for s in document["settings"] for k in s["runs"]]
    names = list(runs[0]["final"][MODES[0]])
    header = ["trained", "numbers", "lr", *(f"{mode}: {name}" for mode in MODES for name in names),
              "p: untrained", "p: compared"]
    lines = []
    for untrained, scores in bases(document).items():
        lines.append([untrained, "0", "", *(f"{scores[mode][name][0]:.3f}"
                                            for mode in MODES for name in names), "", ""])
    for setting, row in zip(document["settings"], table):
        scores = [spread_text(row[mode][name]) for mode in MODES for name in names]
        compared = ""
        if row["against"] is not None:
            compared = f"{p_text(row['p_against'])} ({row['against']})"
        rate = f"{row['lr']:g}" + (" (end of the grid)" if row["at_end"] else "")
        rate += " (untrained is better)" if untrained_is_better(document, setting) else ""
        lines.append([row["name"], f"{row['params']:,}", rate, *scores, p_text(row["p_base"]),
                      compared])
    return f"{markdown_table(header, lines)}\n\n{notes(document, runs)}"


def untrained_is_better(document, setting):
    """On the validation problems, at every rate of the grid."""
    runs = [document["runs"][key] for key in setting["grid"][0]["runs"]]
    before = sum(accuracy(run, "base") for run in runs) / len(runs)
    return before >= max(x["validation"] for x in setting["grid"])


def spread_text(spread):
    middle, low, high = spread
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def p_text(p):
    """The largest p-value of the seeds, in every mode: what the least convincing seed says."""
    return ", ".join(f"{max(values):.3f}" if max(values) >= 0.001 else "< 0.001"
                     for values in (p[mode] for mode in MODES))


def notes(document, runs):
    """How the numbers came about, in lines of at most 100 columns."""
    budgets = {}
    for run in runs:
        kind = "examples (SFT)" if run["algo"] == "sft" else "sampled responses"
        budgets[kind] = run["budget"]
    learned = " or ".join(f"{number:,} {kind}" for kind, number in budgets.items())
    tuning = [document["runs"][key] for key in document["settings"][0]["grid"][0]["runs"]]
    versions = sorted({run["version"] for run in document["runs"].values()})
    text = " ".join([
        f"Mean (lowest to highest) of seeds {listed(document['seeds'])} on {runs[0]['count']} test "
        f"problems.",
        f"Every run learns from {learned}.",
        f"Rates: the best on {tuning[0]['count']} validation problems, seeds "
        f"{listed([run['seed'] for run in tuning])}.",
        f"p: McNemar's exact test, the largest of the seeds; {', then '.join(MODES)}.",
        f"Code: {', '.join(versions)}."])
    return textwrap.fill(text, 100, break_on_hyphens=False, break_long_words=False)


def listed(seeds):
    return ", ".join(map(str, seeds))


def draw(document, out):
    """Accuracy against x: a line a series, a bar from the lowest to the highest seed."""
    plt = pyplot()
    table = rows(document)
    runs = document["runs"]
    score = runs[document["settings"][0]["runs"][0]]["score"]
    figure, axes = plt.subplots(1, len(MODES), figsize=(12, 4.2), dpi=110, sharey=True)
    untrained = bases(document)
    colours = {}  # of several models, a series and an untrained line each
    for axis, mode in zip(axes, MODES):
        for series in dict.fromkeys(row["series"] for row in table):
            points = sorted((row["x"], *row[mode][score]) for row in table
                            if row["series"] == series)
            x, means, low, high = zip(*points)
            bars = [[m - lo for m, lo in zip(means, low)], [hi - m for m, hi in zip(means, high)]]
            line, *_ = axis.errorbar(x, means, yerr=bars, marker="o", markersize=4, capsize=3,
                                     label=series)
            colours[f"untrained, {series}"] = line.get_color()
        for name, scores in untrained.items():
            axis.axhline(scores[mode][score][0], linestyle="--", label=name,
                         color=colours.get(name, "grey"))
        axis.set(title=f"{score}, {mode}", xscale="log")
        axis.set_xlabel(document["definition"]["axis"], parse_math=False)
        axis.grid(alpha=0.3)
    # a dollar sign is one: matplotlib would read mathematics
    figure.suptitle(document["definition"]["title"], parse_math=False)
    axes[0].set_ylim(-0.02, 1.04)
    axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))  # beside, over nothing
    figure.tight_layout()
    save(figure, out)
    print(printable(f"{out}: {len(table)} settings, seeds {listed(document['seeds'])}"))


def block(path):
    """What stands in a document between the comments that tests/test_docs.py looks for."""
    return markdown(load(path))


def load(path):
    """A finished NAME.runs.json. InputError if it is none."""
    document = read_json(path, LARGEST_DATA)
    if not document.get("settings"):
        raise InputError(f"{path}: its sweep is not finished; run it again without --report")
    return document


def report(path):
    """Print the table of a NAME.runs.json and draw NAME.png beside it."""
    with reading("a sweep's", path):
        document = load(path)
        print(markdown(document))
        draw(document, str(path).removesuffix(".runs.json") + ".png")
