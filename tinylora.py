"""TinyLoRA: the linear layers of a frozen model's blocks are changed by a few numbers ("Learning to
Reason in 13 Parameters", Morris et al., arXiv 2602.04118, section on TinyLoRA).

    y = W x + b + U S R V^T x,    R = sum_i v_i P_i / sqrt(u)

W is frozen. U S V^T is its truncated SVD of rank r (2 in the paper's main runs), frozen. P_1 to P_u
are fixed random r x r matrices, different for every module. v is all that is trained: u numbers for
each `tie`, the modules that share them. Qwen2.5-7B has 28 x 7 = 196 modules; tied by 16 they form
13 ties (the last has 4), so with u = 1 the whole model trains 13 numbers. v starts at 0: step 0 is
the base model, on a CPU bit for bit. Small steps of v are below bf16's last place, in W and in W x:
nothing is merged into W (merging and taking out alters about 17% of W: TRL #6688), and W x is not
rounded before v's part is added (b + v's part is: docs/efficiency.md).

SCALE. The paper gives neither P's distribution, v's start, a scale nor the modules' order. A new P
for every module and v = 0 are ours; in the authors' fork modules with equal min(in, out) have one
P, and v starts at N(0, 1e-5). Adam moves v by about lr an update, so what counts is lr x scale:

    implementation   delta W                               P entries   an update moves R by about
    this file        U S R V^T                             N(0, 1)     lr: hence the 1/sqrt(u)
    authors' fork    (alpha/r) U R S V^T, alpha/r = 16     N(0, 1)     16 lr
    PEFT             U sqrt(S) R sqrt(S) V^T, R = sum v P  N(0, 1/r)   sqrt(u/r) lr

With S left of R, right of it or on both sides, entry (i, j) of R is weighted by s_i, s_j or
sqrt(s_i s_j): no learning rate undoes that.

LORA-XS (arXiv 2405.17604) trains R itself: u = r^2, nothing tied, P_i has one 1, at entry i, and no
1/sqrt(u): v IS R.

THE FILE. An adapter is a safetensors file of one tensor, v tie by tie, and a header with the
settings of model.adapter. The rest is rebuilt: P from numpy's RandomState, which never changes,
seeded by [1, seed, module number, 0]; U S V^T from the base model's weights as loaded, with a rule
for the signs; a fingerprint, the same in fp32 and bf16, tells whether it is that model.
On another processor, engine or dtype it is the same up to rounding, unless singular values nearly
agree or a column of U sums to about 0.
"""
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save as to_bytes
from tqdm import tqdm

from support.adapter_file import DTYPES, VERSION, check_args, check_settings, check_size, read
from support.checkpoint import fingerprint
from support.directions import ALL, pick
from support.errors import InputError
from support.files import replacing, sorted_header
from support.scaling import scaled

# A block's modules, in the order in which they are numbered and tied.
TARGETS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@torch.no_grad()
def truncated_svd(W, rank):
    """The top singular triplets of W (m, n): U (m, rank), S (rank,), V (n, rank), fp32, residual.

    The residual is 0.0: only an iterative solver has one (fast/lanczos.py). An SVD leaves the sign
    of each pair of columns open, and R's off-diagonal entries would change meaning with it. The
    rule: no column of U has a negative sum. InputError: W holds NaN or infinity.
    """
    m, n = W.shape
    if W.is_meta:  # shapes are enough to count the trainable numbers of a 7B model
        return W.new_empty(m, rank), W.new_empty(rank), W.new_empty(n, rank), 0.0
    W, e = scaled(W)  # 2**e is taken out of W where fp32 may fail
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    U = U[:, :rank]
    S = (S[:rank].double() * 2.0**e).float()
    sign = torch.where(U.double().sum(0) < 0, -1.0, 1.0).to(W)  # (rank,)
    return U * sign, S, Vt[:rank].T * sign, 0.0


def svd(weights, rank):
    """truncated_svd of each weight in turn."""
    for W in weights:
        yield truncated_svd(W, rank)


def added(base, x, change):
    """base(x) + change, rounded once (b + change first): x (..., d_in), change (..., d_out)."""
    if base.bias is not None:
        change = change + base.bias
    W = base.weight
    y = torch.addmm(change.reshape(-1, len(W)), x.reshape(-1, W.shape[1]), W.T)
    return y.view_as(change)


class TinyLoRALinear(nn.Module):
    """A frozen nn.Linear plus U S R V^T. After a change here: --engine plain, or change fast/, too.

    v (ties, u) is one Parameter, shared by all modules of the model; this module reads row `tie`.
    P (u, r, r), with its 1/sqrt(u) if any. factors: U, S, V and residual of truncated_svd.
    """

    def __init__(self, base, v, tie, P, factors):
        super().__init__()
        self.base = base
        self.v = v
        self.tie = tie
        U, S, V, self.residual = factors
        dtype = base.weight.dtype
        self.register_buffer("Vt", V.T.to(dtype).contiguous(), persistent=False)  # (r, d_in)
        self.register_buffer("US", (U * S).to(dtype).contiguous(), persistent=False)  # (d_out, r)
        self.register_buffer("P", P.to(v), persistent=False)  # (u, r, r), in v's dtype: fp32

    def R(self):
        """(r, r), fp32 as v is: rounded to bf16, a small step of v would vanish."""
        return (self.v[self.tie] @ self.P.flatten(1)).view(self.P.shape[1:])

    def forward(self, x):  # (..., d_in) -> (..., d_out)
        R = self.R()
        h = F.linear(x, self.Vt)  # (..., r)
        h = F.linear(h.to(R.dtype), R)  # (..., r), fp32
        return added(self.base, x, F.linear(h.to(x.dtype), self.US))


def random_P(u, rank, seed, index):
    """P_1 ... P_u / sqrt(u) of module number `index`, (u, r, r), from a stream of its own.

    Keys have four words, the first for the use: 1 P, 2 the problems' order, 3 sampling, 4
    evaluation, 5 LoRA's A, 6 ES, 7 the fast engine's check, 8 directions, from 9 tools/, bench/.
    """
    stream = np.random.RandomState([1, seed, index, 0])
    return torch.from_numpy(stream.standard_normal((u, rank, rank))) / math.sqrt(u)


def plan(layers, params=None, u=None, n_tie=None, tying="tiled"):
    """(tie of each module, ties, u, n_tie) of the 7 * layers modules.

    Trained numbers = ties x u; params: how many are wanted (None: 13, or what n_tie and u make).
    n_tie (the paper's name) is a tie's size, not their number; 0: None. tying is the flag --tie.
    tiled: n_tie consecutive modules share; structured: n_tie consecutive layers, per module type.
    As the paper, item i of a sequence has tie i // n_tie, for the smallest n_tie that makes the
    wanted number of ties. If there is none, ties differ in size by at most one, and the n_tie
    returned is None. With more numbers than modules, the number of ties is the largest divisor of
    params up to that (structured: that 7 divides). InputError: no such plan.
    """
    # `kinds` sequences of `length` modules each are cut into ties
    kinds, length = (1, len(TARGETS) * layers) if tying == "tiled" else (len(TARGETS), layers)
    if n_tie:
        ties = kinds * math.ceil(length / n_tie)
        u = u or max(1, (params or ties) // ties)
    else:
        params = params or 13
        possible = range(kinds, kinds * length + 1, kinds)
        fitting = [n for n in possible if params % n == 0 and u in (None, params // n)]
        if not fitting:
            raise InputError(f"--params {params} cannot be had: --tie {tying} --u {u or 'any'} "
                             f"make ties x u, with {kinds}, {2 * kinds} ... {kinds * length} ties")
        ties = fitting[-1]
        u = params // ties
    if params not in (None, ties * u):
        raise InputError(f"--params {params} does not agree with the rest: "
                         f"{ties} ties x u {u} = {ties * u}")

    per_kind = ties // kinds
    size = n_tie or math.ceil(length / per_kind)
    if math.ceil(length / size) == per_kind:
        n_tie = size
        sequence = [i // size for i in range(length)]
    else:
        sequence = [i * per_kind // length for i in range(length)]
    if tying == "tiled":
        return sequence, ties, u, n_tie
    tie_of = [kind * per_kind + sequence[layer] for layer in range(layers) for kind in range(kinds)]
    return tie_of, ties, u, n_tie


def adapt(model, params=None, u=None, n_tie=None, tying="tiled", rank=2, seed=0,
          method="tinylora", svd=svd, directions="top"):
    """Freeze the model and put a TinyLoRALinear in the place of all 7 linears of every block.

    Returns v (ties, u), fp32, zeros: the one trainable tensor. params, u, n_tie, tying: see plan.
    method: "lora-xs" takes its sizes from the rank. svd: the solver, or fast/lanczos.py's.
    directions: see support/directions.py.
    model.adapter gets the settings for the file. InputError: no such plan, or a damaged weight.
    """
    if hasattr(model, "adapter"):
        raise ValueError("this model carries an adapter already")
    check_args(model.config, rank, tying, method, directions)
    if method == "lora-xs":
        u = rank * rank
        n_tie = 1
    tie_of, ties, u, n_tie = plan(len(model.layers), params, u, n_tie, tying)
    check_size(model, len(TARGETS) * len(model.layers), rank, u)

    model.requires_grad_(False)
    like = model.embed_tokens.weight
    base = "meta" if like.is_meta else fingerprint(model)
    v = nn.Parameter(torch.zeros(ties, u, dtype=torch.float32, device=like.device))
    places = [(layer, target) for layer in model.layers for target in TARGETS]
    linears = [layer.get_submodule(target) for layer, target in places]
    # ALL: every singular direction, for support/directions.py to choose from
    factors = svd([linear.weight for linear in linears], rank if directions == "top" else ALL)
    bar = tqdm(places, desc="SVD", unit="matrix", leave=False, disable=None)  # None: off in a pipe
    for index, (layer, target) in enumerate(bar):
        if method == "lora-xs":
            P = torch.eye(u).view(u, rank, rank)
        else:
            P = random_P(u, rank, seed, index)
        try:
            triplets = pick(next(factors), directions, rank, seed, index)
            module = TinyLoRALinear(linears[index], v, tie_of[index], P, triplets)
        except InputError as error:
            raise InputError(f"layer {index // len(TARGETS)}, {target}: {error}") from None
        layer.set_submodule(target, module)
    # in the file "groups" are ties, "tie" is tying, n_tie 0 is None
    model.adapter = {"method": method, "rank": rank, "u": u, "tie": tying, "n_tie": n_tie or 0,
                     "groups": ties, "seed": seed, "targets": ",".join(TARGETS), "base": base}
    if directions != "top":
        model.adapter["directions"] = directions
    return v


def save(path, v, model, dtype="fp32", name=""):
    """Write v as `dtype`; in the header, model.adapter and the base model's name, a hint."""
    metadata = {"format": "tinylora", "version": VERSION, "model": name}
    metadata |= {key: str(value) for key, value in model.adapter.items()}
    flat = v.detach().flatten().to("cpu", DTYPES[dtype])
    with replacing(path) as temporary:
        temporary.write_bytes(sorted_header(to_bytes({"v": flat}, metadata)))


@torch.no_grad()
def load(path, model, svd=svd):
    """Put the adapter in `path` on `model` and return v (ties, u), fp32.

    An adapted model must have the file's settings. InputError: another base, other settings.
    """
    stored, wanted = read(path)
    here = getattr(model, "adapter", None)
    if here is None:
        here = {"base": fingerprint(model), "targets": ",".join(TARGETS)}
    check_settings(path, wanted, here)
    if not hasattr(model, "adapter"):
        adapt(model, stored.numel(), wanted["u"], wanted["n_tie"], wanted["tie"],
              wanted["rank"], wanted["seed"], wanted["method"], svd,
              wanted.get("directions", "top"))
    v = model.layers[0].get_submodule(TARGETS[0]).v
    v.copy_(stored.view_as(v))
    return v


if __name__ == "__main__":
    raise SystemExit("now: python -m tools.export")
