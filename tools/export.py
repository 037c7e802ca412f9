"""What an adapter is, and adapters in the forms that other programs load:

    python -m tools.export show ADAPTER
    python -m tools.export export ADAPTER --to peft|merged --out DIR

    peft    an ordinary LoRA of TinyLoRA's rank, exactly equal to it: B = U S, A = R V^T, alpha = r.
            PEFT, vLLM and llama.cpp load it.
    merged  the whole model with W + U S R V^T in place of W. In bf16 much of so small an update is
            lost to rounding; what is printed says how much.

The base model is looked for where the adapter's file says it was; --model says where else.
"""
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # also as python /path/to/tools/export.py, from any folder

import torch

import fast
import model as transformer
import tinylora
from methods import lora
from support.adapter_file import DTYPES, read
from support.errors import InputError
from support.files import make_folder, read_json
from support.flags import Parser
from support.hub import find_model
from support.program import run_main
from support.terminal import printable
from tools.card import write_card

SHOWN = 28  # numbers of v that `show` prints


@torch.no_grad()
def factors(model):
    """The TinyLoRA on `model` as LoRA factors, delta W = B A, in fp32.

    {module name: (A (r, d_in), B (d_out, r))}
    """
    pairs = {}
    for name, module in model.named_modules():
        if isinstance(module, tinylora.TinyLoRALinear):
            pairs[name] = (module.R() @ module.Vt.float(), module.US.float())
    return pairs


@torch.no_grad()
def merge(model, dtype):
    """The weights of an adapted model with delta W added in fp32, then rounded to `dtype`.

    Returns ({name: weight}, unchanged, lost): the share of the weights with an update that
    rounding left as they were, and the part of the update's norm that it took away.
    """
    pairs = factors(model)
    dtype = DTYPES[dtype]
    state = {}
    unchanged = 0  # weights
    total = 0  # weights that have an update
    lost = 0.0  # square of a norm
    wanted = 0.0
    for name, weight in model.named_parameters():
        if name.endswith(".v"):
            continue
        module = name.removesuffix(".base.weight")
        if module in pairs:
            A, B = pairs[module]
            delta = B @ A
            merged = (weight.float() + delta).to(dtype)
            before = weight.to(dtype)
            error = merged.double() - before.double() - delta.double()
            unchanged += ((merged == before) & (delta != 0)).sum().item()
            total += delta.count_nonzero().item()
            lost += error.square().sum().item()
            wanted += delta.double().square().sum().item()
            weight = merged
        state[name.replace(".base.", ".")] = weight
    return state, unchanged / max(total, 1), (lost / wanted)**0.5 if wanted else 0.0


def find_base(args):
    """The base model's name: --model, or what the adapter's file says; and its folder."""
    if args.model:
        return args.model, find_model(args.model)
    hint = read(args.adapter)[1]["model"]
    if not hint:
        raise InputError(f"{args.adapter}: does not say which model it was made for; "
                         f"give it as --model")
    if not Path(hint).exists() and (ROOT / hint).is_dir():  # a path as the project's folder has it
        hint = str(ROOT / hint)
    try:
        return hint, find_model(hint)
    except InputError:
        raise InputError(f"{args.adapter}: was made for the model {hint!r}, which is neither a "
                         f"folder here nor to be had from the hub; say with --model where it is") \
            from None


def base_dtype(folder):
    """The type of a model folder's weights, as its config.json says; fp32 if it does not."""
    config = read_json(Path(folder) / "config.json")
    stored = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    names = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
    return names.get(stored, "fp32")


def size(count):
    """A number of bytes in words: 26 bytes, 2.5 MB."""
    if count < 1000:
        return f"{count} bytes"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 1000:
            break
    return f"{count:.1f} {unit}"


def export(args):
    out = Path(args.out)
    if Path(args.adapter).is_dir():
        read_json(Path(args.adapter) / "adapter_config.json")  # InputError: any other folder
        raise InputError(f"{args.adapter}: is a LoRA in PEFT's format already; use it as it is")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: exists and is not an empty folder; choose another")
    v, settings = read(args.adapter)
    name, folder = find_base(args)
    dtype = args.dtype or (base_dtype(folder) if args.to == "merged" else "fp32")
    # in fp32: bf16 weights become the same numbers, and delta W is not rounded on the way
    model = transformer.load(folder)
    tinylora.load(args.adapter, model, fast.svd)
    make_folder(out)
    base = lora.portable_name(name)
    if args.to == "peft":
        rank = settings["rank"]
        fingerprint = model.adapter["base"]
        lora.write_peft(out, factors(model), rank, rank, dtype, base, fingerprint)
        lora.copy_files(folder, out, lora.TOKENIZER_FILES)
        print(printable(f"{out}: a LoRA of rank {rank} for {base[:200]}, in {dtype}; "
                        f"peft.PeftModel.from_pretrained(model, {str(out)!r}) loads it"))
        weights = "adapter_model.safetensors"
    else:
        state, unchanged, lost = merge(model, dtype)
        lora.save_model(out, state, folder, dtype)
        print(printable(
            f"{out}: {base[:200]} with the update merged, in {dtype}. Rounding left "
            f"{unchanged:.1%} of the weights it should change as they were; what is left of the "
            f"update is off by {lost:.1%} of its size"))
        weights = "model.safetensors"
    grown = size((out / weights).stat().st_size)
    print(f"{v.numel()} numbers, {size(v.nbytes)}, have become {grown}")
    write_card(out, args, base, v, settings, dtype)


def show(args):
    """What an adapter file or a LoRA's folder is, for a reader; needs no model."""
    path = Path(args.adapter)
    if path.is_dir():
        config = read_json(path / "adapter_config.json")
        print(printable(f"{path}: a LoRA in PEFT's format, rank {config.get('r')!r}, "
                        f"alpha {config.get('lora_alpha')!r}, "
                        f"for the model {config.get('base_model_name_or_path')!r}"))
        return
    v, settings = read(path)
    dtype = {x: name for name, x in DTYPES.items()}[v.dtype]
    n_tie = f", n_tie {settings['n_tie']}" if settings["n_tie"] else ""
    P = "R = v"
    if settings["method"] == "tinylora":
        P = f"random P of seed {settings['seed']}"
    # repr: the file may say anything
    base = repr(settings["model"][:200]) if settings["model"] else "not named"
    numbers = " ".join(f"{x:+.4g}" for x in v[:SHOWN].tolist())
    more = " ..." if v.numel() > SHOWN else ""
    print(printable(f"{path}: {settings['method']}, {v.numel()} trained numbers in {dtype}: "
                    f"{v.nbytes} bytes, in a file of {path.stat().st_size}"))
    print(f"numbers     {settings['groups']} {settings['tie']} ties x u {settings['u']}{n_tie}")
    which = settings.get("directions", "top")
    directions = "" if which == "top" else f" ({which} directions)"
    print(f"rebuilt     from the base model's SVD of rank {settings['rank']}{directions} and {P}, "
          f"on {settings['targets'][:200]!r}")
    print(f"base model  {base}, fingerprint {settings['base'][:12]!r}...")
    print(f"v           |v| = {v.double().norm():.4g}: {numbers}{more}")


def parse(argv):
    cli = Parser(prog="python -m tools.export", description=__doc__, allow_abbrev=False,
                 formatter_class=RawDescriptionHelpFormatter)
    commands = cli.add_subparsers(dest="command", required=True, metavar="show|export")
    for name, meaning in (("show", "what an adapter is"), ("export", "write it in another form")):
        command = commands.add_parser(name, help=meaning, description=meaning, allow_abbrev=False)
        command.add_argument("adapter", metavar="ADAPTER", help="adapter.safetensors of a run")
    command.add_argument("--to", required=True, choices=["peft", "merged"])
    command.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    command.add_argument("--model", metavar="M", help="the base model: a folder or a hub name")
    command.add_argument("--dtype", choices=list(DTYPES),
                         help="of the numbers written (peft: fp32; merged: the base model's)")
    return cli.parse_args(argv)


def main(argv=None):
    """Returns the exit code: 0, or 2 (a mistake of the user's, told in one line)."""
    return run_main(lambda: parse(argv),
                    lambda args: show(args) if args.command == "show" else export(args))


if __name__ == "__main__":
    sys.exit(main())
