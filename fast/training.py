"""Training: the numbers of grpo.logprobs and grpo.accumulate, sooner.

One pass over the prompts, each once for all the rows that have it, and one over the responses,
which read their prompt's keys. On a CPU micro-batches are computed side by side
(support/threads.py).
"""
import math

import torch

import grpo
from fast.forward import forward, project
from fast.head import token_logps
from fast.passes import Responses, prefill, to_grid
from support import threads

FEW = 256  # tokens, below which a micro-batch is not cut for the sake of another core


def logprobs(model, rollout, recompute=False):
    """As grpo.logprobs: (B, T), 0 where masked."""
    mask = rollout.mask
    B, T = mask.shape
    device = mask.device
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, rollout.prompts)))}
    prompt_of = torch.tensor([number[tuple(p)] for p in rollout.prompts], device=device)  # (B,)

    prompts, hidden = prefill(model, list(number), project, recompute)  # (P, C)
    hidden = hidden[prompt_of][:, None]  # (B, 1, C): predicts each row's first token
    if T > 1:  # all tokens but a row's last predict the next one
        responses = Responses(model, prompts, prompt_of, mask.sum(1) - 1, T - 1)
        ids = rollout.ids[:, :-1][responses.real]  # (N',)
        rest = forward(model, ids, responses.positions, responses.attend, project, recompute)
        rest = to_grid(rest, responses.place, B, T - 1)  # (B, T - 1, C)
        hidden = torch.cat((hidden, rest), 1)  # (B, T, C): position t predicts token t
    hidden = hidden[mask]  # (N, C)
    target = rollout.ids[mask]  # (N,)
    flat = token_logps(model, hidden, target, rollout.temperature or 1.0)  # (N,)
    return flat.new_zeros(B, T).masked_scatter(mask, flat)


def micro_batches(rollout, rows, tokens):
    """Row numbers in lists of at most `tokens` tokens each (or of one row), a prompt counted once.

    Rows of one prompt stay together as far as they fit. Groups with long responses come first, so
    that rows which attention pads to one width are of like length.
    """
    lengths = rollout.mask.sum(1).tolist()
    prompts = [tuple(prompt) for prompt in rollout.prompts]
    longest = {}  # of each prompt's responses
    for row in rows:
        longest[prompts[row]] = max(lengths[row], longest.get(prompts[row], 0))
    batch = []
    inside = set()  # the batch's prompts
    total = 0  # its tokens
    for row in sorted(rows, key=lambda i: (-longest[prompts[i]], prompts[i], -lengths[i])):
        prompt = prompts[row]
        cost = lengths[row] + (0 if prompt in inside else len(prompt))
        if batch and total + cost > tokens:
            yield batch
            batch = []
            inside = set()
            total = 0
            cost = lengths[row] + len(prompt)
        batch.append(row)
        inside.add(prompt)
        total += cost
    if batch:
        yield batch


def share(rollout, rows):
    """Tokens a micro-batch, so that there are threads.parts of them, but not of few tokens each."""
    if threads.parts == 1:
        return math.inf
    prompts = {tuple(rollout.prompts[row]) for row in rows}
    total = sum(map(len, prompts)) + int(rollout.mask[rows].sum())
    size = max(FEW, total / threads.parts)
    while len(list(micro_batches(rollout, rows, size))) > threads.parts:
        size *= 1.05  # a split group's prompt counts twice, and rows are not cut
    return size


fitting = float("inf")  # tokens a micro-batch: lowered when memory ran out, for the rest of the run


def accumulate(terms_of, mini_batch, index, budget):
    """As grpo.accumulate. When memory runs out, it begins anew with micro-batches half as large."""
    global fitting
    budget = min(budget, share(mini_batch, index))
    while True:
        batches = list(micro_batches(mini_batch, index, min(budget, fitting)))
        sums = None
        try:
            for terms in threads.side_by_side(lambda rows: terms_of(mini_batch.rows(rows)),
                                              batches, threads.workers):
                sums = terms if sums is None else [x + y for x, y in zip(sums, terms)]
            return sums
        except torch.OutOfMemoryError:
            if all(len(batch) == 1 for batch in batches):
                raise
        # outside the except block, which holds on to the tensors of the pass that failed
        fitting = min(budget, fitting) // 2
        torch.cuda.empty_cache()
