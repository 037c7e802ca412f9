"""What the paper compares TinyLoRA with: LoRA (Hu et al., arXiv 2106.09685) and full finetuning.

    lora   y = W x + (alpha / r) B A x    A (r, d_in) random, B (d_out, r) zeros, both trained,
                                          on the same 7 linears of every block
    full   every weight is trained        in fp32, because a step of 1e-6 rounds away in bf16

Both start at the base model (on a CPU bit for bit), and are saved as their users expect: a LoRA as
the folder that PEFT and vLLM load, a fully trained model as an ordinary model folder. (LoRA-XS, the
third, is TinyLoRA with other settings.)
"""
import math
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file

from support.adapter_file import check_base
from support.errors import InputError
from support.files import make_folder, open_tensors, read_json, replacing, write_json
from support.params import not_none
from tinylora import DTYPES, TARGETS, added, fingerprint

PREFIX = "base_model.model.model."  # PEFT's, before the names of this project's modules
# Fields of adapter_config.json that change what is computed, with the values that this file knows.
PLAIN = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
         "use_dora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}}
# The text side of a model folder, which a LoRA's folder gets too.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")


class LoRALinear(nn.Module):
    """A frozen nn.Linear plus (alpha / r) B A; A (r, d_in) as given, B (d_out, r) zeros, fp32."""

    def __init__(self, base, A, alpha):
        super().__init__()
        self.base = base
        self.scale = alpha / len(A)
        self.A = nn.Parameter(A.to(base.weight.device, torch.float32))
        self.B = nn.Parameter(self.A.new_zeros(len(base.weight), len(A)))

    def forward(self, x):  # (..., d_in) -> (..., d_out)
        h = F.linear(x.to(self.A.dtype), self.A)  # (..., r)
        h = F.linear(h, self.B * self.scale)  # (..., d_out)
        return added(self.base, x, h.to(x.dtype))


def start(model, args):
    """The tensors that --method lora or full trains, as --adapter brings them or anew."""
    if args.method == "full":
        return full(model)
    if args.adapter:
        return load(args.adapter, model)
    return adapt(model, seed=args.seed, **not_none(rank=args.rank, alpha=args.alpha))


def save_run(model, args, folder):
    """Write what a run has learned into its folder; returns the path. folder: the base model's."""
    if args.method == "full":
        path = Path(args.out) / "model"
        save_model(path, model.state_dict(), folder, args.v_dtype)
    else:
        path = Path(args.out) / "adapter"
        save(path, model, args.v_dtype, portable_name(args.model))
        copy_files(folder, path, TOKENIZER_FILES)
    return path


def adapt(model, rank=1, alpha=32.0, seed=0):
    """Freeze the model and put a LoRALinear in the place of all 7 linears of every block.

    Returns [A, B, A, B, ...]. A is uniform within 1 / sqrt(d_in), as PEFT starts it, from a numpy
    stream per module. InputError: the rank does not fit.
    """
    base = fingerprint(model)
    model.requires_grad_(False)
    params = []
    places = [(layer, target) for layer in model.layers for target in TARGETS]
    for index, (layer, target) in enumerate(places):
        linear = layer.get_submodule(target)
        d_out, d_in = linear.weight.shape
        if rank > min(d_out, d_in):
            raise InputError(f"--rank {rank} does not fit a weight of shape {d_out} x {d_in}: "
                             f"use 1 to {min(d_out, d_in)}")
        A = np.random.RandomState([5, seed, index, 0]).uniform(-1, 1, (rank, d_in))
        module = LoRALinear(linear, torch.from_numpy(A / math.sqrt(d_in)), alpha)
        layer.set_submodule(target, module)
        params += [module.A, module.B]
    model.adapter = {"method": "lora", "rank": rank, "alpha": alpha, "seed": seed, "base": base}
    return params


def full(model):
    """Every weight is trained; returns them. A tied head is the embedding table, once."""
    model.adapter = {"method": "full", "base": fingerprint(model)}
    return list(model.requires_grad_(True).parameters())


def modules_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def peft_names(modules):
    """PEFT's tensor names for the modules' A and B, in the order A, B, A, B, ..."""
    return [f"{PREFIX}{name}.lora_{letter}.weight" for name in modules for letter in "AB"]


def save(folder, model, dtype="fp32", base=""):
    """The LoRA on `model` as PEFT's folder. base: the model's name or path, for its readers."""
    factors = {name: (module.A, module.B) for name, module in modules_of(model).items()}
    settings = model.adapter
    write_peft(folder, factors, settings["rank"], settings["alpha"], dtype, base,
               settings["base"])


def write_peft(folder, factors, rank, alpha, dtype, base, fingerprint):
    """adapter_config.json and adapter_model.safetensors, as PEFT writes them.

    factors: {module name: (A (r, d_in), B (d_out, r))}. fingerprint: the base model's, for `load`.
    """
    folder = Path(folder)
    config = PLAIN | {
        "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": alpha,
        "target_modules": sorted(target.split(".")[1] for target in TARGETS),
        "lora_dropout": 0.0, "inference_mode": True}
    tensors = [x for pair in factors.values() for x in pair]
    make_folder(folder)
    write_weights(folder / "adapter_model.safetensors",
                  dict(zip(peft_names(factors), tensors)), dtype, base=fingerprint)
    write_json(folder / "adapter_config.json", config)


@torch.no_grad()
def load(folder, model):
    """Put a PEFT LoRA on a bare model; returns its tensors, as adapt does.

    InputError says what is missing, damaged or not supported, and whether the base model is another
    one than a LoRA of this project was made for (PEFT's do not say).
    """
    folder = Path(folder)
    config_path = folder / "adapter_config.json"
    config = read_json(config_path)
    for field, value in PLAIN.items():
        if config.get(field, value) not in (value, None):
            raise InputError(f"{config_path}: {field} is {config[field]!r}; "
                             f"only {value!r} is supported")
    rank = config.get("r")
    alpha = config.get("lora_alpha")
    # `type`, because True is an int too
    numbers = type(rank) is int and type(alpha) in (int, float)
    if not numbers or rank < 1 or not 1e-9 <= alpha <= 1e9:
        raise InputError(f"{config_path}: r is {rank!r} and lora_alpha {alpha!r}; "
                         f"both must be positive numbers")
    path = folder / "adapter_model.safetensors"
    if not path.is_file():  # a pipe would keep us waiting
        raise InputError(f"{path}: no such file")
    try:
        with open_tensors(path) as file:
            made_for = (file.metadata() or {}).get("base")
            state = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read as an adapter ({error})") from None
    params = adapt(model, rank, alpha)
    if made_for:
        check_base(path, made_for, config.get("base_model_name_or_path"), model.adapter["base"])
    model.adapter["seed"] = None  # PEFT's files do not say
    names = peft_names(modules_of(model))
    if set(names) != set(state):
        odd = sorted(set(names) ^ set(state))
        raise InputError(f"{path}: does not hold A and B of all 7 linears of {len(model.layers)} "
                         f"layers and nothing else; the first odd one is {odd[0]}")
    for p, name in zip(params, names):
        stored = state[name]
        if p.shape != stored.shape:
            raise InputError(f"{path}: {name} has shape {tuple(stored.shape)}, "
                             f"this model and r make it {tuple(p.shape)}")
        if not stored.is_floating_point() or not stored.isfinite().all():
            raise InputError(f"{path}: {name} must hold finite floating-point numbers")
        p.copy_(stored)
    return params


def save_model(folder, state, source, dtype):
    """Weights by this project's names -> a model folder like `source`, with its text side."""
    folder = Path(folder)
    source = Path(source)
    make_folder(folder)
    named = {name if name.startswith("lm_head") else f"model.{name}": x
             for name, x in state.items()}
    write_weights(folder / "model.safetensors", named, dtype)
    # not the index of shards; and the defaults in tinylora.json belong to the folder they are in
    left_out = ("config.json", "model.safetensors.index.json", "tinylora.json")
    others = [path.name for path in (*source.glob("*.json"), *source.glob("*.jinja"))]
    copy_files(source, folder, [name for name in (*others, "merges.txt") if name not in left_out])
    config = read_json(source / "config.json")
    config.pop("dtype", None)  # transformers 5's name for torch_dtype
    config["torch_dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
    write_json(folder / "config.json", config)


def write_weights(path, state, dtype, **more):
    """A safetensors file of the tensors, as `dtype`, readable by whom any new file is.

    more: entries of its header.
    """
    state = {name: x.detach().to("cpu", DTYPES[dtype]).contiguous() for name, x in state.items()}
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(state, temporary, more | {"format": "pt"})  # makes its own file, of mode 0600
        temporary.chmod(mode)


def copy_files(source, folder, names):
    """Copy those of the files that `source` has."""
    for name in names:
        path = Path(source) / name
        if path.is_file():
            with replacing(Path(folder) / name) as temporary:
                shutil.copyfile(path, temporary)


def portable_name(model):
    """A model's name that holds in any working directory: an absolute path, or its hub name."""
    return str(Path(model).resolve()) if Path(model).exists() else model
