"""What the paper compares TinyLoRA with: LoRA (Hu et al., arXiv 2106.09685) and full finetuning.

    LoRA   y = W x + (alpha / r) B A x      A (r, d_in) random, B (d_out, r) zeros, both trained, on the same 7 linears
    full   every weight is trained          in fp32, because a step of 1e-6 rounds away in bf16

Both start at the base model, bit for bit, and are saved as their users expect: a LoRA as the folder that PEFT, vLLM and the
rest load, a fully trained model as an ordinary model folder. (LoRA-XS, the third, is TinyLoRA with other settings.)
"""
import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from files import InputError, make_folder, read_json, replacing
from tinylora import DTYPES, TARGETS, fingerprint

PREFIX = "base_model.model.model."  # PEFT's, before a name of ours


class LoRALinear(nn.Module):
    """A frozen nn.Linear plus (alpha / r) B A; A (r, d_in) as given, B (d_out, r) zeros, both fp32."""

    def __init__(self, base, A, alpha):
        super().__init__()
        self.base, self.scale = base, alpha / len(A)
        self.A = nn.Parameter(A.to(base.weight.device, torch.float32))
        self.B = nn.Parameter(self.A.new_zeros(len(base.weight), len(A)))

    def forward(self, x):  # (..., d_in) -> (..., d_out)
        h = F.linear(F.linear(x.to(self.A.dtype), self.A), self.B * self.scale)
        return self.base(x) + h.to(x.dtype)


def adapt(model, rank=1, alpha=32.0, seed=0):
    """Freeze the model, put a LoRALinear in the place of all 7 linears of every block; returns [A, B, A, B, ...].

    A is uniform within 1 / sqrt(d_in), PEFT's start, from a numpy stream per module. InputError: the rank does not fit.
    """
    settings = {"method": "lora", "rank": rank, "alpha": alpha, "seed": seed, "base": fingerprint(model)}
    model.requires_grad_(False)
    params = []
    for index, (layer, target) in enumerate((layer, target) for layer in model.layers for target in TARGETS):
        parent, name = target.split(".")
        parent = getattr(layer, parent)
        base = getattr(parent, name)
        d_out, d_in = base.weight.shape
        if rank > min(d_out, d_in):
            raise InputError(f"--rank {rank} does not fit a weight of shape {d_out} x {d_in}: use 1 to {min(d_out, d_in)}")
        A = np.random.RandomState([5, seed, index, 0]).uniform(-1, 1, (rank, d_in)) / math.sqrt(d_in)
        module = LoRALinear(base, torch.from_numpy(A), alpha)
        setattr(parent, name, module)
        params += [module.A, module.B]
    model.adapter = settings
    return params


def save(folder, model, dtype="fp32", base=""):
    """The LoRA on `model` as PEFT's folder. base: the model's name or path, for those who load it."""
    modules = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    write_peft(folder, {name: (m.A, m.B) for name, m in modules.items()}, model.adapter["rank"], model.adapter["alpha"], dtype, base)


def write_peft(folder, factors, rank, alpha, dtype, base):
    """{module name: (A (r, d_in), B (d_out, r))} -> adapter_config.json and adapter_model.safetensors, as PEFT writes them."""
    folder = Path(folder)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": alpha,
              "target_modules": sorted({target.split(".")[1] for target in TARGETS}), "bias": "none", "lora_dropout": 0.0,
              "fan_in_fan_out": False, "inference_mode": True, "use_rslora": False, "use_dora": False, "modules_to_save": None,
              "rank_pattern": {}, "alpha_pattern": {}}
    state = {f"{PREFIX}{name}.lora_{letter}.weight": x.detach().to("cpu", DTYPES[dtype]).contiguous()
             for name, pair in factors.items() for letter, x in zip("AB", pair)}
    make_folder(folder)
    with replacing(folder / "adapter_model.safetensors") as temporary:
        save_file(state, temporary, {"format": "pt"})
    with replacing(folder / "adapter_config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def load(folder, model):
    """Put a PEFT LoRA on a bare model; returns its tensors, as adapt does. InputError says what is missing or not supported."""
    folder = Path(folder)
    config = read_json(folder / "adapter_config.json")
    path = folder / "adapter_model.safetensors"
    plain = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
             "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}}
    for field, value in plain.items():
        if config.get(field, value) not in (value, None):
            raise InputError(f"{folder / 'adapter_config.json'}: {field} is {config[field]!r}; only {value!r} is supported")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise InputError(f"{folder / 'adapter_config.json'}: r is {rank!r} and lora_alpha {alpha!r}; both must be positive numbers")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read as an adapter ({error})") from None
    params = adapt(model, rank, alpha)
    model.adapter["seed"] = None  # PEFT's files do not say
    names = [f"{PREFIX}{name}.lora_{letter}.weight" for name, m in model.named_modules() if isinstance(m, LoRALinear) for letter in "AB"]
    if set(names) != set(state):
        odd = sorted(set(names) ^ set(state))
        raise InputError(f"{path}: does not hold A and B of all 7 linears of {len(model.layers)} layers and nothing else; the first odd one is {odd[0]}")
    for p, name in zip(params, names):
        if p.shape != state[name].shape:
            raise InputError(f"{path}: {name} has shape {tuple(state[name].shape)}, this model and r make it {tuple(p.shape)}")
        p.copy_(state[name])
    return params


def full(model):
    """Every weight is trained; returns them. The tied head is the embedding, once."""
    model.adapter = {"method": "full", "base": fingerprint(model)}
    return list(model.requires_grad_(True).parameters())


def save_model(folder, state, source, dtype):
    """Weights under our names -> a model folder as `source` is one: one safetensors file, config, tokenizer, template."""
    folder, source = Path(folder), Path(source)
    make_folder(folder)
    state = {n if n.startswith("lm_head") else f"model.{n}": x.detach().to("cpu", DTYPES[dtype]).contiguous() for n, x in state.items()}
    with replacing(folder / "model.safetensors") as temporary:
        save_file(state, temporary, {"format": "pt"})
    for path in sorted([*source.glob("*.json"), *source.glob("*.jinja")]):
        # not the shards' index; and tinylora.json's defaults belong to the folder they lie in
        if path.name not in ("config.json", "model.safetensors.index.json", "tinylora.json"):
            with replacing(folder / path.name) as temporary:
                shutil.copyfile(path, temporary)
    name = str(DTYPES[dtype]).removeprefix("torch.")
    config = {k: x for k, x in read_json(source / "config.json").items() if k != "dtype"} | {"torch_dtype": name}
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
