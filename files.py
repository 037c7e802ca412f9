"""Files that others made, read with suspicion; files of ours, written whole.

A model folder comes from somebody else. Nothing in it may run, hang or point elsewhere, so every size is bounded before it
is believed, every field has a type and a range, and whatever is wrong is told in one line (InputError). Symbolic links are
followed, because the hub's cache is made of them; a name inside a file, though, never leaves the folder.
"""
import json
import os
import re
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

LARGEST = 64 << 20  # bytes of a JSON or template file: the largest tokenizers in use have half of that


class InputError(Exception):
    """A mistake in what the user gave (a file, a flag, a folder): told in one line, exit code 2."""

    def __str__(self):  # the line may quote what a file says: no second line, no terminal codes, no megabytes
        text = super().__str__()
        text = text if len(text) <= 2000 else text[:2000] + "..."
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def make_folder(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file of that name or in its place, no permission, a read-only disk
        raise InputError(f"{path}: cannot be made a folder ({error.strerror}); choose another") from None


@contextmanager
def replacing(path):
    """Yields a temporary path beside `path`; renamed over it when the block ends well, removed when it does not.

    So a reader never meets half a file. InputError when the disk is full or the folder cannot be written.
    """
    temporary = Path(f"{path}.tmp{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written ({error}); free some space or choose another folder") from None
    finally:
        with suppress(OSError):  # not there; or the disk is read-only, and the error above says so
            temporary.unlink()


def read_text(path, largest=LARGEST):
    """The text of an ordinary file (a pipe would keep us waiting), UTF-8; InputError when it cannot be had."""
    path = Path(path)
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        if path.stat().st_size > largest:
            raise InputError(f"{path}: has {path.stat().st_size:,} bytes; no file of its kind needs more than {largest:,}")
        return path.read_bytes().decode()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def parse_json(text):
    """A JSON value; ValueError or RecursionError when it is none, or holds half a surrogate pair, which is no text."""
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False).encode()
    return value


def read_json(path):
    """The JSON object in a file; InputError names the file when it is missing or is not one."""
    try:
        value = parse_json(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: is not a JSON object")
    return value


@dataclass
class Config:
    """The fields of config.json that change the function computed, under Hugging Face's names."""
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
    """config.json -> Config. InputError names the field that is missing, unknown, unsupported or absurd."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file; --model takes a folder with config.json, *.safetensors and tokenizer.json")
    raw = read_json(path)
    kind = raw.get("model_type")
    if kind not in ("qwen2", "llama"):
        raise InputError(f"{path}: model_type is {kind!r}; this project reads 'qwen2' (Qwen2, Qwen2.5) and 'llama' (Llama 3)")
    if raw.get("quantization_config"):
        raise InputError(f"{path}: quantization_config is set; quantised weights are not supported, use the original checkpoint")
    if raw.get("use_sliding_window") or "sliding_attention" in str(raw.get("layer_types")):
        raise InputError(f"{path}: use_sliding_window (or a sliding layer type) is on; only full attention is supported")
    for field, supported in (("hidden_act", "silu"), ("mlp_bias", False), ("attention_bias", False)):
        if raw.get(field, supported) != supported and (kind, field) != ("qwen2", "attention_bias"):  # Qwen2 has its bias whatever that says
            raise InputError(f"{path}: {field} is {raw[field]!r}; only {supported!r} is supported for {kind}")

    def number(field, low=1, high=2**20, default=None, source=raw):
        """A field from low to high, as the type that those have: 10000 and 10000.0 are one config, with one fingerprint.

        Null counts as absent (some published configs carry "head_dim": null). No size in use comes near 2**20, and
        with it the product of any three still fits an int64.
        """
        value = default if source.get(field) is None else source[field]
        if value is None:
            raise InputError(f"{path}: the field {field} is missing")
        if type(value) not in (int, type(high)) or not low <= value <= high:
            raise InputError(f"{path}: {field} is {value!r}; it must be {'a whole' if type(high) is int else 'a'} number from {low} to {high}")
        return type(high)(value)

    heads, hidden = number("num_attention_heads"), number("hidden_size")
    # transformers 5 writes one dict, rope_parameters, where 4 wrote rope_theta and rope_scaling
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{path}: rope_scaling is {rope!r}; it must be an object or null")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise InputError(f"{path}: rope type {rope_type!r} is not supported; only 'default' and 'llama3' are")
    scaling, tied = None, raw.get("tie_word_embeddings") or False
    if rope_type == "llama3":
        scaling = {f: number(f, 1e-3, 1e9, source=rope) for f in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
        if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise InputError(f"{path}: low_freq_factor of llama3's rope scaling must be below its high_freq_factor")
    if not isinstance(tied, bool):
        raise InputError(f"{path}: tie_word_embeddings is {tied!r}; it must be true or false")
    config = Config(
        model_type=kind, vocab_size=number("vocab_size"), hidden_size=hidden,
        intermediate_size=number("intermediate_size"), num_hidden_layers=number("num_hidden_layers", high=256),
        num_attention_heads=heads, num_key_value_heads=number("num_key_value_heads", default=heads),
        head_dim=number("head_dim", default=hidden // heads),
        rms_norm_eps=number("rms_norm_eps", 1e-12, 1.0, 1e-6),
        rope_theta=number("rope_theta", 1.0, 1e12, 10000.0, rope if raw.get("rope_theta") is None else raw),
        rope_scaling=scaling, tie_word_embeddings=tied)
    if heads % config.num_key_value_heads:
        raise InputError(f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {config.num_key_value_heads}")
    if config.head_dim % 2:
        raise InputError(f"{path}: head_dim is {config.head_dim}; rotary positions need an even number")
    return config


def shard_files(folder):
    """The safetensors files of a model folder; InputError names the shard that is missing or outside it."""
    folder, index = Path(folder), Path(folder) / "model.safetensors.index.json"
    if not index.is_file():
        if not (folder / "model.safetensors").is_file():
            raise InputError(f"{folder}: has neither model.safetensors nor model.safetensors.index.json")
        return [folder / "model.safetensors"]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise InputError(f"{index}: weight_map is missing or is not a map from tensor to file")
    for name in sorted(set(shards.values())):
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name):
            raise InputError(f"{index}: shard {name!r} is not the plain name of a .safetensors file in the model's own folder")
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: this shard is named in {index.name} but is not there; download it again")
    return [folder / name for name in sorted(set(shards.values()))]
