"""TinyLoRA: every linear layer of a frozen model is bent by a few numbers ("Learning to Reason in 13 Parameters",
Morris et al., arXiv 2602.04118, section on TinyLoRA).

    y = W x + U S R V^T x,        R = sum_i v_i P_i / sqrt(u)

W is frozen. U S V^T is its truncated SVD of rank r (2 in the paper's main runs), frozen. P_1 ... P_u are fixed
random r x r matrices, different for every module. v (u numbers) is all that learns, and modules share it: with
13 groups and u = 1 a whole model learns 13 numbers. v starts at 0, so step 0 is the base model bit for bit.
W is never merged: a merged bf16 weight rounds most of such a small change away.

SCALE. The paper gives neither P's distribution nor a scale, and implementations differ. Here P ~ N(0, 1), there
is no alpha, v = 0 at the start. Adam moves v by about lr a step whatever the gradient's size, so what counts is
lr x scale, and a learning rate carries over like this (u = 1, r = 2: ours = 16 x fork = 0.71 x PEFT):

    implementation   delta W                               P entries    std of (R / v) per entry   lr here =
    this file        U S R V^T                             N(0, 1)      1/sqrt(u)                  lr
    author's fork    (alpha/r) U R S V^T, alpha/r = 16     N(0, 1)      16/sqrt(u)                 16 x lr_fork
    PEFT             U sqrt(S) R sqrt(S) V^T, R = sum v P  N(0, 1/r)    1/sqrt(r)                  sqrt(u/r) x lr_peft

S stands left of R here, right of it in the fork and on both sides in PEFT: entry (i, j) of R is weighted by s_i,
s_j and sqrt(s_i s_j). That cannot be undone by a learning rate; the diagonal agrees. One implementation's P can be
written in another's: with P = sqrt(u) S^-1/2 P_peft S^1/2 both compute the same delta W from the same v (tested).

LORA-XS (arXiv 2405.17604) trains R itself: here u = r^2, no sharing, and P_i the r^2 unit matrices instead of
random ones (and no 1/sqrt(u), so v IS R). All the rest is the same code.

THE FILE. An adapter is one safetensors file whose only tensor is v: 26 bytes of data for 13 numbers in bf16. It is
enough because all else can be rebuilt exactly: P comes from numpy's RandomState, a stream frozen by policy, seeded
by (seed, module index); the SVD is deterministic and its signs are fixed by a rule; and the base model is identified
by a fingerprint. Bit for bit on the same machine, on any number of threads; elsewhere to the SVD's tolerance (another
processor or device sums in another order). U S and V are kept in the base's dtype. See python tinylora.py show|export.
"""
import hashlib
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from files import InputError, replacing
from model import linear

TARGETS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # in forward order: tiling runs over them so
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VERSION = "1"


@torch.no_grad()
def truncated_svd(W, rank, tol=1e-5):
    """The top `rank` singular triplets of W (m, n), in fp32: U (m, rank), S (rank,), V (n, rank), residual.

    Subspace iteration on W^T W that keeps its past (block Lanczos with thick restarts): a pass adds to an orthonormal
    basis what W^T W makes of the last block, and after every three the small problem in that basis is solved, so a few
    passes over W do what dozens of plain power iterations do. It stops when ||W^T u_i - s_i v_i|| <= tol * s_1 for every
    i; that largest residual, divided by s_1, is returned. Nearly equal singular values may stop it short; then a full
    SVD settles the matter, as it does where W is so small that the basis would fill the space. Signs: the entries of
    each u sum to a positive number (u and v flip together). InputError: the rank does not fit, or W holds NaN or infinity.
    """
    m, n = W.shape
    if W.is_meta:  # shapes are enough to count a 7B model's trainable numbers
        return W.new_empty(m, rank), W.new_empty(rank), W.new_empty(n, rank), 0.0
    if not 1 <= rank <= min(m, n):
        raise InputError(f"--rank {rank} does not fit a weight of shape {m} x {n}: use 1 to {min(m, n)}")
    W = W.float()
    if not W.sum().isfinite():
        raise InputError("the weight holds NaN or infinity: the checkpoint is damaged")
    A = W if n <= m else W.T  # iterate on the short side
    parts = (A,) if W.is_cuda else A.split(max(1, 2**20 // A.shape[1]))  # what a CPU's cache holds between two products
    width = rank + 6
    block = torch.from_numpy(np.random.RandomState(0).standard_normal((A.shape[1], width))).to(W)
    K = Z = W.new_empty(A.shape[1], 0)  # the basis, and A^T A times it
    residual = math.inf
    for _ in range(25 if A.shape[1] >= 16 * width else 0):
        for _ in range(3):
            for _ in range(3):  # twice is enough in theory; once the basis holds all of W, what a block adds is rounding, itself mostly in the basis
                block = torch.linalg.qr(block - K @ (K.T @ block))[0]
            new = sum(block.T @ a.T @ a for a in parts).T  # A^T A block; with A.T on the left it would be several times slower
            K, Z, block = torch.cat((K, block), 1), torch.cat((Z, new), 1), new
        small = (K.T @ Z).double()
        values, vectors = torch.linalg.eigh((small + small.T) / 2)
        vectors = vectors[:, -3 * width:].flip(1).to(W)  # descending
        S = values[-width:].flip(0).clamp(min=1e-30).sqrt().to(W)
        lead = vectors[:, :width]
        right = K @ lead
        block = Z @ lead - right * S**2
        norms, top = block[:, :rank].norm(dim=0).tolist(), S[:rank].tolist()
        residual = max(norm / s for norm, s in zip(norms, top)) / top[0]
        if residual <= tol:
            break
        if K.shape[1] >= 12 * width:
            K, Z = K @ vectors, Z @ vectors
    if residual <= 10 * tol:
        right, S = right[:, :rank], S[:rank]
        left = A @ right / S
    else:
        left, S, right = torch.linalg.svd(A, full_matrices=False)
        left, S, right, residual = left[:, :rank], S[:rank], right[:rank].T, 0.0
    U, V = (left, right) if A is W else (right, left)
    sign = torch.where(U.double().sum(0) < 0, -1.0, 1.0).to(W)
    return U * sign, S, V * sign, residual


class TinyLoRALinear(nn.Module):
    """A frozen nn.Linear plus U S R V^T. `v` (groups, u) is one Parameter shared by all modules; this one uses a row.

    bank: see `many`. held: see `held`.
    """

    def __init__(self, base, v, group, P, bank=None):
        super().__init__()
        self.base, self.v, self.group, self.held = base, v, group, None
        self.bank = bank or SimpleNamespace(v=None, which=None)
        W = base.weight
        U, S, V, self.residual = truncated_svd(W, P.shape[-1])
        self.register_buffer("Vt", V.T.to(W.dtype).contiguous(), persistent=False)       # (r, d_in)
        self.register_buffer("US", (U * S).to(W.dtype).contiguous(), persistent=False)   # (d_out, r)
        self.register_buffer("P", P.to(v), persistent=False)  # (u, r, r), fp32
        self.register_buffer("RSUt", W.new_zeros(P.shape[-1], len(W)), persistent=False)  # R (U S)^T (r, d_out), inside `held`

    def core(self):
        """R (r, r), in v's precision; inside `many` one for each of its v's, (A, r, r)."""
        v = self.v if self.bank.v is None else self.bank.v  # (groups, u), (A, groups, u)
        return (v[..., self.group, :] @ self.P.flatten(1)).unflatten(-1, self.P.shape[1:])

    def forward(self, x):  # (N, d_in) -> (N, d_out)
        y, h = self.base(x), linear(x, self.Vt)  # (N, d_out), (N, r)
        Rt, SUt = self.held or (self.core().mT, self.US.T)
        if Rt is not None:
            h = h.to(Rt.dtype)  # R stays fp32: rounded to bf16, a small step of v would vanish
            h = torch.mm(h, Rt) if self.bank.which is None else torch.bmm(h[:, None], Rt[self.bank.which])[:, 0]  # every token has an R of its own
        return y.addmm_(h.to(x.dtype), SUt)


@contextmanager
def held(model):
    """Inside the block v does not change, so R (U S)^T is computed once and not for every token: for sampling. W stays apart, and rounding R (U S)^T
    to bf16 costs what rounding R V^T x costs otherwise (tested). In place, where a CUDA graph looks for it. Inside `many` only R is held."""
    modules = [m for m in model.modules() if isinstance(m, TinyLoRALinear)]
    try:
        with torch.no_grad():
            for m in modules:
                Rt, SUt = m.core().mT, m.US.T
                m.held = (None, m.RSUt.copy_(Rt.double() @ SUt.double())) if m.bank.v is None else (Rt, SUt)
        yield
    finally:
        for m in modules:
            m.held = None


@contextmanager
def many(model, values):
    """Inside the block, rows of one batch may have different v's: values (A, groups, u), and generate(..., which=) says whose v
    each prompt gets. U, S, V and P are shared, so A adapters are served or evaluated at about the cost of one."""
    model.bank.v = values
    try:
        yield
    finally:
        model.bank.v = model.bank.which = None


def random_P(u, rank, seed, index):
    """A module's P_1 ... P_u / sqrt(u), (u, r, r), from a stream of its own.

    Every seed in this project has four words, the first saying what for: numpy folds short keys, so that [5, 3] and
    [5, 3, 3, 1] would be one stream.
    """
    return torch.from_numpy(np.random.RandomState([1, seed, index, 0]).standard_normal((u, rank, rank))) / math.sqrt(u)


def plan(layers, params=None, u=None, n_tie=None, tie="tiled"):
    """Which group each of the 7 * layers modules belongs to: (group of each module, groups, u, n_tie or None).

    Trainable numbers = groups x u. tiled: consecutive modules share; structured: per module type, consecutive
    layers share. Groups follow the paper's rule, index // n_tie, where some n_tie gives their number (13 on 196
    modules: 12 groups of 16 and one of 4), else they are contiguous with sizes that differ by at most one. With
    more numbers than modules, groups = the largest divisor of params that is at most the number of modules.
    (n_tie = ceil(modules / groups) is used where several would do. Figure 1's points at 2, 4 and 7 numbers have
    n_tie 128, 64 and 32: ask for those with --n-tie.) InputError when the wishes do not fit together.
    """
    kinds, span = (1, 7 * layers) if tie == "tiled" else (7, layers)  # `kinds` rows of `span` modules are divided
    for name, value in (("params", params), ("u", u), ("n-tie", n_tie)):
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: must be at least 1")
    if n_tie is not None:
        groups = kinds * math.ceil(span / n_tie)
        u = u or max(1, (params or groups) // groups)
    else:
        asked, params = f"--params {params}" if params else "--params 13 (the default)", params or 13
        fits = [g for g in range(kinds, kinds * span + 1, kinds) if params % g == 0 and u in (None, params // g)]
        if not fits:
            raise InputError(f"{asked} cannot be had with --tie {tie}" + (f" and --u {u}" if u else "")
                             + f": numbers = groups x u, and {tie} groups are {kinds}, {2 * kinds} ... {kinds * span}")
        groups, u = fits[-1], params // fits[-1]
    if params not in (None, groups * u):
        raise InputError(f"--params {params} does not agree with the rest: {groups} groups x u {u} = {groups * u}")
    per = groups // kinds
    rule = n_tie or math.ceil(span / per)
    if math.ceil(span / rule) == per:
        n_tie, row = rule, [i // rule for i in range(span)]
    else:
        row = [i * per // span for i in range(span)]
    if tie == "tiled":
        return row, groups, u, n_tie
    return [kind * per + row[layer] for layer in range(layers) for kind in range(7)], groups, u, n_tie


@torch.no_grad()
def fingerprint(model):
    """sha256 of the config and of 64 evenly spaced values of every weight, each rounded to bf16.

    The rounding makes a checkpoint loaded in fp32 and in bf16 the same base, as it is.
    """
    digest = hashlib.sha256(json.dumps(asdict(model.config), sort_keys=True).encode())
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().flatten()
        index = torch.linspace(0, flat.numel() - 1, min(64, flat.numel()), dtype=torch.float64).long()
        sample = flat[index.to(flat.device)].to(torch.bfloat16).cpu().view(torch.int16).numpy()
        digest.update(name.encode() + sample.tobytes())
    return digest.hexdigest()


def adapt(model, params=None, u=None, n_tie=None, tie="tiled", rank=2, seed=0, method="tinylora", progress=lambda items: items):
    """Freeze the model, put a TinyLoRALinear in the place of all 7 linears of every block; returns v (groups, u), fp32, zeros.

    params: how many numbers to train in all (None: 13, or what u and n_tie make). The settings that an adapter file
    needs are left in model.adapter. method: or "lora-xs", whose sizes follow from the rank. progress: wraps the
    iteration over modules (tqdm). InputError: see plan.
    """
    if hasattr(model, "adapter"):
        raise ValueError("this model carries an adapter already")
    if seed < 0 or seed >= 2**32:
        raise InputError(f"--seed {seed}: must be 0 to {2**32 - 1}")
    c = model.config
    fits = min(c.hidden_size, c.intermediate_size, c.num_key_value_heads * c.head_dim)
    if not 1 <= rank <= fits:  # before P, whose size grows with the rank's square
        raise InputError(f"--rank {rank} does not fit this model's smallest weight: use 1 to {fits}")
    if method == "lora-xs":
        u, n_tie = rank * rank, 1
    group_of, groups, u, n_tie = plan(len(model.layers), params, u, n_tie, tie)
    model.requires_grad_(False)
    weight = model.embed_tokens.weight
    settings = {"method": method, "rank": rank, "u": u, "tie": tie, "n_tie": n_tie or 0, "groups": groups, "seed": seed,
                "targets": ",".join(TARGETS), "base": "meta" if weight.is_meta else fingerprint(model)}
    v = nn.Parameter(torch.zeros(groups, u, dtype=torch.float32, device=weight.device))
    model.bank = SimpleNamespace(v=None, which=None)
    places = [(layer, target) for layer in model.layers for target in TARGETS]

    def wrapped(index):
        layer, target = places[index]
        P = torch.eye(u).view(u, rank, rank) if method == "lora-xs" else random_P(u, rank, seed, index)
        try:
            return TinyLoRALinear(layer.get_submodule(target), v, group_of[index], P, model.bank)
        except InputError as error:
            raise InputError(f"layer {index // len(TARGETS)}, {target}: {error}") from None

    # On a CPU a matrix a thread, not all threads on one matrix: faster, for the products are small, and no sum depends on how many
    # threads there are. 8 at most: each may hold a copy of its matrix in fp32.
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(min(threads, 8), initializer=torch.set_num_threads, initargs=(1,))  # LAPACK asks the thread that calls it
    each = pool.map if weight.device.type == "cpu" else map
    try:
        torch.set_num_threads(1)
        for (layer, target), module in zip(progress(places), each(wrapped, range(len(places)))):
            layer.set_submodule(target, module)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
    model.adapter = settings
    return v


def save(path, v, model, dtype="fp32", base=""):
    """Write v alone, as `dtype`, with model.adapter as metadata, and the base's name as a hint where to look for it."""
    metadata = {"format": "tinylora", "version": VERSION, "model": base} | {k: str(x) for k, x in model.adapter.items()}
    with replacing(path) as temporary:
        temporary.write_bytes(to_bytes({"v": v.detach().flatten().to("cpu", DTYPES[dtype])}, metadata))


def read(path):
    """An adapter file -> (v flat, as stored; model.adapter's settings, and the base's name as "model"). InputError says what is wrong with it."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            if metadata.get("format") != "tinylora" or names != ["v"]:
                raise InputError(f"{path}: is not a TinyLoRA adapter (it should hold one tensor, v, and say so)")
            if metadata.get("version") != VERSION:
                raise InputError(f"{path}: adapter version {metadata.get('version')!r}, this code reads {VERSION!r}")
            v = file.get_tensor("v")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read as an adapter ({error})") from None
    try:
        settings = {k: int(metadata[k]) for k in ("rank", "u", "n_tie", "groups", "seed")} | {k: metadata[k] for k in ("tie", "targets", "base")}
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: its metadata is damaged ({error})") from None
    settings |= {"method": metadata.get("method", "tinylora"), "model": metadata.get("model", "")}  # the first adapters did not say
    if settings["tie"] not in ("tiled", "structured") or settings["method"] not in ("tinylora", "lora-xs") or v.shape != (settings["groups"] * settings["u"],):
        raise InputError(f"{path}: holds {v.numel()} numbers, its metadata says {settings['method']}, {settings['groups']} {settings['tie']} groups x u {settings['u']}")
    if v.dtype not in DTYPES.values() or not v.isfinite().all():
        raise InputError(f"{path}: v must be finite numbers in {', '.join(DTYPES)}")
    return v, settings


@torch.no_grad()
def load(path, model, progress=lambda items: items):
    """Put the adapter in `path` on `model` and return v. A bare model is adapted with the file's own settings; one that
    is adapted already must have the same. InputError says what differs: another base, other settings, a wrong count.
    """
    stored, wish = read(path)
    here = getattr(model, "adapter", None) or {"base": fingerprint(model), "targets": ",".join(TARGETS)}
    differs = [f"{k} is {wish[k]} in the file and {here[k]} here" for k in here if wish[k] != here[k]]
    if differs:
        raise InputError(f"{path}: does not fit this model: {'; '.join(differs)}")
    if not hasattr(model, "adapter"):
        adapt(model, stored.numel(), wish["u"], wish["n_tie"] or None, wish["tie"], wish["rank"], wish["seed"], wish["method"], progress)
    v = model.layers[0].self_attn.q_proj.v
    v.copy_(stored.view_as(v))
    return v


if __name__ == "__main__":
    import export  # it imports this file again, as tinylora
    sys.exit(export.main())
