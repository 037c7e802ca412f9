"""What a run reports: lines on the terminal, log.jsonl, samples.jsonl, summary.json, wandb.

A task names its scores; `scores` is the list of these names. The score "strict", or the first one
if there is none of this name, is the task's main score.
"""
import resource
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from support import hints, ranks
from support.errors import InputError
from support.files import append_jsonl, make_folder, read_jsonl, write_json
from support.params import total_norm
from support.scores import print_table, summary_scores, summary_sets
from support.terminal import printable, shell_word

# The columns of a step line after the scores: key of the log row, format.
COLUMNS = {"signal": ".2f", "loss": ".4f", "length": ".0f", "entropy": ".3f", "v_norm": ".3f",
           "gap": ".0e", "lr": ".1e", "tokens_per_s": ".0f", "seconds": ".1f", "memory_gb": ".1f"}
FEW = 128  # trained numbers up to which a step's row holds all of them
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # of a trained number, by --v-dtype
ANSWERS = 3  # that the end of a run shows, before and after
LINE = 80  # characters of each
ROLLOUTS_EVERY = 10  # steps: from the first, every tenth keeps some of its responses
# What the scores of an evaluation depend on: repeated in the command that evaluates again.
EVALUATION_FLAGS = ("data", "eval_data", "task", "instruction", "eval_count", "max_new_tokens",
                    "dtype", "system")


def print_settings(settings):
    given = [f"{name}={value}" for name, value in settings.items()
             if value is not None and name != "resume"]
    print(printable("settings: " + "  ".join(given)), flush=True)


def print_loaded(model, args, seconds):
    total = sum(p.numel() for p in model.parameters())
    print(f"load: {total:,} frozen parameters, {args.dtype} on {args.device}, {seconds:.1f} s",
          flush=True)


def step_row(step, rollout, scores, updates, optimizer, args, start):
    """A step's row of log.jsonl: means over the responses of all ranks.

    scores: {name: (B,) tensor}, empty for SFT. updates: what grpo.update returned for each
    mini-batch of this rank. optimizer: with the trained tensors and its last learning rate.
    start: when the step began.
    """
    params = optimizer.param_groups[0]["params"]
    row = {"step": step} | {name: ranks.mean(values) for name, values in scores.items()}
    if args.algo == "grpo":
        has_signal = (rollout.advantage.view(-1, args.group) != 0).any(1)
        row["signal"] = ranks.mean(has_signal)
        row |= update_columns(updates)
        row["entropy"] = entropy(rollout)
    elif args.algo == "sft":
        row["loss"] = mean_loss(updates)
    else:
        row["signal"] = updates[0]["signal"]
    row["grad_norm"] = sum(update["grad_norm"] for update in updates) / len(updates)
    row["v_norm"] = total_norm(params)
    if sum(p.numel() for p in params) <= FEW:
        row["v"] = [x for p in params for x in p.detach().flatten().tolist()]
    tokens, responses = ranks.total(int(rollout.mask.sum()), len(rollout.prompts))
    seconds = time.time() - start
    row |= {"length": tokens / responses, "lr": optimizer.param_groups[0]["lr"],
            "tokens": int(tokens), "tokens_per_s": tokens / seconds, "seconds": seconds,
            "memory_gb": memory_gb(args.device)}
    return row


def update_columns(updates):
    """From the sums that grpo.statistics made: the gap, and the means of the other columns.

    The gap is that of the first update only: before it, policy and sampler have the same weights,
    and what differs is rounding. None if no row had a signal.
    """
    sums = [ranks.total(*update["sums"]) for update in updates]
    first_tokens, first_distance, _, _ = sums[0]
    tokens, _, clipped, kl = (sum(column) for column in zip(*sums))
    return {"gap": first_distance / first_tokens if first_tokens else None,
            "clip_fraction": clipped / max(tokens, 1), "kl": kl / max(tokens, 1)}


def entropy(rollout):
    """The mean of -log p over tokens drawn from p estimates the policy's entropy per token."""
    surprise = -rollout.logp[rollout.mask].double().sum().item()
    surprise, tokens = ranks.total(surprise, int(rollout.mask.sum()))
    return surprise / tokens


def mean_loss(updates):
    """The loss per token of a whole step. Each update's loss is per token of its mini-batch."""
    total = 0.0
    all_tokens = 0
    for update in updates:
        loss, tokens = ranks.total(update["loss"], update["sums"][0])
        total += loss * tokens
        all_tokens += tokens
    return total / all_tokens


def memory_gb(device):
    """The largest memory that the process has used so far, on the GPU or else in all."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)  # macOS counts bytes, Linux kilobytes


def log_step(row, run, out, log_elsewhere, problems, rollout, scores):
    """Write a step's row to log.jsonl, to wandb if asked, and to the terminal.

    Now and then some of the responses that it learned from go to samples.jsonl.
    """
    if not ranks.RANK:
        append_jsonl(out / "log.jsonl", [row])
        log_elsewhere(row)
        if scores and row["step"] % ROLLOUTS_EVERY == 1:
            write_rollouts(run, out, problems, rollout, scores, row["step"])
    print_step(row, run.args.steps, run.score_names)
    if row["step"] % hints.SILENT_STEPS == 0:
        hints.print_silence(out, run.args, last=hints.SILENT_STEPS)


def print_step(row, steps, scores):
    """One line for a row of log.jsonl. Columns that the row does not have are left out."""
    formats = dict.fromkeys(scores, ".3f") | COLUMNS
    cells = [f"{name} {row[name]:{form}}" for name, form in formats.items()
             if row.get(name) is not None]
    print(f"step {row['step']:3d}/{steps}  " + "  ".join(cells), flush=True)


def check_adapted(model, params, args):
    """What is trained. InputError if --adapter was made with other settings than the flags say."""
    total = sum(p.numel() for p in params)
    adapter = getattr(model, "adapter", {})
    if args.adapter:
        check_adapter({"directions": "top"} | adapter | {"params": total}, args)
    residuals = [m.residual for m in model.modules() if hasattr(m, "residual")]
    shape = ""
    if residuals:
        print(f"SVD: {len(residuals)} matrices, rank {adapter['rank']}, "
              f"largest residual {max(residuals):.0e}")
        ties, u = params[0].shape
        shape = f" = {ties} {adapter['tie']} ties x u {u}"
    seed = adapter.get("seed", args.seed)
    print(f"{args.method}: {total:,} trainable numbers{shape}, seed {seed}", flush=True)


def check_adapter(settings, args):
    """InputError if a flag asks for anything but what the adapter was made with."""
    for name, made_with in settings.items():
        asked = getattr(args, name, None)
        if name != "seed" and asked not in (None, made_with):
            raise InputError(f"--{name.replace('_', '-')} {asked}: {args.adapter} was made with "
                             f"{made_with}")


def write_samples(run, rows, texts, columns, step, sampled):
    """Append the first responses of an evaluation, of each set, to samples.jsonl.

    columns: each score of all responses, in the order of run.score_names.
    """
    if ranks.RANK:
        return
    samples = []
    seen = Counter()
    for row, text, *values in zip(rows, texts, *columns):
        name = row.get("eval_set")
        seen[name] += 1
        if seen[name] > run.args.samples:
            continue
        scores = dict(zip(run.score_names, values))
        one = {"step": step, "sampled": sampled} | ({} if name is None else {"set": name})
        samples.append(one | sample(run, row, text, scores))
    append_jsonl(Path(run.args.out) / "samples.jsonl", samples)


def write_rollouts(run, out, problems, rollout, scores, step):
    """Append the first --samples responses of a step, with their scores: whole groups, in order."""
    group = len(rollout.prompts) // len(problems)
    samples = []
    for i in range(min(run.args.samples, len(rollout.prompts))):
        text = run.chat.decode(rollout.ids[i].cpu(), rollout.mask[i].cpu())
        own_scores = {name: values[i].item() for name, values in scores.items()}
        samples.append({"step": step, "rollout": True}
                       | sample(run, problems[i // group], text, own_scores))
    append_jsonl(out / "samples.jsonl", samples)


def sample(run, problem, text, scores):
    """What samples.jsonl says of a response."""
    prompt = run.task.prompt(problem, run.args.instruction)
    return {"question": run.task.prompt(problem, ""),
            "prompt": run.chat.text(prompt, run.args.system),
            "response": text, "answer": problem.get("answer"), "scores": scores}


def print_answers(path):
    """A few greedy answers before and after, as samples.jsonl has them."""
    rows = [row for _, row in read_jsonl(path)] if path.exists() else []
    rows = [row for row in rows if row.get("sampled") is False]
    if not rows:  # --samples 0
        return
    ends = [[row for row in rows if row["step"] == step][:ANSWERS]
            for step in (rows[0]["step"], rows[-1]["step"])]
    print()
    for before, after in zip(*ends):
        question = before.get("question", before["prompt"])  # older runs have the prompt only
        print(f"{shortened(question, 2 * LINE)}  (answer: {shortened(str(before['answer']), 20)})")
        for title, row in (("before", before), ("after", after)):
            print(f"    {title:<6}  {shortened(row['response'], LINE)}")


def shortened(text, width):
    """One line for a text: its beginning and its end, where it is longer than `width`."""
    text = printable(text)
    return text if len(text) <= width else f"{text[:width // 2]} ... {text[-width // 2:]}"


def print_totals(params, size, dtype, tokens, verb, seconds):
    """How much was trained, in how many bytes. verb: what was done with the tokens."""
    print(f"{params:,} trainable numbers, {size:,} bytes ({dtype}); {tokens:,} tokens {verb}; "
          f"{seconds:.0f} s in all")


def print_next(args, saved):
    """The command that evaluates what was saved, with the flags that its scores depend on."""
    if args.method == "full":
        flags = ["--model", str(saved)]
    else:
        flags = ["--adapter", str(saved), "--model", args.model]
    for name in EVALUATION_FLAGS:
        value = getattr(args, name, None)
        if value is not None:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    print("next: python train.py --eval-only " + " ".join(map(shell_word, flags)))


def write_evaluation(run, results, count, began):
    """summary.json of --eval-only. results: (greedy, sampled); began: when the run began."""
    if ranks.RANK:
        return
    args = run.args
    summary = {"model": args.model, "data": args.eval_data or args.data, "adapter": args.adapter,
               "eval_count": count}
    summary |= summary_scores(results, run.score_names)
    summary |= summary_sets({"": results}, run.score_names)
    summary["seconds"] = time.time() - began
    write_json(Path(args.out) / "summary.json", summary)


def write_summary(run, params, saved, done, final, count):
    """The end of a run: the final table, summary.json, and the command that evaluates again.

    final: the last results (greedy, sampled).
    """
    args = run.args
    total = sum(p.numel() for p in params)
    size = total * BYTES[args.v_dtype]
    summary = {"params": total, "adapter_bytes": size, "eval_count": count, "steps": args.steps,
               "tokens": done["tokens"], "seconds": done["seconds"], "seed": args.seed,
               "method": args.method, "algo": args.algo, "reward": args.reward,
               "model": args.model, "data": args.data, "adapter": args.adapter}
    before = summary_scores(done["base"], run.score_names, "base_")
    after = summary_scores(final, run.score_names, "final_")
    for (name, x), (new_name, y) in zip(before.items(), after.items()):
        summary |= {name: x, new_name: y}
    summary |= summary_sets({"base_": done["base"], "final_": final}, run.score_names)
    print_table(done["base"], final, count, run.score_names)
    print_answers(Path(args.out) / "samples.jsonl")
    write_json(Path(args.out) / "summary.json", summary)
    hints.print_silence(Path(args.out), args)
    hints.print_slowness(Path(args.out), total_norm(params) / total ** 0.5, args)
    verb = "learned from" if args.algo == "sft" else "sampled"
    print_totals(total, size, args.v_dtype, done["tokens"], verb, done["seconds"])
    print_next(args, saved)


def wandb_logger(args):
    """A function that sends a row of log.jsonl to Weights & Biases, if --wandb PROJECT is given.

    Call it before the model is loaded, so that a missing package is reported at once. On other
    ranks than 0 the function does nothing.
    """
    if not args.wandb or ranks.RANK:
        return lambda row: None
    try:
        import wandb
        make_folder(args.out)
        wandb.init(project=args.wandb, dir=args.out, config=vars(args))
    except Exception as error:  # not installed, not logged in, no network: errors of many kinds
        raise InputError(f"--wandb: {error}; see that it is installed and set up, "
                         "or leave the flag out") from None

    def log(row):
        present = {name: x for name, x in row.items() if x is not None and name != "v"}
        wandb.log(present, step=row["step"])
    return log
