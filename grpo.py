"""GRPO, bare. This docstring is the spec: which GRPO this is, with the paper's values for GSM8K (arXiv 2602.04118 and
its fork's scripts) in brackets.

 1. A step takes some problems [64] and samples a group of G responses to each [4], at temperature T [1.0], from the
    full softmax: no top-k, no top-p. Ids that the tokenizer does not have are cut off, here and in the trainer.
 2. Each prompt is prefilled once and its group reads the one cache; each row draws its own first token. A response
    ends with the first stop token, which counts as part of it: stopping is learned like any other token. The trainer
    computes each prompt once as well.
 3. Randomness is one uniform number per row and token, given by the caller (train.py takes it from numpy's
    RandomState, one stream per row) and turned into a token through the inverse of the CDF, so a row's text does
    not depend on what it shares a batch with (but for rounding), and the stream is the same on every machine and version.
 4. The sampler IS the trainer's policy: one model, one forward, the adapter never merged. So the old log-probs are
    the sampler's own, at the same temperature; their mean distance from the trainer's, before the first update of a
    step, is logged as `gap` and should be rounding noise. (The paper samples from a merged copy in vLLM and needs
    truncated importance sampling for the difference; here the ratio itself is that correction.)
 5. Advantage = (reward - group mean) / (group std + 1e-6), sample std; exactly 0 in a group of equal rewards.
 6. Loss = -min(ratio A, clip(ratio, 1 - low, 1 + high) A) [0.2, 0.4] per token, summed over tokens and divided by ONE
    number, all response tokens of the optimizer's batch (token level, as DAPO): no 1/|o| length bias, no mean of
    means, the same gradient for any micro-batch size.
 7. No KL by default. kl > 0 [MATH: 0.001] adds kl x the k3 estimator to each token, to the policy that training
    started from: the base model, v = 0, or what --adapter brought.
 8. A step's problems are split into mini-batches [2 of 32], one Adam update each [AdamW 0.9, 0.999; no weight decay].
    Groups without signal are skipped before their forward pass; their tokens still count in 6's denominator, so the
    skip changes nothing but the time. (With kl > 0 nothing is skipped.)
 9. The gradient is clipped to a norm [1.0]. v and Adam's state are fp32; with --v-dtype bf16 or fp16 the value kept
    after each update is rounded to that type.

`params` below is the list of trained tensors: [v] for TinyLoRA, A and B of every layer for LoRA, all weights for full
finetuning. sft_update is what GRPO is compared with: the likelihood of given responses, through the same log-probs.
"""
import math
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

import ranks
import tinylora
from cache import Cache, Prefix
from files import InputError
from model import upcast

HEAD_CHUNK = 1024  # response tokens whose logits exist at once in the trainer


def pad(rows, device):
    """Lists of ids -> (B, T) padded with 0 on the right. The padding is found by lengths, never by its value."""
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)


def uniforms(keys, length):
    """(len(keys), length) sampling noise, a numpy stream per row, seeded by its key: the same on every machine, whatever shares the batch."""
    return np.stack([np.random.RandomState(key).random_sample(length) for key in keys])


def log_softmax(logits, temperature):
    """The policy's log-probs, (..., vocab), in fp32 whatever the model's dtype."""
    logits = upcast(logits)
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)  # a division is a copy of what may be gigabytes


def draw(logp, uniform):
    """Tokens (B,) from log-probs (B, vocab): inverse CDF of uniform (B,) in [0, 1), fp64; None takes the best.

    `right=True` finds the first token whose cumulated probability EXCEEDS the point, so a token of probability 0,
    which adds nothing, is never drawn; the clamp keeps rounding from walking off the end.
    """
    if uniform is None:
        return logp.argmax(-1)
    cdf = logp.exp().double().cumsum_(-1)
    total = cdf[:, -1:]
    point = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cdf, point, right=True)[:, 0].clamp(max=logp.shape[1] - 1)  # NaN logits fall off the end


def sample(logits, temperature, uniform):
    """Tokens (B,), as draw takes them, and their log-probs (B,), fp32. On a CPU some rows at a time, whose numbers its cache holds."""
    some, tokens, logprobs = len(logits) if logits.is_cuda else max(1, 2**18 // logits.shape[1]), [], []
    for start in range(0, len(logits), some):
        logp = log_softmax(logits[start:start + some], temperature)
        tokens.append(draw(logp, None if uniform is None else uniform[start:start + some]))
        logprobs.append(logp.gather(1, tokens[-1][:, None])[:, 0].float())
    return torch.cat(tokens), torch.cat(logprobs)


@torch.no_grad()
def generate(model, prompts, group, max_new_tokens, stop_ids, temperature=1.0, noise=None, vocab=None, which=None, check_every=4, progress=None):
    """Sample `group` responses to each of P prompts (lists of ids); row p * group + g is sample g of prompt p.

    noise (P * group, >= max_new_tokens): uniform numbers in [0, 1), numpy or tensor; None decodes greedily. which (P,): each
    prompt's adapter, inside tinylora.many.
    Returns ids (B, T), mask (B, T) bool, true up to and including one stop token, and logprobs (B, T) fp32 of
    the drawn ids at this temperature, 0 where masked. The host looks at the device only every `check_every`
    tokens: it stops when all rows are done, drops finished rows from the batch when they are many, and calls progress(tokens
    so far, rows done), if given.
    """
    device = model.embed_tokens.weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    cache = Cache(model, len(prompts), max(map(len, prompts)))
    cache.which = which if which is None else torch.as_tensor(which, device=device)
    hidden = model.hidden(pad(prompts, device), cache, lengths)
    rows = torch.arange(len(prompts), device=device).repeat_interleave(group)  # (B,)
    hidden = hidden[rows, lengths[rows] - 1]  # (B, C): each row's last real token
    graphs = model.graphs if which is None else None  # on a GPU, when asked for: graph.py; the rest of the loop is the same
    cache = cache.share(rows, max_new_tokens) if graphs is None else graphs.share(cache, rows, max_new_tokens)
    B = len(rows)
    rows = torch.arange(B, device=device)  # which rows of the result are still in the batch
    noise = None if noise is None else torch.as_tensor(noise, dtype=torch.float64, device=device)
    stops = torch.tensor(sorted(stop_ids), device=device)
    ids = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    mask = torch.zeros(B, max_new_tokens, dtype=torch.bool, device=device)
    logprobs = torch.zeros(B, max_new_tokens, device=device)
    done = torch.zeros(B, dtype=torch.bool, device=device)
    with torch.inference_mode(), tinylora.held(model):  # (what is written in place here was made outside and stays an ordinary tensor)
        for t in range(max_new_tokens):
            logits = model.logits(hidden, vocab)
            token, logp = sample(logits, 1.0, None) if noise is None else sample(logits, temperature, noise[rows, t])
            ids[rows, t] = token.masked_fill(done, 0)
            mask[rows, t] = ~done
            logprobs[rows, t] = logp.masked_fill(done, 0)
            done = done | torch.isin(token, stops)
            if t + 1 == max_new_tokens:
                break
            if t % check_every == check_every - 1:
                left = (~done).nonzero()[:, 0]  # the host waits for the device here and in keep, nowhere else
                if progress:
                    progress(t + 1, B - len(left))
                if len(left) == 0:
                    break
                if len(left) < 0.75 * len(rows):
                    rows, token, done, cache = rows[left], token[left], done[left], cache.keep(left)
            hidden = model.hidden(token[:, None], cache)[:, 0] if graphs is None else graphs.hidden(token)
    T = t + 1
    if not logprobs.isfinite().all():
        raise InputError("the model's log-probs are not finite: v has grown too large (lower --lr), or --temperature is extreme")
    return ids[:, :T], mask[:, :T], logprobs[:, :T]


def logprobs(model, prompts, ids, mask, temperature=1.0, vocab=None, recompute=False):
    """The trainer's log-probs of the responses: prompts (B lists of ids), ids and mask (B, T) -> (B, T), 0 where masked.

    One pass over the prompts, each once for all the rows that have it, and one over the responses, which see their
    prompt's keys; both are padded on the right. The head runs on response positions only, in chunks whose logits are
    rebuilt in the backward pass, so logits for a whole batch never exist at once. recompute: activation
    checkpointing of the blocks, for long responses.
    """
    device = ids.device
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    rows = torch.tensor([number[tuple(p)] for p in prompts], device=device)  # (B,): which prompt each row continues
    lengths = torch.tensor([len(p) for p in number], device=device)
    padded = pad([list(p) for p in number], device)
    prefix = Prefix(*padded.shape, device)
    hidden = model.hidden(padded, prefix, lengths, recompute)[rows, lengths[rows] - 1][:, None]  # (B, 1, C): what predicts token 0
    if (T := ids.shape[1] - 1) > 0:
        rest = model.hidden(ids[:, :-1], prefix.share(rows, T), mask.sum(1) - 1, recompute)  # (B, T - 1, C)
        hidden = torch.cat((hidden, rest), 1)  # position t predicts token t
    hidden, target = hidden[mask], ids[mask]  # (N, C), (N,)

    def head(hidden, target):
        logp = log_softmax(model.logits(hidden, vocab), temperature)
        return logp.gather(1, target[:, None])[:, 0]

    flat = torch.cat([checkpoint(head, h, t, use_reentrant=False) for h, t in zip(hidden.split(HEAD_CHUNK), target.split(HEAD_CHUNK))])
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def advantages(rewards):
    """(P, G) -> (P, G): standardised within each group; exactly 0 where all rewards are equal (or G is 1)."""
    centred = rewards - rewards.mean(1, keepdim=True)
    level = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return torch.where(level, 0.0, centred / (rewards.var(1, keepdim=True, correction=min(1, rewards.shape[1] - 1)).sqrt() + 1e-6))


def k3(logp, base_logp):
    """Schulman's estimator of the KL to the base, per token: unbiased, never negative."""
    return (base_logp - logp).exp() - (base_logp - logp) - 1


def grpo_loss(logp, old_logp, advantage, mask, denominator, clip_low=0.2, clip_high=0.4, kl=0.0, base_logp=None):
    """A scalar: items 6 and 7 of the spec. logp, old_logp, base_logp, mask (B, T); advantage (B,); denominator: tokens."""
    ratio, advantage = (logp - old_logp).exp(), advantage[:, None]
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
    if kl > 0:
        loss = loss + kl * k3(logp, base_logp)
    return torch.where(mask, loss, 0.0).sum() / max(denominator, 1)


def micro_batches(prompts, lengths, rows, tokens):
    """Rows cut into micro-batches of at most `tokens` tokens (or a single row), a prompt that rows share counted once.

    prompts: one list of ids per row; lengths: of the responses. Rows of one prompt stay together as far as they fit; groups
    with long responses come first, so that what attention pads to one width is of like length.
    """
    longest = {}
    for row in rows:
        longest[tuple(prompts[row])] = max(lengths[row], longest.get(tuple(prompts[row]), 0))
    batch, some, total = [], set(), 0
    for row in sorted(rows, key=lambda i: (-longest[tuple(prompts[i])], prompts[i], -lengths[i])):
        prompt = tuple(prompts[row])
        if batch and total + lengths[row] + len(prompt) * (prompt not in some) > tokens:
            yield batch
            batch, some, total = [], set(), 0
        total += lengths[row] + len(prompt) * (prompt not in some)
        batch.append(row)
        some.add(prompt)
    if batch:
        yield batch


@contextmanager
def with_values(params, values):
    """Inside the block the trained tensors hold other values; an interrupt must not leave them so."""
    kept = [p.detach().clone() for p in params]
    try:
        for p, value in zip(params, values):
            p.detach().copy_(value)
        yield
    finally:
        for p, value in zip(params, kept):
            p.detach().copy_(value)


def optimizer_step(params, optimizer, lr, grad_clip, v_dtype):
    """Add up over the ranks, clip, step, round to v_dtype; returns the gradient's norm. InputError when that is not finite."""
    ranks.add_gradients(params)
    norm = torch.nn.utils.clip_grad_norm_(params, grad_clip).item()
    if not math.isfinite(norm):
        raise InputError("the gradient is not finite: v has grown too large (lower --lr), or --temperature is extreme")
    for settings in optimizer.param_groups:
        settings["lr"] = lr
    optimizer.step()
    for p in params:
        p.detach().copy_(p.detach().to(v_dtype))
    return norm


def total_norm(params):
    return sum(p.detach().double().square().sum().item() for p in params)**0.5


def accumulate(params, prompts, mask, rows, micro_tokens, backward):
    """p.grad = the sum of what backward(rows of a micro-batch, (b,); their width) adds; returns (its results, micro_tokens).

    When memory runs out the budget is halved, until it fits or a micro-batch is a single row, and the gradient starts anew.
    """
    lengths = mask.sum(1).tolist()
    while True:
        batches = list(micro_batches(prompts, lengths, rows, micro_tokens))
        for p in params:
            p.grad = torch.zeros_like(p)
        try:
            return [backward(torch.tensor(batch, device=mask.device), max(lengths[i] for i in batch)) for batch in batches], micro_tokens
        except torch.OutOfMemoryError:
            if all(len(batch) == 1 for batch in batches):
                raise
        micro_tokens //= 2  # outside the except block, which would hold on to the failed pass's tensors
        torch.cuda.empty_cache()


def update(model, params, optimizer, prompts, ids, mask, old_logp, advantage, *, lr, minibatches=1, temperature=1.0, vocab=None, clip_low=0.2,
           clip_high=0.4, kl=0.0, reference=None, grad_clip=1.0, micro_tokens=2048, recompute=False, v_dtype=torch.float32):
    """One step's updates on params. prompts: one list of ids per row; ids, mask, old_logp (B, T), advantage (B,), from the rollout.

    lr: one learning rate per update. reference: params' values in the policy that kl > 0 holds on to. Rows are split into
    `minibatches` parts in order (keep groups together: B and the group must divide). micro_tokens: see accumulate. Returns
    metrics over what was seen: gap (None: no row had a signal), clip_fraction, kl, entropy, grad_norm, v_norm (of all params
    together), micro_tokens (what fitted).
    """
    B, weight = len(prompts), advantage.tolist()
    seen, gap, norms = torch.zeros(3, dtype=torch.float64), (0.0, 0), []  # tokens, clipped ones, their KL; distance and tokens
    bounds = [B * i // minibatches for i in range(minibatches + 1)]
    for part, (start, end) in enumerate(zip(bounds, bounds[1:])):
        denominator, = ranks.total(int(mask[start:end].sum()))  # of all ranks' rows, or many would not do what one does

        def backward(at, width):
            m, old, adv = mask[at, :width], old_logp[at, :width], advantage[at]
            inputs = [prompts[i] for i in at.tolist()], ids[at, :width], m, temperature, vocab
            base_logp = None
            if kl > 0:
                with torch.no_grad(), with_values(params, reference):
                    base_logp = logprobs(model, *inputs)
            logp = logprobs(model, *inputs, recompute)
            grpo_loss(logp, old, adv, m, denominator, clip_low, clip_high, kl, base_logp).backward()
            with torch.no_grad():
                delta, up = (logp - old)[m], adv[:, None].expand_as(old)[m] > 0
                clipped = torch.where(up, delta.exp() > 1 + clip_high, delta.exp() < 1 - clip_low).sum()
                return [len(delta), clipped.item(), 0.0 if base_logp is None else k3(logp, base_logp)[m].sum().item()], delta.abs().sum().item()

        rows = [i for i in range(start, end) if kl > 0 or weight[i] != 0]
        results, micro_tokens = accumulate(params, prompts, mask, rows, micro_tokens, backward)
        seen += sum(torch.tensor(counts, dtype=torch.float64) for counts, _ in results)
        if part == 0 and results:  # before any update: what remains between sampler and trainer is rounding
            gap = sum(distance for _, distance in results), seen[0].item()
        norms.append(optimizer_step(params, optimizer, lr[part], grad_clip, v_dtype))
    # the mean of -log p over what was drawn from p: the entropy per token, estimated over all rows, skipped ones too
    surprise, drawn = -old_logp[mask].double().sum().item(), int(mask.sum())
    distance, first, tokens, clipped, divergence, surprise, drawn = ranks.total(*gap, *seen.tolist(), surprise, drawn)
    return {"gap": distance / first if first else None, "clip_fraction": clipped / max(tokens, 1), "kl": divergence / max(tokens, 1),
            "entropy": surprise / drawn, "grad_norm": sum(norms) / len(norms), "v_norm": total_norm(params), "micro_tokens": micro_tokens}


def sft_update(model, params, optimizer, prompts, ids, mask, *, lr, minibatches=1, vocab=None, grad_clip=1.0, micro_tokens=2048,
               recompute=False, v_dtype=torch.float32):
    """One step's updates by supervised finetuning: the mean -log p of all tokens under mask (responses, stop token included).

    prompts: one list of ids per row; ids, mask (B, T); lr, minibatches and micro_tokens as in update. Returns metrics: loss
    (nats per token, over the step), grad_norm, v_norm, micro_tokens.
    """
    total, norms = 0.0, []
    bounds = [len(prompts) * i // minibatches for i in range(minibatches + 1)]
    for part, (start, end) in enumerate(zip(bounds, bounds[1:])):
        denominator, = ranks.total(int(mask[start:end].sum()))

        def backward(at, width):
            loss = -logprobs(model, [prompts[i] for i in at.tolist()], ids[at, :width], mask[at, :width], vocab=vocab, recompute=recompute).sum()
            (loss / denominator).backward()
            return loss.item()

        results, micro_tokens = accumulate(params, prompts, mask, range(start, end), micro_tokens, backward)
        total += sum(results)
        norms.append(optimizer_step(params, optimizer, lr[part], grad_clip, v_dtype))
    total, tokens = ranks.total(total, int(mask.sum()))
    return {"loss": total / tokens, "grad_norm": sum(norms) / len(norms), "v_norm": total_norm(params), "micro_tokens": micro_tokens}
