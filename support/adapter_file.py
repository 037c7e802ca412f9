"""The adapter file of tinylora.py: one tensor, v, and the settings in the header, checked."""
from pathlib import Path

import torch
from safetensors import SafetensorError

from support.checkpoint import same_base
from support.directions import KINDS
from support.errors import InputError
from support.files import open_tensors

METHODS = ("tinylora", "lora-xs")
TYINGS = ("tiled", "structured")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VERSION = "1"
MOST_TRAINED = 2**24  # numbers in a file; LoRA-XS of rank 256 on a 7B model has 13 million
MOST_NUMBERS = 2**26  # of P in all modules, 256 MB; or as many as the model itself has


def read(path):
    """(v, flat as stored; the settings as in model.adapter, and "model", the base model's name).

    InputError says what is wrong with the file.
    """
    if not Path(path).is_file():  # a pipe would keep us waiting
        raise InputError(f"{path}: no such file")
    try:
        with open_tensors(path) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "tinylora" or list(file.keys()) != ["v"]:
                raise InputError(f"{path}: is not a TinyLoRA adapter (it should hold one tensor, "
                                 f"v, and say so)")
            if metadata.get("version") != VERSION:
                raise InputError(f"{path}: adapter version {metadata.get('version')!r}, this code "
                                 f"reads {VERSION!r}")
            v = file.get_tensor("v")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read as an adapter ({error})") from None
    try:
        settings = {name: int(metadata[name]) for name in ("rank", "u", "n_tie", "groups", "seed")}
        settings |= {name: metadata[name] for name in ("tie", "targets", "base")}
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: its metadata is damaged ({error})") from None
    settings["method"] = metadata.get("method", "tinylora")  # the first adapters did not say
    settings["model"] = metadata.get("model", "")
    directions = metadata.get("directions", "top")
    if directions != "top":  # as in model.adapter
        settings["directions"] = directions
    limits = {"rank": 1, "u": 1, "groups": 1, "n_tie": 0, "seed": 0}
    if any(not low <= settings[name] < 2**32 for name, low in limits.items()):
        raise InputError(f"{path}: its metadata is damaged (a number is out of range)")
    known = (settings["tie"] in TYINGS and settings["method"] in METHODS
             and directions in KINDS)
    if v.numel() > MOST_TRAINED:
        raise InputError(f"{path}: holds {v.numel():,} numbers; the limit is {MOST_TRAINED:,}")
    if not known or v.shape != (settings["groups"] * settings["u"],):
        raise InputError(f"{path}: holds {v.numel()} numbers, its metadata says "
                         f"{settings['method']}, {settings['groups']} {settings['tie']} ties x u "
                         f"{settings['u']}, {directions} directions")
    if v.dtype not in DTYPES.values() or not v.isfinite().all():
        raise InputError(f"{path}: v must be finite numbers in {', '.join(DTYPES)}")
    return v, settings


def check_settings(path, wanted, here):
    """InputError unless a file's settings are those of the model, as far as it has them `here`."""
    check_base(path, wanted["base"], wanted["model"], here["base"])
    wanted = {"directions": "top"} | wanted
    if "rank" in here:  # a model with an adapter
        here = {"directions": "top"} | here
    differs = [f"{name} is {wanted.get(name)} in the file and {here[name]} here"
               for name in here if name != "base" and wanted.get(name) != here[name]]
    if differs:
        raise InputError(f"{path}: does not fit this model: {'; '.join(differs)}")


def check_base(path, wanted, name, here):
    """InputError if a file was made for a model with another fingerprint. name: its own for it."""
    if not same_base(wanted, here):
        raise InputError(f"{path}: was made for another base model "
                         f"({name or 'one its file does not name'}), or for other weights of it")


def check_args(config, rank, tying, method, directions):
    """InputError for words that no file may have, or if a weight has fewer singular directions."""
    for word, known in ((tying, TYINGS), (method, METHODS), (directions, KINDS)):
        if word not in known:
            raise InputError(f"{word!r} is none of {', '.join(known)}")
    c = config
    fits = min(c.hidden_size, c.intermediate_size, c.num_key_value_heads * c.head_dim)
    if not 1 <= rank <= fits:
        raise InputError(f"--rank {rank} does not fit the model's smallest weight: use 1 to {fits}")


def check_size(model, modules, rank, u):
    """InputError if P, u x rank x rank numbers for every module, would be larger than the model.

    A file of a few kB may ask for any size.
    """
    numbers = modules * u * rank**2
    most = max(MOST_NUMBERS, sum(p.numel() for p in model.parameters()))
    if numbers > most:
        raise InputError(f"rank {rank} and u {u} need {numbers:,} fixed random numbers, "
                         f"u x rank x rank for each of {modules} modules; the limit is {most:,}")
