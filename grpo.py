"""GRPO, bare. This docstring is the spec: which GRPO this is, with the paper's values for GSM8K
(arXiv 2602.04118 and its authors' verl fork) in brackets. Learning rate and data are in train.py.

 1. A step takes some problems [64] and samples a group of G responses to each [4], at a
    temperature [1.0], from the full softmax: no top-k, no top-p. model.logits drops, for both
    sampler and trainer, the ids that the tokenizer lacks.
 2. Each prompt is prefilled once and its cache copied to the group. A response ends with the first
    stop token (support/chat_format.py), which is part of it: stopping is learned like any other
    token. A response that is cut at the limit counts like any other.
 3. Randomness is one uniform number per row and token, given by the caller (a numpy RandomState per
    row) and turned into a token through the inverse CDF: a row's text depends, up to rounding,
    neither on what shares its batch nor on the machine.
 4. The sampler IS the trainer's policy: the same weights and formula, nothing merged, sums in
    another order. So the old log-probs are the sampler's, at the same temperature. Their mean
    |difference| from the trainer's, before a step's first update, is logged as `gap`: rounding.
    [vLLM, merged weights, corrected by truncated importance sampling, cap 2]
 5. Advantage A = (reward - group mean) / (group std + 1e-6), sample std; exactly 0 in a group of
    equal rewards.
 6. Loss = -min(ratio A, clip(ratio, 1 - low, 1 + high) A) [0.2, 0.4] per token, ratio = new / old
    probability, summed and divided by ONE number, the count of response tokens in the mini-batch
    (as DAPO): all tokens weigh the same, however the rows are cut into micro-batches. [Means of
    micro-batches, weighted by their rows; where A < 0, a ratio of at most 3]
 7. No KL by default. kl > 0 [MATH: 0.001] adds kl x the k3 estimator of the KL to the reference,
    the policy that training started from (the base model or --adapter), to each token's loss.
 8. A step's problems are split into mini-batches [2 of 32 problems], one Adam update each (0.9,
    0.999, eps 1e-8) without weight decay [0.01]. Without KL, rows of advantage 0 skip their
    forward pass: they count in 6's denominator, but not in the logged gap and clip fraction.
 9. The gradient is clipped to a norm [1.0]. v (tinylora.py) and Adam's state are fp32; with
    --v-dtype bf16 or fp16 v is rounded to that type after each update: small steps may be lost.

Shapes: P prompts, G responses to each (a group), B = P * G rows, T response tokens, C hidden size.
"""
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from model import Cache, log_softmax, pad, upcast
from support import ranks
from support.errors import InputError
from tinylora import DTYPES, svd  # noqa: F401 (svd: an engine has one)

CHECK_EVERY = 4  # tokens between checks for the end: then the host waits for the device
HEAD_CHUNK = 1024  # response tokens whose logits exist at once in the trainer


@dataclass
class Rollout:
    """Responses of a policy, a row each; as generated, row p * G + g is response g to prompt p."""
    prompts: list  # B lists of token ids; the rows of a group repeat their prompt
    ids: torch.Tensor  # (B, T) response tokens, 0 outside the mask
    mask: torch.Tensor  # (B, T) bool, true up to and including one stop token
    logp: torch.Tensor  # (B, T) the sampler's log-probs of ids (the "old" ones), 0 outside
    temperature: float  # at which ids were drawn (0: greedily, with log-probs at 1)
    advantage: torch.Tensor | None = None  # (B,)
    ref_logp: torch.Tensor | None = None  # (B, T) log-probs under the KL's reference policy

    def __post_init__(self):
        if not len(self.prompts) == len(self.ids) == len(self.mask) == len(self.logp):
            raise ValueError(f"{len(self.prompts)} prompts for {len(self.ids)} rows: repeat each "
                             f"prompt for its group")

    def rows(self, index):
        """The rows of a list of numbers, cut to their longest response."""
        at = torch.tensor(index, device=self.ids.device)
        width = int(self.mask[at].sum(1).max())
        chosen = {name: x[at] for name, x in vars(self).items() if torch.is_tensor(x)}
        chosen = {name: x[:, :width] if x.dim() == 2 else x for name, x in chosen.items()}
        return replace(self, prompts=[self.prompts[i] for i in index], **chosen)

    def split(self, parts):
        """`parts` rollouts of consecutive rows."""
        bounds = [len(self.ids) * i // parts for i in range(parts + 1)]
        return [self.rows(list(range(start, end))) for start, end in zip(bounds, bounds[1:])]

    @staticmethod
    def join(chunks):
        """Rollouts one below the other, padded to the longest response."""
        width = max(chunk.ids.shape[1] for chunk in chunks)
        stacked = {}
        for name in ("ids", "mask", "logp"):  # as generated: nothing else is set yet
            tensors = [getattr(chunk, name) for chunk in chunks]
            stacked[name] = torch.cat([F.pad(x, (0, width - x.shape[1])) for x in tensors])
        prompts = [prompt for chunk in chunks for prompt in chunk.prompts]
        return Rollout(prompts, **stacked, temperature=chunks[0].temperature)


def uniforms(keys, length):
    """Sampling noise in [0, 1), (len(keys), length): a numpy stream per row, seeded by its key."""
    return np.stack([np.random.RandomState(key).random_sample(length) for key in keys])


def draw(logp, uniform):
    """Tokens (B,) from log-probs (B, vocab): the inverse CDF at uniform (B,), fp64 in [0, 1).

    `right=True` finds the first token whose cumulated probability EXCEEDS the point, so a token of
    probability 0, which adds nothing, is never drawn.
    """
    cdf = logp.exp().double().cumsum_(-1)  # (B, vocab)
    total = cdf[:, -1:]  # 1 up to rounding
    below = total.nextafter(torch.zeros_like(total))  # a point at `total` would fall off the end
    point = torch.minimum(uniform[:, None] * total, below)  # (B, 1)
    tokens = torch.searchsorted(cdf, point, right=True)[:, 0]
    return tokens.clamp(max=logp.shape[1] - 1)  # only NaN logits get that far


def sample(logits, temperature, uniform):
    """Next tokens (B,) and their log-probs (B,) from logits (B, vocab).

    Temperature 0: the most likely token, and its log-prob at temperature 1.
    """
    logp = log_softmax(logits, temperature or 1.0)
    token = draw(logp, uniform) if temperature > 0 else logp.argmax(-1)
    return token, logp.gather(1, token[:, None])[:, 0]


def noise_tensor(noise, shape, temperature, device):
    """The caller's noise as an fp64 tensor, or None for greedy decoding; ValueError if unfit."""
    if temperature == 0:
        return None
    if noise is None or len(noise) != shape[0] or len(noise[0]) < shape[1]:
        raise ValueError(f"temperature {temperature} needs noise of shape {shape}; 0 is greedy")
    return torch.as_tensor(noise, dtype=torch.float64, device=device)


def check_finite(values, what):
    if not values.isfinite().all():
        raise InputError(f"the {what} is not finite: lower --lr, or bring --temperature near 1")


@torch.no_grad()
def generate(model, prompts, group, max_new_tokens, stop_ids, temperature, noise=None,
             progress=None):
    """Sample `group` responses to each of P prompts (lists of ids) -> Rollout of P * group rows.

    noise (B, >= max_new_tokens): see uniforms; unused at temperature 0, greedy decoding.
    progress(tokens so far, rows that have ended) is called every CHECK_EVERY tokens.
    ValueError: a temperature without noise. InputError: log-probs that are not finite.
    """
    device = model.embed_tokens.weight.device
    B = len(prompts) * group
    noise = noise_tensor(noise, (B, max_new_tokens), temperature, device)
    stops = torch.tensor(sorted(stop_ids), device=device)

    # prefill: a prompt's last state predicts the first response token
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (P,)
    cache = Cache(model, len(prompts), max(map(len, prompts)))
    hidden = model.hidden(pad(prompts, device), cache, lengths)  # (P, longest prompt, C)
    hidden = hidden[torch.arange(len(prompts), device=device), lengths - 1]  # (P, C)

    cache.repeat(group, max_new_tokens)
    hidden = hidden.repeat_interleave(group, 0)  # (B, C)

    ids = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    logp = torch.zeros(B, max_new_tokens, dtype=upcast(hidden).dtype, device=device)
    done = torch.zeros(B, dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        uniform = None if noise is None else noise[:, t]
        token, token_logp = sample(model.logits(hidden), temperature, uniform)  # (B,) each
        ids[:, t] = token.masked_fill(done, 0)
        mask[:, t] = ~done  # the stop token itself is still part of the response
        logp[:, t] = token_logp.masked_fill(done, 0)
        done = done | torch.isin(token, stops)
        if t + 1 == max_new_tokens:
            break
        if (t + 1) % CHECK_EVERY == 0:
            ended = int(done.sum())
            if progress:
                progress(t + 1, ended)
            if ended == B:
                break
        hidden = model.hidden(token[:, None], cache)[:, 0]  # (B, C); ended rows too
    check_finite(logp, "log-prob of a sampled token")
    prompts = [prompt for prompt in prompts for _ in range(group)]
    return Rollout(prompts, ids[:, :t + 1], mask[:, :t + 1], logp[:, :t + 1], temperature)


def logprobs(model, rollout, recompute=False):
    """The trainer's log-probs of a rollout's responses, (B, T), 0 outside the mask.

    The head runs on response positions, in chunks whose logits are computed again in the backward
    pass: a whole batch's never exist at once. recompute: see model.hidden.
    """
    mask = rollout.mask
    device = mask.device
    T = mask.shape[1]
    start = torch.tensor([len(prompt) for prompt in rollout.prompts], device=device)  # (B,)
    column = start[:, None] + torch.arange(T, device=device)  # (B, T): place of token t
    ids = F.pad(pad(rollout.prompts, device), (0, T)).scatter(1, column, rollout.ids)  # (B, L)
    hidden = model.hidden(ids, lengths=start + mask.sum(1), recompute=recompute)  # (B, L, C)
    row = torch.arange(len(mask), device=device)[:, None]  # (B, 1)
    hidden = hidden[row, column - 1][mask]  # (N, C): the state before each of N tokens predicts it
    target = rollout.ids[mask]  # (N,)

    def head(hidden, target):
        logp = log_softmax(model.logits(hidden), rollout.temperature or 1.0)
        return logp.gather(1, target[:, None])[:, 0]
    chunks = zip(hidden.split(HEAD_CHUNK), target.split(HEAD_CHUNK))
    flat = torch.cat([checkpoint(head, h, t, use_reentrant=False) for h, t in chunks])
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def advantages(rewards):
    """(P, G) -> (P, G): item 5 of the spec; 0 where all rewards of a group are equal, or G is 1."""
    centred = rewards - rewards.mean(1, keepdim=True)
    # not .std(), which warns and gives NaN for a group of 1
    std = rewards.var(1, keepdim=True, correction=min(1, rewards.shape[1] - 1)).sqrt()
    # compared, not computed: the mean of equal rewards may differ from them by rounding
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return torch.where(equal, 0.0, centred / (std + 1e-6))


def k3(logp, ref_logp):
    """Schulman's estimator of the KL to the reference, per token."""
    return (ref_logp - logp).exp() - (ref_logp - logp) - 1


def grpo_loss(logp, batch, denominator, args):
    """Items 6 and 7 of the spec, a scalar. logp (B, T): the trainer's, of the rows of `batch`."""
    advantage = batch.advantage[:, None]  # (B, 1)
    ratio = (logp - batch.logp).exp()  # (B, T)
    clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    if args.kl > 0:
        loss = loss + args.kl * k3(logp, batch.ref_logp)
    return torch.where(batch.mask, loss, 0.0).sum() / denominator


@torch.no_grad()
def statistics(logp, batch, args):
    """Sums over the tokens of `batch`, (4,) fp64: 1, |logp - old logp|, 1 if it is clipped, k3."""
    mask = batch.mask
    delta = (logp - batch.logp)[mask]  # (N,)
    advantage = batch.advantage[:, None].expand_as(mask)[mask]  # (N,)
    too_high = (advantage > 0) & (delta.exp() > 1 + args.clip_high)
    too_low = (advantage < 0) & (delta.exp() < 1 - args.clip_low)
    n_clipped = (too_high | too_low).sum()
    kl = k3(logp, batch.ref_logp)[mask].sum() if args.kl > 0 else delta.new_zeros(())
    return torch.stack([x.double() for x in (mask.sum(), delta.abs().sum(), n_clipped, kl)])


def accumulate(terms_of, mini_batch, index, budget):
    """Cut the rows in `index` into micro-batches; add up the tensors terms_of(micro_batch) returns.

    A micro-batch has as many rows as fit into `budget` tokens, with padding, or one. No rows: None.
    """
    lengths = mini_batch.mask.sum(1).tolist()
    index = sorted(index, key=lambda row: -lengths[row])  # rows of like length: little padding
    longest = max(map(len, mini_batch.prompts))
    sums = None
    while index:
        size = max(1, budget // (longest + lengths[index[0]]))
        terms = terms_of(mini_batch.rows(index[:size]))
        sums = terms if sums is None else [x + y for x, y in zip(sums, terms)]
        index = index[size:]
    return sums


def update(model, optimizer, mini_batch, args, engine, loss=grpo_loss):
    """One Adam update from one mini-batch, at the learning rate set in the optimizer.

    args: clip_low, clip_high, kl, grad_clip, v_dtype, tokens_per_micro_batch and recompute of
    train.py's flags. engine: the module with logprobs and accumulate, this one or fast.
    Returns this rank's "sums" (see statistics) and "loss" (logged for SFT), and "grad_norm".
    """
    params = optimizer.param_groups[0]["params"]
    [tokens] = ranks.total(int(mini_batch.mask.sum()))  # of all ranks: gradients add up
    index = [i for i, a in enumerate(mini_batch.advantage.tolist()) if args.kl > 0 or a != 0]

    def terms_of(micro_batch):  # what is summed: gradients, statistics, loss
        logp = engine.logprobs(model, micro_batch, args.recompute)
        value = loss(logp, micro_batch, tokens, args)
        gradients = torch.autograd.grad(value, params)
        return [*gradients, statistics(logp, micro_batch, args), value.detach().double()]

    sums = engine.accumulate(terms_of, mini_batch, index, args.tokens_per_micro_batch)
    if sums is None:  # no row had a signal; Adam still moves v by its momentum
        sums = [torch.zeros_like(p) for p in params] + [torch.zeros(4), torch.zeros(())]
    *gradients, counted, value = sums
    for p, gradient in zip(params, gradients):
        p.grad = gradient
    norm = optimizer_step(optimizer, args)
    return {"sums": counted.tolist(), "loss": value.item(), "grad_norm": norm}


def optimizer_step(optimizer, args):
    """Sum gradients over the ranks, clip, step, round to v_dtype; returns the unclipped norm."""
    params = optimizer.param_groups[0]["params"]
    ranks.add_gradients(params)
    norm = torch.nn.utils.clip_grad_norm_(params, args.grad_clip)
    check_finite(norm, "gradient")
    optimizer.step()
    with torch.no_grad():
        for p in params:
            p.copy_(p.to(DTYPES[args.v_dtype]))
    return norm.item()
