"""A decoder for Qwen2.5 and Llama 3, written out by hand and read from Hugging Face folders.

Both families are the same pre-norm transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU.
They differ in a bias on q, k and v (Qwen2.5 has one, Llama has none) and in the rope table. Parameter names
are the checkpoint's own, so loading is a strict copy.

    model = load("folder", torch.bfloat16, "cuda")
    logits = model(ids)                                    # (B, T) -> (B, T, vocab)
    cache = Cache(model, batch=B, size=1024)               # cache.py
    logits = model(prompts, cache=cache, lengths=lengths)  # ragged prompts, padded on the RIGHT
    logits = model(next_ids, cache=cache)                  # (B, 1): one more token for every row

Two facts keep attention simple. Rows are padded on the right, so causal attention alone hides the padding
from every real token: a whole-sequence pass needs no mask and no shifted positions. And the cache remembers
which position each of its columns holds, so "may this query see that key" is one comparison of positions,
however ragged the rows are. No mask is ever guessed from `ids != pad`.
"""
import json
import math
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch.utils.checkpoint import checkpoint

NEVER = 2**31 - 1  # the position of a cached column that no query may see


class InputError(Exception):
    """A mistake in what the user gave (a file, a flag, a folder): told in one line, exit code 2."""


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
        temporary.unlink(missing_ok=True)


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


def read_json(path):
    """The JSON object in a file; InputError names the file when it is missing or is not one."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: is not a JSON object")
    return value


def read_config(folder):
    """config.json -> Config. InputError names the field that is missing, unknown or unsupported."""
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

    def number(field, kind=int, default=None):
        value = raw.get(field, default)
        if value is None:
            raise InputError(f"{path}: the field {field} is missing")
        if type(value) not in (int, kind) or not 0 < value < 2**31:
            raise InputError(f"{path}: {field} is {value!r}; it must be a positive {kind.__name__}")
        return kind(value)  # 10000 and 10000.0 are one config, with one fingerprint

    heads, hidden = number("num_attention_heads"), number("hidden_size")
    # transformers 5 writes one dict, rope_parameters, where 4 wrote rope_theta and rope_scaling
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{path}: rope_scaling is {rope!r}; it must be an object or null")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise InputError(f"{path}: rope type {rope_type!r} is not supported; only 'default' and 'llama3' are")
    raw["rope_theta"] = raw.get("rope_theta") or rope.get("rope_theta", 10000.0)
    fields = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if rope_type == "llama3" and not all(isinstance(rope.get(f), (int, float)) and rope[f] > 0 for f in fields):
        raise InputError(f"{path}: llama3 rope scaling needs positive numbers for {', '.join(fields)}")
    config = Config(
        model_type=kind, vocab_size=number("vocab_size"), hidden_size=hidden,
        intermediate_size=number("intermediate_size"), num_hidden_layers=number("num_hidden_layers"),
        num_attention_heads=heads, num_key_value_heads=number("num_key_value_heads", default=heads),
        # null counts as absent: some published configs carry "head_dim": null
        head_dim=number("head_dim", default=hidden // heads) if raw.get("head_dim") else hidden // heads,
        rms_norm_eps=number("rms_norm_eps", float, 1e-6), rope_theta=number("rope_theta", float),
        rope_scaling={f: float(rope[f]) for f in fields} if rope_type == "llama3" else None,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)))
    if heads % config.num_key_value_heads:
        raise InputError(f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {config.num_key_value_heads}")
    if config.head_dim < 2 or config.head_dim % 2:
        raise InputError(f"{path}: head_dim is {config.head_dim}; rotary positions need an even number")
    return config


def rope_frequencies(config):
    """The head_dim/2 rotary frequencies, radians per position, fp32, with Llama 3's scaling where configured."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    freqs = 1.0 / config.rope_theta**exponent
    if config.rope_scaling is None:
        return freqs
    s = config.rope_scaling  # long wavelengths are stretched by `factor`, short ones kept, those between blended
    wavelength = 2 * math.pi / freqs
    turns = s["original_max_position_embeddings"] / wavelength
    keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
    return keep * freqs + (1 - keep) * freqs / s["factor"]


def upcast(x):
    """Where rounding would hurt (norms, softmax): fp32, or fp64 when the whole model is (the gradient tests)."""
    return x if x.dtype == torch.float64 else x.float()


def rotate(x, cos, sin):
    """Rotary positions the Hugging Face way: the two HALVES of a head pair up, not neighbouring elements."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def attend(q, k, v, mask):
    """q (B, H, T, D), k and v (B, KV, S, D), mask (B, 1, T, S) or None for plain causal -> (B, H, T, D)."""
    (B, H, T, D), KV = q.shape, k.shape[1]
    if mask is None:  # whole sequences, S == T: every fused kernel takes this form
        k, v = (t.repeat_interleave(H // KV, dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # With earlier keys: the queries that share a key head become rows of one product, so each key is read once.
    # (is_causal would be wrong here: torch aligns it top-left; and enable_gqa with a mask drops to slow kernels.)
    q = q.reshape(B, KV, H // KV * T, D)
    if T > 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(1, 1, H // KV, 1)).view(B, H, T, D)
    scores = q @ k.transpose(2, 3) * D**-0.5  # one token a row: two plain products beat any kernel made for tiles of queries
    scores = upcast(scores).view(B, H, T, -1).masked_fill(~mask, -math.inf).softmax(-1).to(v.dtype)
    return (scores.view(B, KV, H // KV, -1) @ v).view(B, H, T, D)


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):  # normalised in fp32, cast back BEFORE the weight: the order the checkpoints were trained in
        return self.weight * F.rms_norm(upcast(x), x.shape[-1:], eps=self.eps).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.head_dim, bias = layer, c.head_dim, c.model_type == "qwen2"
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x, rope, mask, cache):
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, heads, T, head_dim)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rope), rotate(k, *rope)
        k, v = (k, v) if cache is None else cache.append(self.layer, k, v)
        return self.o_proj(attend(q, k, v, mask).transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rope, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        # from_pretrained(empty): nn.Embedding's own initialiser, run on the meta device, imports sympy for seconds
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("rope_freqs", rope_frequencies(config), persistent=False)

    def hidden(self, ids, cache=None, lengths=None, recompute=False):
        """The last layer's normed states: ids (B, T) -> (B, T, C).

        cache: continues the rows in it. lengths (B,): real tokens of each row in this call, the rest of the row
        is padding on the right (None: no padding). recompute: activation checkpointing, block by block.
        """
        B, T = ids.shape
        positions, mask = torch.arange(T, device=ids.device)[None], None  # (1, T); (B, T) once a cache is at work
        if cache is not None:
            lengths = torch.full_like(cache.lengths, T) if lengths is None else lengths
            real, end = positions < lengths[:, None], cache.used + T
            positions = positions + cache.lengths[:, None]
            cache.position[:, cache.used:end] = torch.where(real, positions, NEVER)
            if cache.used:  # into an empty cache, causal attention says it all
                mask = (cache.position[:, None, :end] <= positions[:, :, None])[:, None]  # (B, 1, T, S)
        angle = positions[:, None, :, None] * self.rope_freqs.repeat(2)  # (B, 1, T, head_dim), fp32
        x = self.embed_tokens(ids)
        rope = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for block in self.layers:
            x = checkpoint(block, x, rope, mask, cache, use_reentrant=False) if recompute else block(x, rope, mask, cache)
        if cache is not None:
            cache.used, cache.lengths = end, cache.lengths + lengths
        return self.norm(x)

    def logits(self, hidden, vocab=None):
        """(..., C) -> (..., vocab): the head, cut to the ids that the tokenizer really has (None: all)."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return F.linear(hidden, head.weight)[..., :vocab]  # cut after the product: an odd width makes slow GPU kernels

    def forward(self, ids, cache=None, lengths=None):
        return self.logits(self.hidden(ids, cache, lengths))


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
        if Path(name).name != name:
            raise InputError(f"{index}: shard {name!r} is a path; shards must lie in the model's own folder")
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: this shard is named in {index.name} but is not there; download it again")
    return [folder / name for name in sorted(set(shards.values()))]


def load(path, dtype=torch.float32, device="cpu"):
    """The frozen model in a Hugging Face folder, each weight cast to `dtype` on `device` as its shard is read.

    The model is laid out on the meta device first, so no weight is ever initialised only to be overwritten and
    every name and shape is checked against the config. InputError names the file and the tensor or field.
    """
    config = read_config(path)
    with torch.device("meta"):
        model = Transformer(config)
    wanted, state = model.state_dict(), {}
    for shard in shard_files(path):
        try:
            with safe_open(shard, framework="pt", device=str(device)) as file:
                for full_name in file.keys():
                    name = full_name.removeprefix("model.")
                    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
                        continue  # old checkpoints carry tables and copies that the config already implies
                    if name not in wanted:
                        raise InputError(f"{shard}: tensor {full_name} does not belong to a {config.model_type} model of this config")
                    tensor = file.get_tensor(full_name)
                    if tensor.shape != wanted[name].shape:
                        raise InputError(f"{shard}: {full_name} has shape {tuple(tensor.shape)}, config.json makes it {tuple(wanted[name].shape)}")
                    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                        raise InputError(f"{shard}: {full_name} is {tensor.dtype}; quantised weights are not supported")
                    state[name] = tensor.to(dtype, copy=True)  # a copy: the file may change under a mapped tensor
        except (SafetensorError, OSError) as error:
            raise InputError(f"{shard}: damaged or cut short ({error}); download it again") from None
    missing = [name for name in wanted if name not in state]
    if missing:
        raise InputError(f"{path}: {len(missing)} tensors are in no shard, the first is {missing[0]}")
    model.load_state_dict(state, strict=True, assign=True)
    return model.to(device).requires_grad_(False).eval()
