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
which position each of its columns holds (cache.py). No mask is ever guessed from `ids != pad`.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch.utils.checkpoint import checkpoint

from files import InputError, read_config, shard_files


def rope_frequencies(config):
    """(head_dim,) rotary frequencies, radians per position, fp32, with Llama 3's scaling where configured; the first half negative: see rotate."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    freqs = 1.0 / config.rope_theta**exponent
    if config.rope_scaling is None:
        return torch.cat((-freqs, freqs))
    s = config.rope_scaling  # long wavelengths are stretched by `factor`, short ones kept, those between blended
    wavelength = 2 * math.pi / freqs
    turns = s["original_max_position_embeddings"] / wavelength
    keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
    freqs = keep * freqs + (1 - keep) * freqs / s["factor"]
    return torch.cat((-freqs, freqs))


def upcast(x):
    """Where rounding would hurt (norms, softmax): fp32, or fp64 when the whole model is (the gradient tests)."""
    return x if x.dtype == torch.float64 else x.float()


def rotate(x, cos, sin):
    """Rotary positions the Hugging Face way: the two HALVES (a, b) of a head pair up, not neighbouring elements.

    (a cos - b sin, b cos + a sin); the first half of the angles comes negative, and so does that of `sin`.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def to_grid(x, B, T, real):
    """Tokens (N, ...) -> (B, T, ...), zeros where there is padding. real (N,): the places of the N tokens among the B * T (None: all)."""
    if real is not None:
        x = x.new_zeros(B * T, *x.shape[1:]).index_copy(0, real, x)
    return x.view(B, T, *x.shape[1:])


def attend(q, k, v, bias, prompt=None):
    """q (B, T, H, D), k and v (KV, B, S, D), bias as Transformer.bias makes it, or None for plain causal -> (B * T, H * D). prompt: see Cache.share."""
    (B, T, H, D), KV = q.shape, len(k)
    if bias is None:  # whole sequences, S == T: every fused kernel takes this form
        k, v = (t.transpose(0, 1).repeat_interleave(H // KV, dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True).transpose(1, 2).reshape(B * T, H * D)
    # With earlier keys: the queries that share a key head become rows of one product, so each key is read once.
    # (is_causal would be wrong here: torch aligns it top-left; and enable_gqa with a mask drops to slow kernels.)
    R = H // KV * T
    q = q.unflatten(2, (KV, -1)).permute(2, 0, 3, 1, 4).contiguous().view(KV, B, R, D)
    if T > 1 and prompt is None:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:
        y = products(q, k, v, bias, prompt)
    return y.view(KV, B, -1, T, D).permute(1, 3, 0, 2, 4).reshape(B * T, H * D)


def products(q, k, v, bias, prompt):
    """Attention in plain products: q (KV, B, R, D), k and v (KV, B, S, D), bias (1, B, R, columns) -> (KV, B, R, D).

    For one token a row these beat any kernel made for tiles of queries. The keys of a prompt, columns before the S own ones, are
    read once for its group, whose rows lie side by side: a product's rows are then a view of several rows of the batch.
    """
    (KV, B, R, D), own = q.shape, bias.shape[-1] - k.shape[2]
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(KV, B, R, -1)
    if prompt is not None:
        prompt_k, prompt_v, slots, places = prompt  # (KV, P, columns, D) each; see Cache.number

        def side_by_side(x):  # (KV, B, R, X) -> (KV * P, group * R, X), a view as long as no row has left
            if slots is not None:
                x = x.new_zeros(KV, places, R, x.shape[-1]).index_copy_(1, slots, x)
            return x.view(KV * prompt_k.shape[1], -1, x.shape[-1])

        def back(x):
            x = x.view(KV, -1, R, x.shape[-1])
            return x if slots is None else x.index_select(1, slots)

        scores = torch.cat((back(torch.bmm(side_by_side(q), prompt_k.flatten(0, 1).mT)), scores), -1)
    scores = torch.add(bias, upcast(scores), alpha=D**-0.5).softmax(-1).to(v.dtype)
    y = torch.bmm(scores[..., own:].flatten(0, 1), v.flatten(0, 1)).view(KV, B, R, D)
    if prompt is not None:  # (a product into a part of a tensor, scores[..., own:], would be a loop over the batch on a CPU)
        y = back(side_by_side(y).baddbmm_(side_by_side(scores[..., :own]), prompt_v.flatten(0, 1)))
    return y


def linear(x, W, bias=None):
    """F.linear; on a CPU few rows are multiplied the other way round where W is large, by a kernel up to 1.5 times faster, or where x lies turned."""
    if x.is_cuda or x.dim() > 2 or not 1 < x.shape[0] <= 256 or (W.numel() < 2**18 and x.stride(1) == 1):
        return F.linear(x, W, bias)
    if len(W) >= 2**14 and bias is None:  # a vocabulary, in parts: each is turned back while the processor's cache holds it
        return torch.cat([linear(x, part) for part in W.split(2048)], 1)
    x = x.T if len(x) >= 12 else x.contiguous().T  # x may come from a product like this one, turned: for few rows that kernel is slow
    y = W @ x if bias is None else torch.addmm(bias[:, None], W, x)  # (d_out, N)
    return y.T


class Linear(nn.Linear):
    def forward(self, x):  # (N, d_in) -> (N, d_out)
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):  # normalised in fp32, cast back BEFORE the weight: the order the checkpoints were trained in
        return self.weight * F.rms_norm(upcast(x), x.shape[-1:], eps=self.eps).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.head_dim, self.KV, bias = layer, c.head_dim, c.num_key_value_heads, c.model_type == "qwen2"
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=bias)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=bias)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=bias)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x, rope, grid, bias, cache):  # x (N, C)
        qkv = torch.cat([proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj)], 1).view(len(x), -1, self.head_dim)  # (N, heads, head_dim)
        qk, v = to_grid(rotate(qkv[:, :-self.KV], *rope), *grid), to_grid(qkv[:, -self.KV:], *grid)  # (B, T, heads, head_dim)
        q, k = qk[:, :, :-self.KV], qk[:, :, -self.KV:]
        k, v, prompt = k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3), None  # (KV, B, T, head_dim): heads first, see products
        if cache is not None:
            k, v, prompt = cache.append(self.layer, k, v)
        y = attend(q, k, v, bias, prompt)  # (B * T, heads * head_dim)
        return self.o_proj(y if grid[2] is None else y.index_select(0, grid[2]))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rope, grid, bias, cache):
        x = x + self.self_attn(self.input_layernorm(x), rope, grid, bias, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.graphs = config, None  # graphs: see graph.py
        # from_pretrained(empty): nn.Embedding's own initialiser, run on the meta device, imports sympy for seconds
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("rope_freqs", rope_frequencies(config), persistent=False)

    def hidden(self, ids, cache=None, lengths=None, recompute=False):
        """The last layer's normed states: ids (B, T) -> (B, T, C).

        cache: continues the rows in it. lengths (B,): real tokens of each row in this call, the rest of the row
        is padding on the right (None: no padding). recompute: activation checkpointing, block by block.
        """
        (B, T), seen, places = ids.shape, None, None
        positions = torch.arange(T, device=ids.device).expand(B, T)
        if cache is not None:
            positions, real, seen = cache.feed(T, lengths)
            if lengths is not None:  # padding exists in attention only: all else sees the real tokens, N of them
                places = real.flatten().nonzero()[:, 0]
                ids, positions = ids.flatten()[places], positions.flatten()[places]
            if cache.which is not None:
                which = cache.which[:, None].expand(B, T).flatten()
                self.bank.which = which if places is None else which[places]
        angle = positions.flatten()[:, None, None] * self.rope_freqs  # (N, 1, head_dim), fp32
        x = self.embed_tokens(ids.flatten())  # (N, C)
        rope, grid = (angle.cos().to(x.dtype), angle.sin().to(x.dtype)), (B, T, places)
        bias = None if seen is None else self.bias(seen, x)
        for block in self.layers:
            x = checkpoint(block, x, rope, grid, bias, cache, use_reentrant=False) if recompute else block(x, rope, grid, bias, cache)
        return to_grid(self.norm(x), *grid)

    def bias(self, seen, like):
        """What attention adds to its scores, 0 or -inf: seen (B, T, columns) -> (1, B, R, columns), the R = H / KV * T queries of each key head, see attend.

        Made once for all layers, which in training keep it for the backward pass: rows begin at multiples of 8, or fused kernels on a GPU would
        make, and keep, a copy each.
        """
        (B, T, S), group = seen.shape, self.config.num_attention_heads // self.config.num_key_value_heads
        bias = like.new_full((B, 1, T, -(-S // 8) * 8), -math.inf)
        bias[:, 0, :, :S].masked_fill_(seen, 0)
        return bias.expand(B, group, T, -1).reshape(1, B, group * T, -1)[..., :S]

    def logits(self, hidden, vocab=None):
        """(..., C) -> (..., vocab): the head, cut to the ids that the tokenizer really has (None: all)."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return linear(hidden, head.weight).contiguous()[..., :vocab]  # cut after the product: an odd width makes slow GPU kernels

    def forward(self, ids, cache=None, lengths=None):
        return self.logits(self.hidden(ids, cache, lengths))


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
