"""Sampling: grpo.generate's numbers, sooner.

Each prompt is computed once and its keys are read once for its group; rows that have ended leave
the batch; R (U S)^T is computed once; on a GPU a whole step may be one CUDA graph (graph.py).
"""
import torch

import grpo
from fast import graph
from fast.cache import Cache
from fast.forward import HeldMany, forward, project
from fast.head import sample
from fast.packed import hold
from fast.passes import Prompts, prefill
from model import upcast
from support import threads

SHRINK = 0.75  # rows are dropped when fewer than this part of them go on: dropping copies the cache


class Decoder:
    """The rows that still go on, a token at a time."""

    def __init__(self, model, held, prompts, group, size):
        self.model = model
        self.held = held
        self.cache = Cache(prompts, group, size)

    def hidden(self, token):
        """The states that predict the next token: token (B,) -> (B, C)."""
        positions = self.cache.step()
        return forward(self.model, token, positions, self.cache.attend, self.held.project)

    def keep(self, rows):
        """Only these rows, (B',) sorted, go on."""
        self.cache.keep(rows)
        if isinstance(self.held, HeldMany):
            self.held.which = self.held.which[rows]


fitting = float("inf")  # rows at once: lowered when memory ran out, for the rest of the run


@torch.no_grad()
def generate(model, prompts, group, max_new_tokens, stop_ids, temperature, noise=None,
             progress=None, values=None):
    """As grpo.generate. values (P, ties, u): a v of its own for every prompt (methods/es.py).

    On a CPU parts of the prompts are computed side by side (support/threads.py). When memory runs
    out, it begins anew with half as many prompts at once. No row's text changes.
    """
    global fitting
    device = model.embed_tokens.weight.device
    noise = grpo.noise_tensor(noise, (len(prompts) * group, max_new_tokens), temperature, device)
    while True:
        size = max(1, int(min(len(prompts) * group, fitting)) // group)  # prompts
        size = min(size, -(-len(prompts) // threads.parts))
        places = [slice(i, i + size) for i in range(0, len(prompts), size)]
        try:
            if values is None:
                helds = [hold(model)] * len(places)
            else:  # one after the other: R of many v's is computed by writing to v
                helds = [HeldMany(model, values[place]) for place in places]
            report = added_up(progress, len(places))

            def part(i):
                rows = slice(places[i].start * group, places[i].stop * group)
                return sample_rows(
                    model, helds[i], prompts[places[i]], group, max_new_tokens, stop_ids,
                    temperature, None if noise is None else noise[rows], report(i))
            parts = list(threads.side_by_side(part, range(len(places)), threads.workers))
            return grpo.Rollout.join(parts) if len(parts) > 1 else parts[0]
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        # outside the except block, which holds on to the tensors of the pass that failed
        fitting = size // 2 * group
        torch.cuda.empty_cache()


def added_up(progress, parts):
    """report(i): a `progress` for part i; told on are the fewest tokens and all ended rows."""
    seen = {i: (0, 0) for i in range(parts)}

    def report(i):
        def note(tokens, ended):
            seen[i] = tokens, ended
            fewest, _ = map(min, zip(*seen.values()))
            progress(fewest, sum(ended for _, ended in seen.values()))
        return note if progress else None
    return report


@torch.no_grad()  # again: side_by_side's threads do not know of generate's
def sample_rows(model, held, prompts, group, max_new_tokens, stop_ids, temperature, noise,
                progress):
    """generate, all rows at once. held: the layers with their v, or with that of each prompt."""
    device = model.embed_tokens.weight.device
    B = len(prompts) * group
    stops = torch.tensor(sorted(stop_ids), device=device)

    if isinstance(held, HeldMany):
        texts = Prompts(prompts, device)  # no start in common: every prompt has another v
        held.which = texts.own.place // texts.T  # (N,): the prompt of each token
        hidden = texts.states(model, held.project)
        held.which = torch.arange(B, device=device) // group
        decoder = Decoder(model, held, texts, group, max_new_tokens)
    else:
        texts, hidden = prefill(model, prompts, project)
        decoder = graph.decoder(model, texts, group, max_new_tokens)
        decoder = decoder or Decoder(model, held, texts, group, max_new_tokens)
    hidden = hidden.repeat_interleave(group, 0)  # (B, C)

    ids = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    mask = torch.zeros(B, max_new_tokens, dtype=torch.bool, device=device)
    logp = torch.zeros(B, max_new_tokens, dtype=upcast(hidden).dtype, device=device)
    rows = torch.arange(B, device=device)  # the rows still in the batch
    done = torch.zeros(B, dtype=torch.bool, device=device)  # of these
    for t in range(max_new_tokens):
        uniform = None if noise is None else noise[rows, t]
        logits = decoder.held.logits(model, hidden)  # (B', vocab)
        token, token_logp = sample(logits, temperature, uniform)  # (B',) each
        ids[rows, t] = token.masked_fill(done, 0)
        mask[rows, t] = ~done
        logp[rows, t] = token_logp.masked_fill(done, 0)
        done = done | torch.isin(token, stops)
        if t + 1 == max_new_tokens:
            break
        if (t + 1) % grpo.CHECK_EVERY == 0:
            left = (~done).nonzero()[:, 0]  # the host waits for the device here and in keep
            if progress:
                progress(t + 1, B - len(left))
            if len(left) == 0 or threads.unwanted():
                break
            if len(left) < SHRINK * len(rows):
                rows = rows[left]
                token = token[left]
                done = done[left]
                decoder.keep(left)
        hidden = decoder.hidden(token)
    grpo.check_finite(logp, "log-prob of a sampled token")
    rows = [prompt for prompt in prompts for _ in range(group)]
    return grpo.Rollout(rows, ids[:, :t + 1], mask[:, :t + 1], logp[:, :t + 1], temperature)
