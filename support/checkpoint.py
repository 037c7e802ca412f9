"""The model's side of a model folder: config.json, the shard index, the weights.

A model folder comes from somebody else. Every field has a type and a range, and a file name
inside a file never leads out of the folder.
"""
import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from support.errors import InputError
from support.files import open_tensors, read_json

# No size in use comes near this limit, and the product of any three sizes still fits an int64.
LARGEST_SIZE = 2**20
WORDS = 2**16  # of 8 bytes, whose bits become one sum of the fingerprint
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROPE_FIELDS = ("factor", "low_freq_factor", "high_freq_factor",
               "original_max_position_embeddings")


@dataclass
class Config:
    """The fields of config.json that change the function computed, with Hugging Face's names."""
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None
    tie_word_embeddings: bool


def read_config(folder):
    """config.json -> Config. InputError names a field that is missing, unsupported or absurd."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file; --model takes a folder with config.json, "
                         "*.safetensors and tokenizer.json")
    raw = read_json(path)
    refuse_unsupported(path, raw)
    rope, scaling = read_rope(path, raw)
    tied = raw.get("tie_word_embeddings") or False
    if not isinstance(tied, bool):
        raise InputError(f"{path}: tie_word_embeddings is {tied!r}; it must be true or false")

    def size(field, largest=LARGEST_SIZE, default=None):
        return number(path, raw, field, 1, largest, default)

    heads = size("num_attention_heads")
    hidden = size("hidden_size")
    theta_source = rope if raw.get("rope_theta") is None else raw
    config = Config(
        model_type=raw["model_type"],
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        num_hidden_layers=size("num_hidden_layers", largest=256),
        num_attention_heads=heads,
        num_key_value_heads=size("num_key_value_heads", default=heads),
        head_dim=size("head_dim", default=hidden // heads),
        rms_norm_eps=number(path, raw, "rms_norm_eps", 1e-12, 1.0, default=1e-6),
        rope_theta=number(path, theta_source, "rope_theta", 1.0, 1e12, default=10000.0),
        rope_scaling=scaling,
        tie_word_embeddings=tied)
    if heads % config.num_key_value_heads:
        raise InputError(f"{path}: num_attention_heads {heads} is not a multiple of "
                         f"num_key_value_heads {config.num_key_value_heads}")
    if config.head_dim % 2:
        raise InputError(f"{path}: head_dim is {config.head_dim}; "
                         "rotary positions need an even number")
    return config


def refuse_unsupported(path, raw):
    """InputError if config.json asks for anything that model.py does not compute.

    One more family of models: here, in model.py, its end of turn in support/chat_format.py, and
    fast/, or --engine plain.
    """
    kind = raw.get("model_type")
    if kind not in ("qwen2", "llama"):
        raise InputError(f"{path}: model_type is {kind!r}; this project reads 'qwen2' "
                         "(Qwen2, Qwen2.5) and 'llama' (Llama 3)")
    if raw.get("quantization_config"):
        raise InputError(f"{path}: quantization_config is set; quantised weights are not "
                         "supported, use the original checkpoint")
    if raw.get("use_sliding_window") or "sliding_attention" in str(raw.get("layer_types")):
        raise InputError(f"{path}: use_sliding_window (or a sliding layer type) is on; "
                         "only full attention is supported")
    supported = {"hidden_act": "silu", "mlp_bias": False}
    if kind == "llama":  # Qwen2 always has a bias in q, k and v, whatever this field says
        supported["attention_bias"] = False
    for field, value in supported.items():
        if raw.get(field, value) != value:
            raise InputError(f"{path}: {field} is {raw[field]!r}; "
                             f"only {value!r} is supported for {kind}")


def read_rope(path, raw):
    """(the object with the rotary fields, the fields of Llama 3's scaling or None)."""
    # transformers 5 writes one object, rope_parameters, where 4 wrote rope_theta and rope_scaling.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{path}: rope_scaling is {rope!r}; it must be an object or null")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise InputError(f"{path}: rope type {rope_type!r} is not supported; "
                         "only 'default' and 'llama3' are")
    if rope_type == "default":
        return rope, None
    scaling = {field: number(path, rope, field, 1e-3, 1e9) for field in ROPE_FIELDS}
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise InputError(f"{path}: low_freq_factor of llama3's rope scaling must be below "
                         "its high_freq_factor")
    return rope, scaling


def number(path, source, field, low, high, default=None):
    """A field of a JSON object, from `low` to `high`; null counts as absent.

    The result has the type of `high`, so that 10000 and 10000.0 give the same Config.
    """
    value = default if source.get(field) is None else source[field]
    if value is None:
        raise InputError(f"{path}: the field {field} is missing")
    kind = type(high)
    if type(value) not in (int, kind) or not low <= value <= high:
        article = "a whole" if kind is int else "a"
        raise InputError(f"{path}: {field} is {value!r}; "
                         f"it must be {article} number from {low} to {high}")
    return kind(value)


def shard_files(folder):
    """The safetensors files of a model folder. InputError names a shard missing or outside it."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise InputError(f"{folder}: has neither model.safetensors nor {index.name}")
        return [single]
    weight_map = read_json(index).get("weight_map")
    is_map = isinstance(weight_map, dict) and bool(weight_map)
    if not is_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: weight_map is missing or is not a map from tensor to file")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name):
            raise InputError(f"{index}: shard {name!r} is not the plain name of a .safetensors "
                             "file in the model's own folder")
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: this shard is named in {index.name} "
                             "but is not there; download it again")
    return [folder / name for name in names]


def read_weights(folder, config, shapes, dtype, device, cut=None):
    """{name: tensor} of all shards, each cast to `dtype` on `device` as its shard is read.

    shapes: {name: shape} of exactly the tensors that the model of this config has. cut(name,
    tensor): the part of it that is kept (fast/shard.py). InputError if one is missing, damaged, of
    another shape or quantised, or if there is one too many.
    """
    weights = {}
    for shard in shard_files(folder):
        try:
            with open_tensors(shard, device) as file:
                for full_name in file.keys():
                    name = full_name.removeprefix("model.")
                    if is_redundant(name, config):
                        continue
                    if name not in shapes:
                        raise InputError(f"{shard}: tensor {full_name} does not belong to a "
                                         f"{config.model_type} model of this config")
                    tensor = file.get_tensor(full_name)  # mapped, not read yet
                    check_tensor(f"{shard}: {full_name}", tensor, shapes[name])
                    if cut is not None:
                        tensor = cut(name, tensor)
                    # a copy: the file may change under a memory-mapped tensor
                    weights[name] = tensor.to(dtype, copy=True)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{shard}: damaged or cut short ({error}); "
                             f"download it again") from None
    missing = [name for name in shapes if name not in weights]
    if missing:
        raise InputError(f"{folder}: {len(missing)} tensors are in no shard, "
                         f"the first is {missing[0]}")
    return weights


def is_redundant(name, config):
    """Old checkpoints hold rope tables and a copy of the tied head: the config implies both."""
    tied_head = name == "lm_head.weight" and config.tie_word_embeddings
    return tied_head or name.endswith("rotary_emb.inv_freq")


def check_tensor(where, tensor, shape):
    if tensor.shape != shape:
        raise InputError(f"{where} has shape {tuple(tensor.shape)}, "
                         f"config.json makes it {tuple(shape)}")
    if tensor.dtype not in FLOATS:
        raise InputError(f"{where} is {tensor.dtype}; quantised weights are not supported")


def fingerprint(model):
    """Which model this is, in two or three sha256 with colons between them:

    1. of the config and of 64 values of every weight: all that the first files have
    2. of every weight, rounded to bf16: a checkpoint in fp32 and in bf16 is one model
    3. of every weight as it is, where the model is in fp32

    Half a second for a GB of weights in fp32, a third in bf16. Two are compared by same_base. A
    part of a model (fast/shard.py) carries the fingerprint of the whole.
    """
    if hasattr(model, "whole"):
        return model.whole
    return joined(model.config, {name: probe(x) for name, x in model.named_parameters()})


def same_base(a, b):
    """True if two fingerprints agree in all that both have."""
    return all(x == y for x, y in zip(a.split(":"), b.split(":")))


@torch.no_grad()
def probe(weight):
    """What each part of the fingerprint has of a weight, as bytes."""
    flat = weight.detach().flatten()
    index = torch.linspace(0, flat.numel() - 1, min(64, flat.numel()), dtype=torch.float64)
    values = flat[index.long().to(flat.device)].to(torch.bfloat16).cpu()
    parts = [values.view(torch.int16).numpy().tobytes(), sums_of_bits(flat, torch.bfloat16)]
    if weight.dtype in (torch.float32, torch.float64):
        parts.append(sums_of_bits(flat, torch.float32))
    return parts


def sums_of_bits(flat, dtype):
    """A weight in `dtype` -> bytes in which a change in any one word of 8 bytes shows.

    A word is multiplied by an odd number, and 2**16 products are added up, modulo 2**64. These
    sums are exact in any order and on any device, and several times faster than a sha256 of all.
    """
    random = np.random.RandomState(0).bytes(8 * WORDS)
    factors = torch.frombuffer(bytearray(random), dtype=torch.int64).bitwise_or(1).to(flat.device)
    sums = []
    for part in flat.split(8 * WORDS // dtype.itemsize):
        bits = part.to(dtype).view(torch.uint8)
        bits = F.pad(bits, (0, -len(bits) % 8)).view(torch.int64)
        sums.append((bits * factors[:len(bits)]).sum())
    return torch.stack(sums).cpu().numpy().tobytes()


def joined(config, probes):
    """The fingerprint of {name of a weight: its probe}."""
    settings = json.dumps(asdict(config), sort_keys=True).encode()
    digests = [hashlib.sha256(settings), hashlib.sha256(), hashlib.sha256()]
    for name, parts in sorted(probes.items()):
        for digest, values in zip(digests, parts):
            digest.update(name.encode() + values)
    return ":".join(digest.hexdigest() for digest, _ in zip(digests, parts))
