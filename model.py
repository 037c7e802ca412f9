"""A decoder for Qwen2.5 and Llama 3, written by hand and read from Hugging Face folders.

Both are the same pre-norm transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU.
They differ in a bias on q, k and v (Qwen2.5's alone) and in the rope table.
Parameter names are the checkpoint's without "model.", so loading is a strict copy.

    model = load("folder", torch.bfloat16, "cuda")
    logits = model(ids)                      # (B, T) -> (B, T, vocab)
    cache = Cache(model, batch=B, size=1024)
    logits = model(prompts, cache, lengths)  # of unequal length, padded on the right
    logits = model(next_ids, cache)          # (B, 1): one more token for every row

One rule serves training, prefill and decoding alike: every key has a position, and a query sees the
keys whose position is at most its own. Padding has the position NEVER, larger than any real
query's (padded queries see all keys, so no softmax is empty; their output is not used). No mask is
guessed from `ids != pad`: id 0 may be a real token.

Shapes: B rows, T tokens of this call, S keys (earlier ones included), C hidden size, H query heads,
KV key heads, D head size.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from support.checkpoint import read_config, read_weights

NEVER = 2**31 - 1  # the position of a key that no real query may see


def upcast(x):
    """fp32 where rounding would hurt (norms, log-probs); fp64 where the whole model is fp64."""
    return x if x.dtype == torch.float64 else x.float()


def log_softmax(logits, temperature):
    """A policy's log-probs, (..., vocab), in fp32 (fp64 in fp64) whatever the logits' dtype."""
    logits = upcast(logits)
    if temperature != 1:  # dividing copies the logits, gigabytes
        logits = logits / temperature
    return logits.log_softmax(-1)


def pad(rows, device):
    """Lists of ids -> (B, T), 0 on the right. Padding is known by lengths, never by its value."""
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)


def rope_frequencies(config):
    """(D / 2,) rotary frequencies, radians per position, fp32; with Llama 3's scaling if any."""
    # device="cpu": inside load()'s meta device this table must still hold real numbers
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / config.rope_theta ** (exponent / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    # Llama 3: long wavelengths are stretched by `factor`, short ones kept, those between blended
    wavelength = 2 * math.pi / frequencies
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    periods = scaling["original_max_position_embeddings"] / wavelength
    keep = ((periods - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]


def rotate(x, cos, sin):
    """Rotary positions. x (B, heads, T, D); cos, sin (B, 1, T, D / 2).

    Hugging Face's order: element i pairs with element i + D / 2, not with its neighbour.
    """
    a, b = x.chunk(2, dim=-1)  # (B, heads, T, D / 2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Cache:
    """Keys and values of earlier tokens, written in place: for sampling, without gradients."""

    def __init__(self, model, batch, size):
        c = model.config
        like = model.embed_tokens.weight  # its dtype and device
        shape = (c.num_hidden_layers, batch, c.num_key_value_heads, size, c.head_dim)
        self.k = like.new_zeros(shape)
        self.v = like.new_zeros(shape)
        self.position = torch.full((batch, size), NEVER, device=like.device)  # (B, size)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=like.device)  # real tokens
        self.used = 0  # columns in use, the same for all rows, this call's included

    def append(self, layer, k, v):
        """Store k, v (B, KV, T, D) in the last T used columns; returns all used ones."""
        columns = slice(self.used - k.shape[2], self.used)
        self.k[layer, :, :, columns] = k
        self.v[layer, :, :, columns] = v
        return self.k[layer, :, :, :self.used], self.v[layer, :, :, :self.used]  # (B, KV, S, D)

    def repeat(self, group, extra):
        """Each row becomes `group` consecutive rows, with room for `extra` more columns."""
        self.k = F.pad(self.k.repeat_interleave(group, 1), (0, 0, 0, extra))
        self.v = F.pad(self.v.repeat_interleave(group, 1), (0, 0, 0, extra))
        self.position = F.pad(self.position.repeat_interleave(group, 0), (0, extra), value=NEVER)
        self.lengths = self.lengths.repeat_interleave(group)


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):  # (..., C)
        # normalised in fp32, cast back BEFORE the weight, as transformers does
        normed = F.rms_norm(upcast(x), x.shape[-1:], eps=self.eps)
        return self.weight * normed.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.layer = layer  # its number, for the cache
        self.head_dim = c.head_dim
        qkv_bias = c.model_type == "qwen2"
        q_size = c.num_attention_heads * c.head_dim
        kv_size = c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, q_size, bias=qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, kv_size, bias=qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, kv_size, bias=qkv_bias)
        self.o_proj = nn.Linear(q_size, c.hidden_size, bias=False)

    def forward(self, x, cos, sin, mask, cache):  # x (B, T, C), mask (B, 1, T, S)
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, KV, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, KV, T, D)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, KV, S, D): this call's keys come last
        # grouped queries: the T queries of the n = H / KV heads that read one key head, n T rows
        n = q.shape[1] // k.shape[1]
        q = q.reshape(B, -1, n * T, self.head_dim)  # (B, KV, n T, D)
        # not is_causal=True: with a cache torch aligns that triangle to the top left
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(1, 1, n, 1))
        y = y.reshape(B, -1, T, self.head_dim)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):  # (B, T, C)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, mask, cache):  # x (B, T, C)
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        # How many ids the tokenizer has: Qwen2.5-7B's table has 152,064 rows for 151,665, and a
        # row without a token must never be sampled. Chat.limit_vocab sets it.
        self.vocab = config.vocab_size
        # from_pretrained(empty): nn.Embedding's initialiser takes seconds on the meta device
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("rope_freqs", rope_frequencies(config), persistent=False)  # (D / 2,)

    def hidden(self, ids, cache=None, lengths=None, recompute=False):
        """The last layer's normed states: ids (B, T) -> (B, T, C).

        cache: continues the rows in it. lengths (B,): how many of a row's T tokens are real, the
        rest is padding on the right whose output means nothing (None: all real).
        recompute: activation checkpointing, block by block.
        """
        B, T = ids.shape
        index = torch.arange(T, device=ids.device)  # (T,)
        start = 0 if cache is None else cache.lengths[:, None]  # (B, 1): tokens so far
        position = (start + index).expand(B, T)  # (B, T)
        if lengths is not None:
            position = position.masked_fill(index >= lengths[:, None], NEVER)

        key_position = position  # (B, S), S = T without a cache
        if cache is not None:
            cache.position[:, cache.used:cache.used + T] = position
            cache.used += T
            cache.lengths = cache.lengths + (T if lengths is None else lengths)
            key_position = cache.position[:, :cache.used]  # (B, S)
        mask = key_position[:, None, None, :] <= position[:, None, :, None]  # (B, 1, T, S)

        angle = position[:, None, :, None] * self.rope_freqs  # (B, 1, T, D / 2), fp32
        x = self.embed_tokens(ids)  # (B, T, C)
        cos = angle.cos().to(x.dtype)
        sin = angle.sin().to(x.dtype)
        for block in self.layers:
            if recompute:
                x = checkpoint(block, x, cos, sin, mask, cache, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, cache)
        return self.norm(x)

    def logits(self, hidden):
        """(..., C) -> (..., vocab): the head, cut to the ids that the tokenizer really has."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return F.linear(hidden, head.weight[:self.vocab])

    def forward(self, ids, cache=None, lengths=None):
        return self.logits(self.hidden(ids, cache, lengths))


def load(path, dtype=torch.float32, device="cpu"):
    """The frozen model in a Hugging Face folder, in `dtype` on `device`.

    Laid out on the meta device first: no weight is initialised in vain, and every name and shape
    is checked against the files. InputError names the file and the tensor.
    """
    config = read_config(path)
    with torch.device("meta"):
        model = Transformer(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weights = read_weights(path, config, shapes, dtype, device)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.to(device).requires_grad_(False).eval()
