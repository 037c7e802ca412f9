"""The command line: every flag of train.py with its default, and what may not go together.

Where a flag is not given, tinylora.json in the model's folder decides, if there is one; else the paper's recipe. The defaults
of such a file are TinyLoRA's: its learning rate says nothing to the other methods, which have their own below.
"""
import argparse
import functools
import os
import sys
import time
from pathlib import Path

import torch

import ranks
import tinylora
from files import InputError, read_json

TOY = Path(__file__).resolve().parent / "toy"
LR = {"tinylora": 1.6e-4, "lora-xs": 1.6e-4, "lora": 2e-5, "full": 1e-6}  # the first: the fork's 1e-5 at its scale of 16
RESERVED = ("help", "model", "adapter", "out", "eval_only", "resume", "chat", "wandb", "tensorboard", "method")  # what tinylora.json may not set
SHAPE = ("params", "u", "n_tie", "tie", "rank", "alpha")  # the flags that say how many numbers there are, and
TAKES = {"tinylora": SHAPE[:5], "lora-xs": ("rank",), "lora": ("rank", "alpha"), "full": ()}  # who takes which


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one clear line, not argparse's page of usage
        raise InputError(f"{message}; see python {self.prog} --help")


def within(kind, low, high=2.0**63):
    """A converter for argparse: an int or float from low to high."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high:  # NaN neither
            raise ValueError
        return value
    convert.__name__ = f"{kind.__name__} from {low}"  # argparse puts this into its message
    return convert


count, whole, fraction, positive = within(int, 1), within(int, 0), within(float, 0, 1), within(float, 1e-9, 1e9)


def parse(argv, description=""):
    """The flags, every one resolved: command line, then the model folder's tinylora.json, then the defaults below."""
    cli = Parser(description=description, usage="python train.py [FLAG [VALUE]] ...", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = cli.add_argument_group("model and data").add_argument
    add("--model", default=os.path.relpath(TOY), metavar="M", help="folder in Hugging Face layout, or a hub name (toy/)")
    add("--data", default="gsm8k", metavar="D", help="gsm8k, or a folder with train.jsonl and test.jsonl, or with --eval-only one .jsonl file (gsm8k)")
    add("--system", default=None, metavar="TEXT", help="system message of every prompt (the template's own)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="X", help="cpu, cuda or cuda:1 (cuda if there; under torchrun each rank has its own)")
    add("--dtype", default=None, choices=["fp32", "bf16"], help="of the frozen model (bf16 on cuda, fp32 on cpu)")
    add = cli.add_argument_group("what is trained (tinylora.py, lora.py)").add_argument
    add("--method", default=None, choices=list(LR), help="tinylora, or what the paper compares it with (tinylora)")
    add("--params", type=count, default=None, metavar="N", help="how many numbers to train, exactly (13)")
    add("--u", type=count, default=None, metavar="N", help="numbers per group (1 unless --params > modules)")
    add("--n-tie", type=count, default=None, metavar="N", help="modules (tiled) or layers (structured) per group")
    add("--tie", default=None, choices=["tiled", "structured"], help="which modules share (tiled)")
    add("--rank", type=count, default=None, metavar="R", help="of the SVD directions (2), or of LoRA (1)")
    add("--alpha", type=positive, default=None, metavar="X", help="LoRA's scale is alpha / rank (32)")
    add("--v-dtype", default="fp32", choices=list(tinylora.DTYPES), help="of the trained numbers, kept and saved (fp32)")
    add("--seed", type=within(int, 0, 2**32 - 1), default=0, metavar="N", help="of P (an --adapter brings its own), the problems' order and the sampling (0)")
    add("--adapter", default=None, metavar="A", help="evaluate, or start from, this adapter.safetensors or LoRA folder")
    add = cli.add_argument_group("learning (grpo.py)").add_argument
    add("--algo", default="grpo", choices=["grpo", "es", "sft"], help="by gradients of rewards; by search without gradients (es.py); on the data's own worked solutions (grpo)")
    add("--sigma", type=positive, default=0.2, metavar="X", help="es: how far from v it looks (0.2)")
    add("--steps", type=whole, default=None, metavar="N", help="training steps (3 epochs of the training set)")
    add("--prompts", type=count, default=64, metavar="P", help="problems a step (64)")
    add("--group", type=count, default=4, metavar="G", help="responses to each problem (4)")
    add("--minibatches", type=count, default=2, metavar="K", help="Adam updates a step (2)")
    add("--lr", type=positive, default=None, metavar="X", help="learning rate (" + ", ".join(f"{k} {x:g}" for k, x in LR.items()) + ")")
    add("--warmup", type=fraction, default=0.05, metavar="X", help="share of updates with rising lr, then constant (0.05)")
    add("--temperature", type=positive, default=1.0, metavar="T", help="of sampling, in sampler and trainer alike (1.0)")
    add("--max-new-tokens", type=count, default=1024, metavar="N", help="longest response (1024; in the paper up to 4096)")
    add("--clip-low", type=fraction, default=0.2, metavar="X", help="the ratio's clip below 1 (0.2)")
    add("--clip-high", type=positive, default=0.4, metavar="X", help="the ratio's clip above 1 (0.4)")
    add("--kl", type=within(float, 0, 1e9), default=0.0, metavar="X", help="weight of the KL to the base (0; for MATH: 0.001)")
    add("--grad-clip", type=positive, default=1.0, metavar="X", help="largest gradient norm (1.0)")
    add("--reward", default="strict", choices=["strict", "lenient", "format"], help='pays for "#### 7" only, for the last number too, or for any "#### <number>" (strict)')
    add = cli.add_argument_group("evaluation, memory, output").add_argument
    add("--eval-count", type=count, default=None, metavar="N", help="test problems, the first N (all)")
    add("--eval-every", type=whole, default=0, metavar="K", help="also evaluate greedily every K steps (0: never)")
    add("--eval-only", action="store_true", help="evaluate and stop")
    add("--chat", action="store_true", help="answer questions typed in, base and --adapter side by side")
    add("--rollout-rows", type=count, default=256, metavar="N", help="sequences sampled at once (256)")
    add("--cuda-graph", action="store_true", help="sample with captured decode steps (graph.py; off)")
    add("--tokens-per-micro-batch", type=count, default=None, metavar="N", help="per forward and backward (2048 on a CPU; 65536 on cuda, halved when memory runs out, until it fits)")
    add("--recompute", action="store_true", help="activation checkpointing: less memory, 1/3 more time")
    add("--out", default=None, metavar="DIR", help="where the run is written (runs/<time>)")
    add("--wandb", default=None, metavar="PROJECT", help="also log to Weights & Biases (off; needs wandb)")
    add("--tensorboard", action="store_true", help="also write the log for TensorBoard, to --out (off; needs tensorboard)")
    add("--save-every", type=count, default=None, metavar="K", help="keep the state for --resume every K steps (1; 20 for --method full: 12 bytes a weight)")
    add("--resume", default=None, metavar="DIR", help="go on with the run in DIR, with its own settings; only --device may be given beside it")
    args = cli.parse_args(argv)
    if args.resume:
        return resumed(cli, args, sys.argv[1:] if argv is None else argv)
    check(args)  # before anything is fetched
    defaults = Path(find_model(args.model)) / "tinylora.json"
    if defaults.is_file():
        known = {action.dest: action for action in cli._actions}
        for key, value in read_json(defaults).items():
            name = key.replace("-", "_")
            if name in (*SHAPE, "lr") and args.method != "tinylora":
                continue
            if name not in known or name in RESERVED:
                raise InputError(f"{defaults}: {key!r} is not a flag that a model folder may set")
            action = known[name]
            text = not action.type and not action.choices and action.nargs != 0
            if (action.choices and value not in action.choices) or (action.nargs == 0) != isinstance(value, bool) or (text and not isinstance(value, str)):
                raise InputError(f"{defaults}: {value!r} will not do for {key!r}")
            if name == "data" and value != "gsm8k":
                value = str(defaults.parent / value)  # a folder, beside the file that names it
            cli.set_defaults(**{name: str(value) if action.type else value})  # text, which argparse checks and converts
    args = cli.parse_args(argv)
    check(args)
    args.lr = args.lr or LR[args.method]
    args.dtype = args.dtype or ("bf16" if args.device.startswith("cuda") and args.method != "full" else "fp32")
    args.out = args.out or time.strftime("runs/%Y%m%d-%H%M%S")
    args.save_every = args.save_every or (20 if args.method == "full" else 1)
    return args


def resumed(cli, args, argv):
    """The flags of the run in --resume: its config.json, turned into a command line again, so that argparse checks it too."""
    beside = {word.split("=")[0] for word in argv if word.startswith("--")} - {"--resume", "--device"}
    if beside:
        raise InputError(f"--resume goes on with the run's own settings: leave out {' '.join(sorted(beside))}")
    config = read_json(Path(args.resume) / "config.json")
    if config.get("eval_only"):
        raise InputError(f"--resume {args.resume}: was an evaluation; start it anew")
    own = {"save_every": 1} | {name: config[name] for name in vars(args) if config.get(name) is not None and config[name] is not False}
    own |= {"out": args.resume, "resume": args.resume}
    if "--device" in {word.split("=")[0] for word in argv}:
        own["device"] = args.device
    args = cli.parse_args([f"--{name.replace('_', '-')}" + ("" if x is True else f"={x}") for name, x in own.items()])
    check(args)
    return args


def check(args):
    """What argparse cannot see in one flag alone; settles --method."""
    if args.adapter:
        if not Path(args.adapter).exists():
            raise InputError(f"--adapter {args.adapter}: no such file or folder")
        # PEFT keeps a LoRA as a folder; our own files say what they are
        made = "lora" if Path(args.adapter).is_dir() else tinylora.read(args.adapter)[1]["method"]
        if args.method not in (None, made):
            raise InputError(f"--method {args.method}: {args.adapter} was made with {made}"
                             + ("; a fully trained model is given as --model" if args.method == "full" else ""))
        args.method = made
    args.method = args.method or "tinylora"
    for name in SHAPE:
        if getattr(args, name) is not None and name not in TAKES[args.method]:
            raise InputError(f"--{name.replace('_', '-')} means nothing to --method {args.method}")
    if args.method == "full" and args.dtype == "bf16":
        raise InputError("--dtype bf16: --method full trains the weights themselves, and small steps round away in bf16; leave it out")
    if args.algo == "es" and (args.method not in ("tinylora", "lora-xs") or args.group % 2 or args.kl):
        raise InputError("--algo es: searches over v (--method tinylora or lora-xs), in pairs (an even --group), one update a step, without --kl")
    if args.group < 2 and args.algo == "grpo" and not args.eval_only:
        raise InputError("--group 1: an advantage compares the responses to one problem, so a group needs at least 2")
    if args.prompts % (args.minibatches * ranks.SIZE):
        raise InputError(f"--prompts {args.prompts} cannot be split into --minibatches {args.minibatches}" + (f" of {ranks.SIZE} equal shares, one for each rank" if ranks.SIZE > 1 else ""))
    args.device = ranks.device(args.device)
    if args.out and not args.resume and any((Path(args.out) / name).exists() for name in ("samples.jsonl", "log.jsonl", "summary.json")):
        raise InputError(f"--out {args.out}: holds a run already; choose another folder")
    if args.out:
        folder = Path(args.out).absolute()
        exists = next(path for path in (folder, *folder.parents) if path.exists())
        if exists.is_dir() and not os.access(exists, os.W_OK):  # a file in its place is told by make_folder
            raise InputError(f"--out {args.out}: {exists} cannot be written; choose another folder")
    if args.cuda_graph and (not args.device.startswith("cuda") or args.algo == "es"):
        raise InputError("--cuda-graph: is for --device cuda, and --algo es (a v for every row) samples without")
    try:
        if not args.device.startswith(("cpu", "cuda")):
            raise RuntimeError("only cpu and cuda are supported")
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {args.device}: not to be had here ({str(error).splitlines()[0]})") from None


@functools.cache  # the flags ask for the folder's tinylora.json, then the model itself: for a name on the hub, one look and not two
def find_model(name):
    """A folder as it is; owner/name from the hub's cache or, online, the hub: config, tokenizer and safetensors only."""
    if Path(name).exists():
        return name
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"--model {name}: no such folder")  # before GSM8K is fetched for nothing
    from huggingface_hub import snapshot_download  # comes with tokenizers; only a hub name needs it
    from huggingface_hub.utils import disable_progress_bars, logging
    logging.set_verbosity_error()  # no lines about retries and missing tokens: what fails in the end is told below
    if not sys.stderr.isatty():
        disable_progress_bars()  # the library's own bars ask for a terminal only in part
    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"],
                                 ignore_patterns=["*/*", "*[!s].index.json"])  # no subfolders; no index of pytorch_model.bin
    except Exception as error:  # offline, no such repository, no access, a full disk: all reported the same way
        reason = " ".join(str(error).split())  # the library writes paragraphs, and what is missing is seldom in the first line
        raise InputError(f"--model {name}: neither a folder here nor to be had from the hub; check the name, the network and, for a gated model, "
                         f"HF_TOKEN ({type(error).__name__}: {reason})") from None
