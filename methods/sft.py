"""--algo sft: supervised finetuning on the data's worked solutions, which GRPO is compared with."""
import torch

import grpo


def solutions(run, rows):
    """The rows' worked solutions as a Rollout, as if they had been sampled.

    They end with the stop token and are cut at --max-new-tokens. The advantage is 1 everywhere,
    so that grpo.update leaves no row out; the old log-probs are not used.
    """
    args = run.args
    prompts = [run.prompt_ids(row) for row in rows]
    texts = [run.task.prompt(row, args.instruction) for row in rows]
    responses = [run.chat.response(text, row["solution"], args.system)[:args.max_new_tokens]
                 for text, row in zip(texts, rows)]
    ids = grpo.pad(responses, args.device)  # (B, T)
    lengths = torch.tensor([len(response) for response in responses], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]  # (B, T)
    logp = torch.zeros(ids.shape, device=ids.device)
    advantage = torch.ones(len(rows), device=ids.device)
    return grpo.Rollout(prompts, ids, mask, logp, temperature=1.0, advantage=advantage)


def step(run, optimizer, problems, rates):
    """An Adam update from each mini-batch: (the solutions, {}: no scores, [what each update says]).

    rates: a learning rate for each mini-batch.
    """
    rollout = solutions(run, problems)
    updates = []
    for rate, mini_batch in zip(rates, rollout.split(run.args.minibatches)):
        optimizer.param_groups[0]["lr"] = rate
        updates.append(grpo.update(run.model, optimizer, mini_batch, run.args, run.engine,
                                   sft_loss))
    return rollout, {}, updates


def sft_loss(logp, batch, denominator, args):
    """The mean of -log p over response tokens. logp (B, T): 0 where masked; see grpo.grpo_loss."""
    return -logp.sum() / denominator
