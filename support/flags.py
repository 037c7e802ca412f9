"""The command line: train.py's recipe, the flags of any program, and where their values come from.

A flag's value comes from the command line, else from tinylora.json in the model's folder, else from
its row in RECIPE (train.py) or in PROGRAM below.
"""
import argparse
import math
import os
import sys
import time
from pathlib import Path

import torch

from support import adapter_file, fitting, frozen_dtype, ranks
from support.checkpoint import read_config
from support.checks import SHAPE, check
from support.datasets import SETS
from support.errors import InputError
from support.files import read_json
from support.hub import find_model

TOY = Path(__file__).resolve().parent.parent / "toy"


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, not argparse's page of usage
        raise InputError(f"{message}; see {self.prog} --help")

    def parse_args(self, words=None):
        args = super().parse_args(words)
        for name, value in vars(args).items():
            if value == []:  # argparse makes an empty list of --algo=--
                self.error(f"argument --{name.replace('_', '-')}: expected one argument")
        return args


def within(kind, low, high):
    """A converter for argparse: an int or float from low to high."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high:  # NaN neither
            raise ValueError
        return value
    convert.__name__ = f"{kind.__name__} from {low} to {high}"  # for argparse's message
    return convert


count = within(int, 1, 2**20)
natural = within(int, 0, 2**31)
seed = within(int, 0, 2**32 - 1)
fraction = within(float, 0, 1)
positive = within(float, 1e-9, 1e9)
nonnegative = within(float, 0, 1e9)
METAVARS = {str: "X", count: "N", natural: "N", seed: "N"}

# name, default, kind, meaning; as RECIPE in train.py
PROGRAM = [
    ("model", os.path.relpath(TOY), str, "folder in Hugging Face layout, or a hub name"),
    ("data", "gsm8k", str, "gsm8k, math, a folder of train.jsonl and test.jsonl, or a file"),
    ("eval-data", None, str, "evaluate on these instead: math500,amc23,aime24, folders, files"),
    ("task", None, str, "Python file with a task (gsm8k.py; see docs/your-own-task.md)"),
    ("instruction", None, str, "what follows each question, with its space (the task's)"),
    ("system", None, str, "system message of every prompt (the template's)"),
    ("adapter", None, str, "evaluate, or start from, this adapter.safetensors or LoRA folder"),
    ("device", None, str, "cpu, cuda or cuda:1 (cuda if there is one)"),
    ("dtype", None, ["fp32", "bf16"], "of the frozen model (bf16 where it is faster)"),
    ("engine", "fast", ["fast", "plain"], "fast/, or the plain files as they read"),
    ("eval-only", False, bool, "evaluate and stop"),
    ("eval-count", None, count, "test problems, the first N (all)"),
    ("eval-every", 0, natural, "also evaluate greedily every N steps, 0: never"),
    ("chat", False, bool, "answer questions typed in, base and --adapter side by side"),
    ("alpha", None, positive, "LoRA's scale is alpha / rank (32)"),
    ("agreement", False, bool, "lr x how far mini-batches agree (methods/agreement.py)"),
    ("sigma", 0.2, positive, "es: how far from v it looks"),
    ("samples", 4, natural, "responses in samples.jsonl, of an evaluation or of every tenth step"),
    ("rollout-rows", 256, count, "rows sampled at once"),
    ("cuda-graph", False, bool, "sample with captured decode steps (fast/graph.py)"),
    ("tokens-per-micro-batch", None, count,
     "per forward and backward (2048 on a CPU; 65536 on cuda, halved when memory runs out)"),
    ("recompute", False, bool, "activation checkpointing: less memory, a third more time"),
    ("shard", False, bool, "under torchrun: each process holds a part of the model"),
    ("out", None, str, "where the run is written (runs/<time>)"),
    ("wandb", None, str, "also log to this Weights & Biases project"),
    ("save-every", None, count, "keep the state for --resume every N steps (1; --method full 20)"),
    ("resume", None, str, "go on with the run in this folder, with its settings"),
]
# What a model folder's tinylora.json may not set: outputs, and what would run or read other files.
RESERVED = ("help", "model", "adapter", "task", "out", "eval-only", "resume", "chat", "wandb",
            "method", "device", "samples", "eval-data")
TRAINING = ("algo", "agreement", "sigma", "steps", "prompts", "group", "minibatches", "lr",
            "warmup", "temperature", "clip-low", "clip-high", "kl", "grad-clip", "reward",
            "eval-every", "v-dtype", *SHAPE, "save-every", "recompute", "tokens-per-micro-batch")
# Flags that mean nothing to an algorithm, where nothing is trained, or where nothing is written.
UNUSED = {"sft": ("kl", "reward", "temperature", "clip-low", "clip-high", "group", "sigma"),
          "es": ("minibatches", "clip-low", "clip-high", "kl", "tokens-per-micro-batch",
                 "recompute", "cuda-graph"),
          "grpo": ("sigma",),
          "eval-only": (*TRAINING, "seed", "chat", "wandb"),
          "chat": (*TRAINING, "seed", "eval-data", "eval-count", "samples", "rollout-rows", "wandb",
                   "out")}


def parser(description, recipe):
    """The argparse parser of the rows; a flag that is not given is not in its result at all."""
    cli = Parser(description=description, usage="python train.py [FLAG [VALUE]] ...",
                 formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                 argument_default=argparse.SUPPRESS)
    for title, rows in (("the recipe (train.py)", recipe), ("the program", PROGRAM)):
        group = cli.add_argument_group(title)
        for name, default, kind, meaning in rows:
            if default is not None and kind is not bool:
                head, bracket, rest = meaning.partition(" (")
                meaning = f"{head} ({default}" + (f"; {rest}" if bracket else ")")
            options = {"help": meaning.replace("%", "%%")}
            if kind is bool:
                options["action"] = "store_true"
            elif isinstance(kind, list):
                options["choices"] = kind
            else:
                options |= {"type": kind, "metavar": METAVARS.get(kind, "X")}
            group.add_argument(f"--{name}", **options)
    return cli


def parse(argv, description, recipe, rates):
    """The flags, every one resolved, as a namespace. rates: the default learning rates."""
    cli = parser(description, recipe)
    rows = {name: (default, kind) for name, default, kind, _ in [*recipe, *PROGRAM]}
    words = sys.argv[1:] if argv is None else argv
    given = typed(cli, words)
    defaults = {name: default for name, (default, _) in rows.items()}
    if "resume" in given:
        settings = resumed_settings(given, rows, cli)
        brought = {}
    else:
        check_given(given)
        check_out(given.get("out"))
        settings = defaults | given
        settings["method"] = method_of(settings, given)
        brought = folder_defaults(settings, rows, cli, given)
        settings = defaults | brought | given | {"method": settings["method"]}
    args = argparse.Namespace(**{name.replace("-", "_"): x for name, x in settings.items()})
    args.device = ranks.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check(args, given)
    on_cuda = args.device.startswith("cuda")
    args.lr = args.lr or rates[args.method]
    args.dtype = args.dtype or frozen_dtype.choose(args)
    args.out = args.out or time.strftime("runs/%Y%m%d-%H%M%S")
    args.save_every = args.save_every or (20 if args.method == "full" else 1)
    args.tokens_per_micro_batch = args.tokens_per_micro_batch or (65536 if on_cuda else 2048)
    return args


def typed(cli, words, path=None):
    """{flag: value} of a command line, or of the file that was turned into one."""
    try:
        given = {name.replace("_", "-"): x for name, x in vars(cli.parse_args(words)).items()}
        for name, value in given.items():
            if isinstance(value, str):
                check_text(name, value)
        return given
    except InputError as error:
        raise InputError(f"{path}: {error}" if path else str(error)) from None


def check_given(given):
    """Flags that were given together and mean nothing together: refused, never ignored."""
    for mode in (given.get("algo", "grpo"), *given):
        for name in UNUSED.get(mode, ()):
            if name in given:
                flag = f"--{mode}" if mode in given else f"--algo {mode}"
                raise InputError(f"--{name} means nothing to {flag}: leave it out")


def check_out(out):
    """InputError if --out holds a run already, or cannot be written: before anything is fetched."""
    if out is None:
        return
    results = ("samples.jsonl", "log.jsonl", "summary.json")
    if any((Path(out) / name).exists() for name in results):
        raise InputError(f"--out {out}: holds a run already; choose another folder")
    folder = Path(out).absolute()
    exists = next(path for path in (folder, *folder.parents) if path.exists())
    if exists.is_dir() and not os.access(exists, os.W_OK):  # a file is told by make_folder
        raise InputError(f"--out {out}: {exists} cannot be written; choose another folder")


def method_of(settings, given):
    """--method, or what --adapter was made with."""
    adapter = settings["adapter"]
    if adapter is None:
        return settings["method"]
    if not Path(adapter).exists():
        raise InputError(f"--adapter {adapter}: no such file or folder")
    # PEFT keeps a LoRA as a folder; our files say what they are
    made = "lora" if Path(adapter).is_dir() else adapter_file.read(adapter)[1]["method"]
    if given.get("method", made) != made:
        hint = "; a fully trained model is given as --model" if given["method"] == "full" else ""
        raise InputError(f"--method {given['method']}: {adapter} was made with {made}{hint}")
    return made


def folder_defaults(settings, rows, cli, given):
    """tinylora.json of the model's folder, if there is one, checked as a command line is."""
    folder = find_model(settings["model"])
    read_config(folder)  # complain of a wrong folder before any data is fetched
    path = Path(folder) / "tinylora.json"
    if not path.is_file():
        return {}
    words = []
    for key, value in read_json(path).items():
        name = key.replace("_", "-")
        if name in (*SHAPE, "lr") and settings["method"] != "tinylora":
            continue  # they are TinyLoRA's and say nothing to the other methods
        if name in SHAPE and settings["adapter"]:
            continue  # an adapter brings its own
        if name not in rows or name in RESERVED:
            raise InputError(f"{path}: {key!r} is not a flag that a model folder may set")
        kind = rows[name][1]
        text = isinstance(kind, list) or kind is str
        if isinstance(value, bool) != (kind is bool) or isinstance(value, str) != text:
            raise InputError(f"{path}: {value!r} will not do for {key!r}")
        if name == "data" and value not in SETS:
            if "data" not in given and not is_inside(path.parent, value):
                raise InputError(f"{path}: data {value!r} is not inside the model's folder")
            value = str(path.parent / value)
        words += as_words(name, value)
    return typed(cli, words, path)


def is_inside(folder, data):
    """True if the data lie in the folder even after all symbolic links are followed."""
    try:
        places = [(folder / data / name).resolve() for name in ("", "train.jsonl", "test.jsonl")]
        return all(place.is_relative_to(folder.resolve()) for place in places)
    except (OSError, RuntimeError, ValueError):  # a circle of links, a zero byte
        return False


def as_words(name, value):
    """A setting as it would be typed; nothing for what is not set."""
    if value is None or value is False:
        return []
    return [f"--{name}"] if value is True else [f"--{name}={value}"]


def resumed_settings(given, rows, cli):
    """The settings of the run in --resume: its config.json, read as a command line again."""
    folder = given["resume"]
    beside = sorted(set(given) - {"resume", "device", "steps"})
    if beside:
        raise InputError(f"--resume goes on with the run's settings: leave out "
                         f"{' '.join('--' + name for name in beside)}")
    path = Path(folder) / "config.json"
    config = read_json(path)
    if config.get("eval_only"):
        raise InputError(f"--resume {folder}: was an evaluation; start it anew")
    if config.get("shuffled"):
        raise InputError(f"--resume {folder}: was a control (tools.shuffled), which would go on "
                         f"with real rewards; start it anew")
    words = []
    for name in rows:
        words += as_words(name, config.get(name.replace("-", "_")))
    settings = {name: default for name, (default, _) in rows.items()} | typed(cli, words, path)
    if settings["steps"] is None:
        raise InputError(f"{path}: does not say how many steps the run has")
    if given.get("steps", math.inf) < settings["steps"]:
        raise InputError(f"--steps {given['steps']}: the run in {folder} has {settings['steps']} "
                         f"steps already; give more")
    if given.get("steps") and settings["steps"]:  # as many warm-up updates as when it began
        settings["warmup"] *= settings["steps"] / given["steps"]
    return settings | given | {"out": folder}


def check_text(name, value):
    """InputError for bytes that are no text: Python hands them over as half surrogate pairs.

    A zero byte, which only a file can bring, is in no path.
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"--{name}: is not valid UTF-8") from None
    if "\0" in value:
        raise InputError(f"--{name}: holds a zero byte")


def settle(args, scores, train_rows):
    """The defaults that depend on the task or on the GPU; InputError if they do not fit."""
    args.reward = args.reward or scores[0]
    if args.reward not in scores:
        raise InputError(f"--reward {args.reward}: the task's scores are {', '.join(scores)}")
    if args.steps is None:
        args.steps = max(1, 3 * len(train_rows) // args.prompts)
    if args.algo == "sft" and not all(row.get("solution") for row in train_rows):
        raise InputError(f"--algo sft: {args.data} has problems without a worked solution to "
                         f"learn from")
    if args.device.startswith("cuda"):
        fitting.lower(args)
