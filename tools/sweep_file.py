"""A sweep's file, as tools/sweep.py reads it, and by what the runs that it asks for are known.

    {"title": ..., "axis": what the picture's x axis says, "flags": train.py's for every run,
     "validation": 500 problems made by toy/make.py, or a value for --data,
     "settings": [{"name": ..., "series": a line of the picture, "flags": {...}, "lr": the grid's
                   middle, "x": if it is not how many numbers are trained,
                   "against": a setting to compare with, if not the one before in its series}],
     "tuning_seeds": 2 unless given, "score": the task's main one unless given}

Paths in it are relative to the current folder, as train.py's.
"""
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

import train
from support.data import module_at
from support.errors import InputError
from support.files import make_folder, read_json, read_jsonl, replacing
from support.flags import TOY, as_words
from tools.runs import IGNORED

FIGURES = TOY.parent / "results" / "figures"
EVERY_PROBLEM = 2**20  # --samples
HASHED = 64 << 20  # bytes; of a larger file only the size tells whether it is the same
# Flags that are the sweep's own, and those that do not decide a result (beside tools/runs.py's).
OWN = ("lr", "seed", "samples", "out", "resume", "eval-only", "chat", "save-every", "wandb",
       "eval-data")
NO_MATTER = IGNORED | {"eval_every", "shard"}
FIELDS = {"title": str, "axis": str, "flags": dict, "validation": (str, int), "settings": list,
          "tuning_seeds": int, "score": str}
SETTING = {"name": str, "series": str, "lr": (int, float), "flags": dict, "x": (int, float),
           "against": str}
OPTIONAL = ("tuning_seeds", "score", "x", "against")


def find(word):
    """A figure's name, or a path -> the path of the sweep's file."""
    path = Path(word) if Path(word).suffix else FIGURES / f"{word}.json"
    if not path.is_file():
        figures = sorted(p.stem for p in FIGURES.glob("*.json") if p.suffixes == [".json"])
        raise InputError(f"{word}: no such file or figure; the figures are {', '.join(figures)}")
    return path


def read_definition(path):
    """The sweep's file, checked. InputError says what is wrong with it."""
    spec = read_json(path)
    check_fields(path, spec, FIELDS)
    if not spec["settings"]:
        raise InputError(f"{path}: has no settings")
    for i, setting in enumerate(spec["settings"]):
        where = f"{path}, setting {i + 1}"
        if not isinstance(setting, dict):
            raise InputError(f"{where}: is not a JSON object")
        check_fields(where, setting, SETTING)
        if not 1e-6 <= setting["lr"] <= 1e3:
            raise InputError(f"{where}: lr {setting['lr']} is no place to begin at")
        for name in spec["flags"] | setting["flags"]:
            if name in OWN:
                raise InputError(f"{where}: --{name} is the sweep's own")
    names = [setting["name"] for setting in spec["settings"]]
    if len(set(names)) < len(names):
        raise InputError(f"{path}: two settings have one name")
    unknown = {s["against"] for s in spec["settings"] if "against" in s} - set(names)
    if unknown:
        raise InputError(f"{path}: no setting has the name {unknown.pop()!r}")
    if isinstance(spec["validation"], int) and spec["validation"] < 1:
        raise InputError(f"{path}: validation must be at least 1 problem")
    if not 1 <= spec.get("tuning_seeds", 1) <= 100:
        raise InputError(f"{path}: tuning_seeds must be from 1 to 100")
    return spec


def check_fields(where, values, fields):
    for name, value in values.items():
        if name not in fields:
            raise InputError(f"{where}: {name!r} is not one of {', '.join(fields)}")
        if not isinstance(value, fields[name]) or isinstance(value, bool):
            raise InputError(f"{where}: {value!r} will not do for {name!r}")
    for name in fields:
        if name not in values and name not in OPTIONAL:
            raise InputError(f"{where}: has no {name!r}")


def contents(value):
    """A sha256 of the file or the files at a path; of what is no path (a hub's name), itself.

    Not of a model folder's tinylora.json: what it sets is among the resolved flags.
    """
    if value is None or not Path(value).exists():
        return value
    path = Path(value)
    paths = [path]
    if path.is_dir():
        paths = sorted(p for p in path.iterdir() if p.name != "tinylora.json"
                       and p.suffix in (".json", ".jsonl", ".safetensors"))
    digest = hashlib.sha256()
    for file in paths:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        if size <= HASHED:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def prepare(spec, setting, folder):
    """{split: (words after train.py, all flags that decide the result, resolved)} of a setting."""
    given = spec["flags"] | setting["flags"]
    words = [word for name, value in given.items() for word in as_words(name, value)]
    test = vars(train.flags(words))
    data = spec["validation"]
    if isinstance(data, int):
        data = str(validation_folder(test["data"], data, folder))
    tuning_words = [word for name, value in (given | {"data": data}).items()
                    for word in as_words(name, value)]
    tuning = vars(train.flags(tuning_words))
    return {"test": (words + [f"--samples={EVERY_PROBLEM}"], identity(test)),
            "validation": (tuning_words + ["--samples=0"], identity(tuning))}


def identity(resolved):
    """The flags that decide a result, with what lies at their paths in place of the paths.

    Without those that are not set: where a newer flag changes nothing, runs keep their keys.
    """
    settings = {name: x for name, x in resolved.items()
                if name not in NO_MATTER and x is not None}
    paths = ("model", "data", "task", "adapter")
    return settings | {name: contents(settings[name]) for name in paths if name in settings}


def validation_folder(data, wanted, folder):
    """--data for the tuning: the training problems of `data`, and new problems of the toy's kind.

    The new ones come from the toy's generator with another seed; those that `data` has too, in
    training or test, are left out. So the three sets share no question.
    """
    out = folder / f"validation-{contents(data)[:8]}-{wanted}"
    if (out / "test.jsonl").is_file():
        return out
    files = [Path(data) / f"{name}.jsonl" for name in ("train", "test")]
    taken = {row.get("question") for file in files for _, row in read_jsonl(file)}
    make = module_at(TOY / "make.py")
    with tempfile.TemporaryDirectory() as temporary:
        make.write_problems(Path(temporary), np.random.RandomState(1))
        rows = [row for _, row in read_jsonl(Path(temporary) / "train.jsonl")]
    new = [row for row in rows if row["question"] not in taken][:wanted]
    if len(new) < wanted:
        raise InputError(f"validation: {wanted} problems are asked for, at most {len(new)} made")
    make_folder(out)
    shutil.copyfile(files[0], out / "train.jsonl")
    with replacing(out / "test.jsonl") as path:  # last: then the folder is complete
        path.write_text("".join(json.dumps(row) + "\n" for row in new), encoding="utf-8")
    return out


def check_budgets(path, prepared):
    """InputError unless every setting learns from equally many responses, or by SFT, examples, and
    is evaluated alike: a model's tinylora.json, or none, changes what its settings have."""
    budgets = {"responses": set(), "examples": set()}
    for splits in prepared:
        flags = splits["test"][1]
        kind = "examples" if flags["algo"] == "sft" else "responses"
        each = flags["prompts"] * (1 if flags["algo"] == "sft" else flags["group"])
        budgets[kind].add(flags.get("steps", 0) * each or f"3 epochs x {flags['group']}")
    for kind, numbers in budgets.items():
        if len(numbers) > 1:
            listed = ", ".join(sorted(map(str, numbers)))
            raise InputError(f"{path}: its settings do not learn from equally many {kind}: "
                             f"{listed}; a comparison needs equal budgets")
    for name in ("eval_count", "max_new_tokens"):
        values = {splits["test"][1].get(name) for splits in prepared}
        if len(values) > 1:
            raise InputError(f"{path}: its settings have several --{name.replace('_', '-')}: "
                             f"{', '.join(map(str, values))}; give one to all of them")


def request(splits, lr, seed, split):
    words, settings = splits[split]
    whole = json.dumps(settings | {"lr": lr, "seed": seed, "split": split}, sort_keys=True)
    return {"key": hashlib.sha256(whole.encode()).hexdigest()[:16], "split": split, "lr": lr,
            "seed": seed, "words": [*words, f"--lr={lr:g}", f"--seed={seed}"],
            "settings": settings}
