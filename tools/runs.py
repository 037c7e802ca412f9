"""Runs as tools/plot.py and tools/claim.py draw them: read from their folders, put together."""
import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from support.errors import InputError
from support.files import read_json, read_jsonl
from support.scores import key as summary_key, main_score

# What does not make two runs two settings: the seed, where and with what they ran, how it was
# written down; and sums over texts, which nobody could read in a legend.
IGNORED = {"seed", "out", "trained", "torch", "numpy", "device", "resume", "save_every", "wandb",
           "tensorboard", "threads", "ranks", "chat", "chat_format", "problems", "samples",
           "task_code", "engine", "eval_only", "tokens_per_micro_batch", "rollout_rows",
           "recompute", "cuda_graph", "sample_every"}
# A row's rollouts come from the policy before its update: step - 1. Its v_norm from after it.
BEFORE = {"length": "length (tokens)", "entropy": "entropy (nats per token)",
          "loss": "loss (--algo sft)"}
TEXTS = ("method", "reward", "algo", "model", "data", "eval_data")
COUNTS = ("params", "adapter_bytes", "eval_count", "steps", "groups", "u")
REWARD = "reward of the samples trained on"
NORM = "norm of what is trained"


@dataclass
class Run:
    folder: Path
    settings: dict
    summary: dict  # {} while it goes on
    points: dict  # what of: {step: value}
    scores: list  # names of the task's scores


def read_run(folder):
    """A run's folder -> Run. InputError if it is something else."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if config.get("eval_only"):
        raise InputError(f"{folder}: is an evaluation, without steps that could be drawn")
    if not (folder / "log.jsonl").is_file():
        raise InputError(f"{folder}: has no log.jsonl: it is no run, or has made no step yet")
    rows = [row for _, row in read_jsonl(folder / "log.jsonl")]
    if not all(type(row.get("step")) is int and 0 <= row["step"] < 2**31 for row in rows):
        raise InputError(f"{folder / 'log.jsonl'}: its rows are not those of a run")
    path = folder / "summary.json"
    summary = read_json(path) if path.is_file() else {}
    for source, values in ((folder / "config.json", config), (path, summary)):
        check_types(source, values)
    check_types(folder / "config.json", config.get("trained") or {})
    scores = score_names(rows, summary)
    return Run(folder, settings_of(config), summary, points_of(config, rows, summary, scores),
               scores)


def check_types(path, values):
    """InputError for settings or results that are not of the kind that train.py writes."""
    for names, kind in ((TEXTS, str), (COUNTS, int)):
        for name in names:
            value = values.get(name) if isinstance(values, dict) else values
            if value is not None and (type(value) is not kind
                                      or kind is int and not 0 <= value < 2**60):
                raise InputError(f"{path}: {name} is {value!r}; train.py writes no such thing")


def score_names(rows, summary):
    """The task's scores: what evaluations after a step or of the whole run have measured."""
    names = [name.removeprefix("final_") for name in summary if name.startswith("final_")]
    names += [name.removeprefix("eval_") for row in rows for name in row
              if name.startswith("eval_") and name not in ("eval_length", "eval_sets")]
    return [name for name in dict.fromkeys(names) if not name.startswith("sampled")]


def settings_of(config):
    """The settings that make a run what it is; those left at their defaults as they came out."""
    trained = config.get("trained")
    trained = trained if isinstance(trained, dict) else {}
    settings = {name: x for name, x in config.items() if name not in IGNORED}
    settings |= {name: trained[name] for name in trained
                 if name in ("rank", "directions", "alpha", "u", "tie", "n_tie")}
    if "groups" in trained and "u" in trained:  # ties, in the file format's words
        settings["params"] = trained["groups"] * trained["u"]
    return {name: x for name, x in settings.items() if x not in (None, False, "")}


def points_of(config, rows, summary, scores):
    """{title of a panel: {step: value}}; panels without a point are left out."""
    main = main_score(scores) if scores else None
    reward = config.get("reward") or main
    panels = {}
    for sampled, words in ((False, "greedy"), (True, "T = 1")):
        for name in scores:
            key = f"eval_sampled_{name}" if sampled else f"eval_{name}"
            points = {row["step"]: row.get(key) for row in rows}
            measured = any(x is not None for x in points.values())
            if sampled and not measured and name not in (main, reward):
                continue
            if summary:
                ends = summary_key(name, sampled, main)
                points[0] = summary.get(f"base_{ends}")
                points[summary.get("steps", len(rows))] = summary.get(f"final_{ends}")
            panels[panel(name, words)] = points
    before = {reward: REWARD} | BEFORE
    for key, title in before.items():
        panels[title] = {row["step"] - 1: row.get(key) for row in rows}
    panels[NORM] = {row["step"]: row.get("v_norm") for row in rows}
    panels = {title: {step: x for step, x in points.items() if is_drawable(x)}
              for title, points in panels.items()}
    return {title: points for title, points in panels.items() if points}


def is_drawable(x):
    """A run that went wrong may have logged NaN; a damaged file may hold anything."""
    return type(x) in (int, float) and abs(x) < 1e30


def panel(score, mode):
    return f"held-out {score}, {mode}"


def by_setting(runs):
    """[(settings, runs with them)], in order."""
    groups = {}
    for run in runs:
        groups.setdefault(json.dumps(run.settings, sort_keys=True), []).append(run)
    return [(members[0].settings, members) for members in groups.values()]


def mean_and_band(members, title):
    """steps, means, lowest, highest of the members' points at each step."""
    points = [run.points.get(title, {}) for run in members]
    steps = sorted({step for some in points for step in some})
    values = [[some[step] for some in points if step in some] for step in steps]
    means = [mean(x) for x in values]  # never outside its range, as sum / len may be
    return steps, means, [min(x) for x in values], [max(x) for x in values]


@contextmanager
def reading(whose, *paths):
    """InputError instead of what a damaged JSON raises where its fields are read.

    whose: which tool writes such files, for the message.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
        raise InputError(f"{' or '.join(map(str, paths))}: damaged, or not {whose}: "
                         f"{type(e).__name__} {e}; take a copy of it, or delete it and make it "
                         f"again") from None


def markdown_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def pyplot():
    """matplotlib, drawing into files only. InputError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("drawing needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def save(figure, out):
    try:
        figure.savefig(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error})") from None
    finally:
        pyplot().close(figure)
