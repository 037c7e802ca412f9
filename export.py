"""What an adapter is, and adapters for the tools people have:

    python tinylora.py show ADAPTER
    python tinylora.py export ADAPTER --to peft|merged --out DIR

    peft    an ordinary LoRA of TinyLoRA's rank, exactly equal to it: B = U S, A = R V^T, alpha = r. PEFT, vLLM, llama.cpp load it.
    merged  the whole model with W + U S R V^T for W. In bf16 much of so small an update rounds away: the report says how much.

The base model is looked for where the adapter's own file says it was; --model says where else.
"""
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import torch

import lora
import model as transformer
import tinylora
from files import InputError, read_json
from flags import Parser, find_model


@torch.no_grad()
def factors(model):
    """The TinyLoRA on `model` as LoRA factors: {module name: (A (r, d_in), B (d_out, r))}, fp32, delta W = B A."""
    modules = {name: m for name, m in model.named_modules() if isinstance(m, tinylora.TinyLoRALinear)}
    return {name: (m.core() @ m.Vt.float(), m.US.float()) for name, m in modules.items()}


@torch.no_grad()
def merge(model, dtype):
    """The weights of an adapted model with delta W added in fp32, then rounded: (state by name, report).

    report: of all delta W together, the share whose rounding left the weight unchanged, and |rounded - wanted| / |wanted|.
    """
    pairs, state = factors(model), {}
    unchanged = total = lost = wanted = 0.0
    for name, weight in model.named_parameters():
        module = name.removesuffix(".base.weight")
        if name.endswith(".v"):
            continue
        if module in pairs:
            A, B = pairs[module]
            delta = B @ A
            merged = (weight.float() + delta).to(tinylora.DTYPES[dtype])
            kept = weight.to(tinylora.DTYPES[dtype])
            error = merged.double() - kept.double() - delta.double()
            unchanged += ((merged == kept) & (delta != 0)).sum().item()
            total += delta.count_nonzero().item()
            lost, wanted = lost + error.square().sum().item(), wanted + delta.double().square().sum().item()
            weight = merged
        state[name.replace(".base.", ".")] = weight
    return state, {"unchanged": unchanged / max(total, 1), "lost": (lost / wanted)**0.5 if wanted else 0.0}


def export(args):
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: is there already and not an empty folder; choose another")
    name = args.model or tinylora.read(args.adapter)[1]["model"]
    if not name:
        raise InputError(f"{args.adapter}: does not say which model it was made for; give it as --model")
    folder = find_model(name)
    model = transformer.load(folder)  # in fp32: bf16 weights become the same numbers, and delta W is not rounded on the way
    tinylora.load(args.adapter, model)
    rank = model.adapter["rank"]
    if args.to == "peft":
        lora.write_peft(out, factors(model), rank, rank, args.dtype, name)
        print(f"{out}: a LoRA of rank {rank} for {name}; peft.PeftModel.from_pretrained(model, {str(out)!r}) loads it")
    else:
        state, report = merge(model, args.dtype)
        lora.save_model(out, state, folder, args.dtype)
        print(f"{out}: {name} with the update merged, in {args.dtype}. Rounding left {report['unchanged']:.1%} of the weights it should change "
              f"as they were; what is left of the update is off by {report['lost']:.1%} of its size")


def show(path):
    """What an adapter file or a LoRA's folder is, for a reader; needs no model."""
    if Path(path).is_dir():  # PEFT's
        config = read_json(Path(path) / "adapter_config.json")
        print(f"{path}: a LoRA in PEFT's format, rank {config.get('r')!r}, alpha {config.get('lora_alpha')!r}, for the model {config.get('base_model_name_or_path')!r}")
        return
    v, settings = tinylora.read(path)
    dtype = {x: name for name, x in tinylora.DTYPES.items()}[v.dtype]
    print(f"{path}: {settings['method']}, {v.numel()} trained numbers in {dtype}: {v.nbytes} bytes, in a file of {Path(path).stat().st_size}")
    print(f"numbers     {settings['groups']} {settings['tie']} groups x u {settings['u']}" + (f", n_tie {settings['n_tie']}" if settings["n_tie"] else ""))
    P = f"random P of seed {settings['seed']}" if settings["method"] == "tinylora" else "R = v"
    print(f"rebuilt     from the base model's SVD of rank {settings['rank']} and {P}, on {settings['targets'][:200]!r}")  # !r: the file may say anything
    print(f"base model  {repr(settings['model'][:200]) if settings['model'] else 'not named'}, fingerprint {settings['base'][:12]!r}...")
    shown = " ".join(f"{x:+.4g}" for x in v[:28].tolist())
    print(f"v           |v| = {v.double().norm():.4g}: {shown}" + (" ..." if v.numel() > 28 else ""))


def main(argv=None):
    """Exit codes: 0, or 2 (a mistake of the user's, told in one line)."""
    cli = Parser(prog="tinylora.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    cli.add_argument("command", choices=["show", "export"])
    cli.add_argument("adapter", metavar="ADAPTER", help="an adapter.safetensors that train.py wrote")
    cli.add_argument("--to", choices=["peft", "merged"])
    cli.add_argument("--out", metavar="DIR", help="a new folder")
    cli.add_argument("--model", metavar="M", help="the base model: a folder or a name on the hub")
    cli.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="of the numbers written (fp32)")
    try:
        args = cli.parse_args(argv)
        if args.command == "show":
            show(args.adapter)
            return 0
        if not (args.to and args.out):
            raise InputError("export needs --to peft or --to merged, and --out DIR")
        export(args)
        return 0
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
