"""The tables of README.md and docs/, derived from results/ and from the flags; see test_docs.py."""
import json
import re
import textwrap
from statistics import mean, median

import verdicts
from helpers import ROOT

import train
from support import flags
from support.scores import MODES, standard_error
from tools import factor, needed, path_picture, styles, sweep_table
from tools.runs import markdown_table as table

RUNS = {path.parent.name: json.loads(path.read_text())
        for path in sorted(ROOT.glob("results/*/summary.json"))}
FIGURES = ROOT / "results" / "figures"
PATH = ROOT / "results" / "path" / "path.json"
ARITHMETIC = [name for name in RUNS if name.startswith("arithmetic-seed")]
# names of runs in results/: RECIPE-KIND and the seed, one digit
RECIPES = {"arithmetic": "the README's", "groups16": "16 x 16", "hot": "hot"}
REWARDS = {"seed": "its own", "shuffled": "dealt out anew", "format": "for the format only"}
FORGOTTEN = ("careful", "hasty", "guess")  # the styles that a system message can ask for
SEEDS = [f"toy-seed{seed}" for seed in range(5)]


def percent(share):
    return f"{100 * share:.1f}%"


def claim():
    """What the sweep of twenty seeds gave; the seconds are those of a run with one thread."""
    runs = headline_runs()
    [headline] = verdicts.document("HEADLINE")["settings"]
    two = [run["final"]["greedy"]["strict"] for run in headline_runs("RANK2")]
    base = runs[0]["base"]
    greedy = [run["final"]["greedy"]["strict"] for run in runs]
    sampled = [run["final"]["T = 1"]["strict"] for run in runs]
    million = RUNS["compare-full"]["params"] / 1e6
    text = (
        f"A frozen model of {million:.2f} million parameters, a small Qwen2.5, learns by "
        f"reinforcement learning on **{runs[0]['params']} numbers, {runs[0]['bytes']} bytes**: "
        f"from {percent(base['greedy']['strict'])} to **{percent(median(greedy))}** of "
        f"{runs[0]['count']} held-out problems, greedy ({percent(base['T = 1']['strict'])} to "
        f"{percent(median(sampled))} sampled at T = 1), the median of {len(runs)} seeds; the "
        f"lowest ends at {percent(min(greedy))}. (Frozen rank {headline['flags']['rank']}; at the "
        f"paper's 2 and a rate of its own: median {percent(median(two))}, lowest "
        f"{percent(min(two))}.) It takes {round(RUNS['toy-seed0']['seconds'] / 60)} minutes on one "
        f"CPU core.")
    return textwrap.fill(text, 100, break_on_hyphens=False)


def headline_runs(figure="HEADLINE"):
    document = sweep_table.load(FIGURES / f"{figure}.runs.json")
    return [document["runs"][key] for key in document["settings"][0]["runs"]]


def spread(figure):
    """How a figure's seeds end, in order."""
    lines = []
    for mode in MODES:
        ends = sorted(run["final"][mode]["strict"] for run in headline_runs(figure))
        listed = ", ".join(f"{x:.3f}" for x in ends)
        lines.append(textwrap.fill(f"- {mode}: {listed}; median {median(ends):.3f}.", 100,
                                   subsequent_indent="  "))
    return "\n".join(lines)


def real():
    """What the arithmetic runs gave, for the README. Seed 2 had the machine for itself."""
    runs = [RUNS[name] for name in ARITHMETIC]
    s = runs[0]

    def span(key):
        low, high = (percent(f(run[key] for run in runs)) for f in (min, max))
        return low if low == high else f"{low} to {high}"
    text = (
        f"**A model that nobody here made**, SmolLM2-135M-Instruct (from a 4-bit file), learns "
        f"arithmetic by "
        f"**{s['params']} numbers, {s['adapter_bytes']:,} bytes**. Of {s['eval_count']} questions "
        f"with unseen pairs of numbers and unseen phrasings, {span('base_lenient')} get the right "
        f"last number before and {span('final_lenient')} after, greedy "
        f"({span('base_sampled_lenient')} and {span('final_sampled_lenient')} sampled at T = 1; "
        f"{len(runs)} seeds). In bf16 two cores took "
        f"{RUNS['arithmetic-seed2']['seconds'] / 60:.1f} minutes:")
    return textwrap.fill(text, 100, break_on_hyphens=False)


def pairs(s, kinds):
    return [f"{s[f'base_{kind}']:.3f}, {s[f'final_{kind}']:.3f}" for kind in kinds]


def seeds_table():
    rows = [(s["seed"], *pairs(s, ("strict", "lenient", "sampled")), round(s["seconds"]))
            for s in (RUNS[name] for name in SEEDS)]
    return table(("seed", "greedy, strict: from, to", "greedy, lenient: from, to",
                  "T = 1, strict: from, to", "seconds"), rows)


def paired(name, file):
    """Cells of what tools/compare.py wrote of a run: greedy, T = 1."""
    lines = (ROOT / "results" / name / file).read_text().splitlines()
    return [f"{c['before']:.3f}, {c['after']:.3f} ({c['p']:{'.2f' if c['p'] >= 0.01 else '.0e'}})"
            for c in map(json.loads, lines)]


def forgetting_table():
    """What else the arithmetic runs changed."""
    rows = []
    for name in ARITHMETIC:
        loss = json.loads((ROOT / "results" / name / "forgetting.json").read_text())["loss"]
        cells = [f"{x['before']:.2f}, {x['after']:.2f} ({x['after'] - x['before']:+.2f} +- "
                 f"{x['error']:.2f})" for x in loss.values()]
        rows.append((RUNS[name]["seed"], *cells, *paired(name, "two_digit.jsonl")))
    return table(("seed", *(f"nats a token, {text.removeprefix('prose, ')}" for text in loss),
                  "two-digit sums, greedy: from, to (p)", "T = 1: from, to (p)"), rows)


def toy_forgetting_table():
    """What the toy's runs changed beside the plain questions: a row a run."""
    rows = []
    for name in (*SEEDS, "compare-lora"):
        found = json.loads((ROOT / "results" / name / "forgetting.json").read_text())
        losses = [f"{x['after'] - x['before']:+.3f} +- {x['error']:.3f}"
                  for x in (found["loss"][f"{style}, answers"] for style in FORGOTTEN)]
        asked = []
        for style, key in (("careful", "strict"), ("hasty", "hasty"), ("guess", "guess")):
            sampled = found["asked"][style]["T = 1"]
            asked.append(f"{sampled['before'][key]:.2f}, {sampled['after'][key]:.2f}")
        label = f"13 numbers, seed {RUNS[name]['seed']}" if name in SEEDS else "LoRA, r = 1"
        rows.append((label, *losses, *asked))
    return table(("trained", *(f"nats a token, {style}" for style in FORGOTTEN),
                  "told to be careful: right", "to be hasty: is", "to guess: does"), rows)


def arithmetic_table():
    rows = []
    for name in ARITHMETIC:
        s = RUNS[name]
        rows.append((s["seed"], *pairs(s, ("lenient", "sampled_lenient", "strict", "format")),
                     *paired(name, "limit64.jsonl"), *paired(name, "confirmation.jsonl")))
    return table(("seed", "greedy: from, to", "T = 1: from, to", "strict, greedy", "format, greedy",
                  "64 tokens, greedy (p)", "64 tokens, T = 1 (p)",
                  "confirmation, greedy (p)", "confirmation, T = 1 (p)"), rows)


def controls_table():
    """The arithmetic runs, and those whose rewards said nothing or paid for format only, of the
    README's recipe and of others."""
    rows = []
    for recipe, said in RECIPES.items():
        for kind, rewards in REWARDS.items():
            runs = [RUNS[name] for name in RUNS if name[:-1] == f"{recipe}-{kind}"]
            rows += [(said, rewards, run["seed"], *control_cells([run])) for run in runs]
            if len(runs) > 1:
                rows.append((said, rewards, "mean", *control_cells(runs)))
    return table(("recipe", "rewards", "seed", "greedy: from, to (standard errors)",
                  "T = 1: from, to (standard errors)", "format, greedy: from, to",
                  "format, T = 1: from, to"), rows)


def control_cells(runs):
    """The mean of some summaries; changes in standard errors of the untrained model's score."""
    scores = [key for key in runs[0] if key.startswith(("base", "final"))]
    s = {key: mean(run[key] for run in runs) for key in scores}
    cells = []
    for kind in ("lenient", "sampled_lenient"):
        before, after = s[f"base_{kind}"], s[f"final_{kind}"]
        error = standard_error(before, runs[0]["eval_count"])
        cells.append(f"{before:.3f}, {after:.3f} ({(after - before) / error:+.1f})")
    return [*cells, *pairs(s, ("format", "sampled_format"))]


def thirteen_table():
    """Every attempt at 13 numbers in results/thirteen/: what its flags change in the first one."""
    folders = sorted(path.parent for path in (ROOT / "results" / "thirteen").glob("*/config.json"))
    configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
    names = ("seed", "method", *flags.TRAINING, "max-new-tokens")
    keys = {name: name.replace("-", "_") for name in names}
    rows = []
    for folder, config in zip(folders, configs):
        changed = [f"--{name} {config[key]}" for name, key in keys.items()
                   if config.get(key) != configs[0].get(key)]  # an older run lacks new flags
        s = json.loads((folder / "summary.json").read_text())
        last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
        entropy = f"{last['entropy']:.2f}" if "entropy" in last else ""  # ES has none
        cells = paired(f"thirteen/{folder.name}", "test.jsonl")
        rows.append((f"`{' '.join(changed)}`" if changed else "the command below", s["params"],
                     *cells, f"{last['v_norm']:.2f}", entropy))
    return table(("attempt", "numbers", "greedy: from, to (p)", "T = 1: from, to (p)",
                  "length of v", "entropy at the end"), rows)


def random_v():
    """Random values of 13 numbers, the best of them on the test questions."""
    drawn = json.loads((ROOT / "results" / "random-v" / "random_v.json").read_text())
    s = RUNS["random-v"]
    base = RUNS[ARITHMETIC[0]]
    scores = [v["score"] for v in drawn["v"]]
    better = sum(score > drawn["base"] for score in scores)
    text = (f"Of {len(scores)} random v's of standard deviation {drawn['sd']:g}, "
            f"{better} {'gets' if better == 1 else 'get'} more of {drawn['problems']} training "
            f"questions right than the untrained model ({max(scores):.3f}; untrained "
            f"{drawn['base']:.3f}; median {median(scores):.3f}; greedy). On the test questions "
            f"that one has {s['lenient']:.3f} greedy and {s['sampled_lenient']:.3f} at T = 1, "
            f"where the untrained model has {base['base_lenient']:.3f} and "
            f"{base['base_sampled_lenient']:.3f}.")
    return textwrap.fill(text, 100, break_on_hyphens=False)


def smollm2_table():
    s = RUNS["smollm2-mawps"]
    checked = json.loads((ROOT / "results/smollm2-mawps/check_base.json").read_text())
    rows = []
    for kind in ("strict", "lenient", "format"):
        shares = (checked["transformers"][kind], s[f"base_{kind}"], s[f"final_{kind}"])
        rows.append((kind, *(f"{round(share * s['eval_count'])}" for share in shares)))
    title = f"right, of {s['eval_count']}, greedy"
    return table((title, "transformers, untrained", "here, untrained",
                  f"after {s['steps']} steps"), rows)


def flag_table(recipe):
    rows = []
    for name, default, kind, meaning in recipe:
        value = {None: "", False: ""}.get(default, default)
        if isinstance(kind, list):
            meaning = f"{', '.join(f'`{word}`' for word in kind)}: {meaning}"
        meaning = re.sub(r"<(\w+)>", r"&lt;\1&gt;", meaning).replace("|", "\\|")
        rows.append((f"`--{name}`", value, meaning))
    return table(("flag", "default", "meaning"), rows)


def ability():
    """What the toy does when it is told to be careful."""
    s = RUNS["ability"]
    return (f"gives {s['strict']:.3f} greedy and {s['sampled']:.3f} at T = 1, of "
            f"{s['eval_count']:,} problems (results/ability).")


def own_solutions():
    """How many of F2's own solutions are in which style."""
    rows = (FIGURES / "own-solutions" / "train.jsonl").read_text().splitlines()
    kinds = [styles.style(json.loads(row)["answer"]) for row in rows]
    asked = sum(1 for _ in open(flags.TOY / "train.jsonl"))
    listed = ", ".join(f"{kinds.count(style):,} {style}" for style in styles.STYLES)
    return f"There is one for {len(rows):,} of the {asked:,} problems: {listed}."


def anywhere_table():
    """Where the right number stands, before and after, with 64 tokens."""
    rows = []
    for name in ARITHMETIC:
        lines = (ROOT / "results" / name / "anywhere.jsonl").read_text().splitlines()
        for found in map(json.loads, lines):
            sides = (found["before"], found["after"])
            cells = [", ".join(f"{side[key]:.{digits}f}" for side in sides)
                     for key, digits in (("lenient", 3), ("last", 3), ("anywhere", 3),
                                         ("numbers", 1))]
            rows.append((RUNS[name]["seed"], found["mode"], *cells))
    return table(("seed", "", "lenient: from, to", "last number right", "right number anywhere",
                  "numbers a response"), rows)


def path_tables():
    """Without the tables of single numbers: the picture has them."""
    return path_picture.markdown(path_picture.load(PATH), each_number=False)


def styles_table():
    return styles.markdown(json.loads((FIGURES / "HEADLINE.styles.json").read_text()))


GENERATED = {"toy-forgetting": toy_forgetting_table, "ability": ability, "own": own_solutions,
             "claim": claim, "real": real, "seeds": seeds_table,
             "verdicts": verdicts.table, "lines": verdicts.lines, "redrawn": verdicts.redrawn,
             "spread": lambda: spread("HEADLINE"), "spread2": lambda: spread("RANK2"),
             "styles": styles_table, "smollm2": smollm2_table,
             "recipe": lambda: flag_table(train.RECIPE),
             "program": lambda: flag_table(flags.PROGRAM)}
if ARITHMETIC:
    GENERATED["arithmetic"] = arithmetic_table
    GENERATED["controls"] = controls_table
    GENERATED["forgetting"] = forgetting_table
    GENERATED["thirteen"] = thirteen_table
    GENERATED["anywhere"] = anywhere_table
    GENERATED["random-v"] = random_v
for path in sorted(FIGURES.glob("*.runs.json")):  # of tools/sweep.py: F7, ...
    if json.loads(path.read_text())["settings"]:  # else it is not finished
        GENERATED[path.name.split(".")[0]] = lambda path=path: sweep_table.block(path)
if PATH.is_file():
    GENERATED["path"] = path_tables
if "F3" in GENERATED:
    GENERATED["needed"] = lambda: needed.markdown(sweep_table.load(FIGURES / "F3.runs.json"))
if "CURVE" in GENERATED:
    GENERATED["half"] = lambda: needed.markdown(sweep_table.load(FIGURES / "CURVE.runs.json"),
                                                (0.5, 0.9), "LoRA")
if {"F1", "F2"} <= GENERATED.keys():
    GENERATED["factor"] = lambda: factor.markdown(
        *(sweep_table.load(FIGURES / f"{name}.runs.json") for name in ("F1", "F2")),
        ("worked", "own"))
