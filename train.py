"""Train a frozen model to reason with a handful of numbers.

    python train.py --params 13                   # the toy, minutes on a laptop
    python train.py --params 13 --model Qwen/Qwen2.5-7B-Instruct --data gsm8k
                                                  # the paper's, on one GPU
    python train.py --eval-only --model M --data D [--adapter A]      # evaluate
    python train.py --chat [--adapter A]                      # ask it something
    python train.py --resume DIR             # go on with a run that was stopped
    torchrun --nproc_per_node 8 train.py ... # on many GPUs, or CPUs (ranks.py)

Where a flag is not given, tinylora.json in the model's folder decides, if
there is one; else what stands in brackets below: the paper's recipe.
"""
import hashlib
import json
import os
import resource
import shlex
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import es
import gsm8k
import grpo
import lora
import ranks
import state
import tinylora
from chat import converse, open_model
from files import InputError, make_folder
from flags import parse


SIGNALS = signal.SIGINT, signal.SIGTERM
SHOWN = {"strict": ".3f", "lenient": ".3f", "format": ".3f", "loss": ".4f", "length": ".0f", "entropy": ".3f", "v_norm": ".3f", "gap": ".0e",
         "lr": ".1e", "tokens_per_s": ".0f", "seconds": ".1f", "memory_gb": ".1f"}  # of a log row, what the terminal shows and how


def respond(model, chat, problems, args, group, noise, temperature, label, which=None):
    """Responses to all problems, at most --rollout-rows at once: a list of (prompt ids, ids, mask, logprobs) per chunk. which: see grpo.generate."""
    prompts, parts = [chat.prompt(p["prompt"], args.system) for p in problems], []
    per, total = max(1, args.rollout_rows // group), len(prompts) * group

    def live(tokens, done):  # a row that goes on counts as if it went to the limit, so the time left is rather too long than too short
        bar.set_postfix_str(f"{i * group + done}/{total} rows, token {tokens} of {args.max_new_tokens}", refresh=False)
        bar.update(i * group + done + (len(some) * group - done) * tokens / args.max_new_tokens - bar.n)

    with tqdm(total=total, desc=label, leave=False, miniters=0, bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
              disable=bool(ranks.RANK) or None) as bar:  # None: unless a terminal
        for i in range(0, len(prompts), per):
            some = prompts[i:i + per]
            part = grpo.generate(model, some, group, args.max_new_tokens, chat.stop_ids, temperature, None if noise is None else noise[i * group:(i + per) * group],
                                 chat.vocab, None if which is None else which[i:i + per], progress=live)
            parts.append(([p for p in some for _ in range(group)], *part))
    return parts


def merge(parts):
    """Chunks of respond -> (prompts, ids, mask, logprobs) of all rows, padded to the longest."""
    width = max(ids.shape[1] for _, ids, _, _ in parts)
    padded = [torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in column]) for column in list(zip(*parts))[1:]]
    return [p for part in parts for p in part[0]], *padded


def score(chat, ids, mask, problems, group):
    """(texts, {"strict": (rows,), "lenient": (rows,), "format": (rows,)}): what was written, and each score of it as a tensor."""
    texts = [chat.decode(i, m) for i, m in zip(ids.cpu(), mask.cpu())]
    scores = [gsm8k.score(text, p) for text, p in zip(texts, (p for p in problems for _ in range(group)))]
    return texts, {kind: torch.tensor([s[kind] for s in scores]) for kind in gsm8k.SCORES}


def evaluate(model, chat, problems, args, label, sampled=False):
    """Fixed problems, greedy or (sampled) at T = 1 with fixed noise: the mean of every score, the mean length, and the texts."""
    own, rows = range(len(problems))[ranks.share(len(problems))], []
    if own:  # there may be more ranks than problems
        noise = grpo.uniforms([[4, 0, i, 0] for i in own], args.max_new_tokens) if sampled else None
        some = [problems[i] for i in own]
        _, ids, mask, _ = merge(respond(model, chat, some, args, 1, noise, 1.0, label))
        texts, scores = score(chat, ids, mask, some, 1)
        rows = list(zip(*(scores[kind].tolist() for kind in gsm8k.SCORES), mask.sum(1).tolist(), texts))
    *columns, texts = zip(*ranks.gather(rows))
    return {name: sum(column) / len(problems) for name, column in zip((*gsm8k.SCORES, "length"), columns)} | {"texts": list(texts)}


def key(kind, sampled):
    """A score's name in summary.json: strict, lenient, format; sampled (strict), sampled_lenient, sampled_format."""
    return kind if not sampled else "sampled" if kind == "strict" else f"sampled_{kind}"


def standard_error(p, n):
    """The binomial standard error of an accuracy p over n problems."""
    return (p * (1 - p) / n) ** 0.5


def memory_gb(device):
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, kilobytes elsewhere
    return peak / (1e9 if sys.platform == "darwin" else 1e6)


def solutions(chat, problems, args):
    """The problems' own worked solutions, as a rollout would be: (prompts, ids, mask), cut at --max-new-tokens."""
    rows = [chat.response(p["prompt"], p["solution"], args.system)[:args.max_new_tokens] for p in problems]
    ids = grpo.pad(rows, args.device)
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    return [chat.prompt(p["prompt"], args.system) for p in problems], ids, torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]


def adapt(model, args):
    """Make the model trainable as --method says, from --adapter or from the flags; returns the tensors to train."""
    start = time.time()
    if args.method == "full":
        params = lora.full(model)
    elif args.method == "lora":
        params = lora.load(args.adapter, model) if args.adapter else lora.adapt(model, args.rank or 1, args.alpha or 32.0, args.seed)
    else:
        bar = lambda items: tqdm(items, desc="SVD", unit="matrix", leave=False, disable=bool(ranks.RANK) or None)
        params = [tinylora.load(args.adapter, model, bar) if args.adapter else
                  tinylora.adapt(model, args.params, args.u, args.n_tie, args.tie or "tiled", args.rank or 2, args.seed, args.method, bar)]
    total = sum(p.numel() for p in params)
    for name, there in (model.adapter | {"params": total}).items() if args.adapter else ():
        if name != "seed" and getattr(args, name, None) not in (None, there):
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: {args.adapter} was made with {there}")
    residuals = [m.residual for m in model.modules() if isinstance(m, tinylora.TinyLoRALinear)]
    if residuals:
        print(f"SVD: {len(residuals)} matrices, rank {model.adapter['rank']}, largest residual {max(residuals):.0e}, {time.time() - start:.1f} s")
    print(f"{args.method}: {total:,} trainable numbers" + (f" = {params[0].shape[0]} {model.adapter['tie']} groups x u {params[0].shape[1]}" if residuals else "")
          + f", seed {model.adapter.get('seed', args.seed)}", flush=True)
    return params


def save(model, params, args, folder):
    """What was learned, as its users expect it; returns the path."""
    if args.method == "full":
        path = Path(args.out) / "model"
        lora.save_model(path, model.state_dict(), folder, args.v_dtype)
    elif args.method == "lora":
        path = Path(args.out) / "adapter"
        lora.save(path, model, args.v_dtype, args.model)
    else:
        path = Path(args.out) / "adapter.safetensors"
        tinylora.save(path, params[0], model, args.v_dtype, args.model)
    return path


def run(args):
    began, out = time.time(), Path(args.out)
    if args.resume and (out / "summary.json").exists():
        print(f"{out}: this run is finished; its results are in {out / 'summary.json'}")
        return
    train_set, test_set = gsm8k.load_data(args.data, args.eval_only)
    test_set = test_set[:args.eval_count]
    if args.algo == "sft" and not all(p["solution"] for p in train_set):
        raise InputError(f"--algo sft: {args.data} has problems without a worked solution to learn from")
    args.steps = max(1, 3 * len(train_set) // args.prompts) if args.steps is None else args.steps
    settings = {name: x for name, x in vars(args).items() if name != "resume"}
    print("settings: " + "  ".join(f"{name}={x}" for name, x in settings.items() if x is not None), flush=True)
    make_folder(out)
    settings |= {"torch": torch.__version__, "numpy": np.__version__, "threads": torch.get_num_threads(), "ranks": ranks.SIZE,
                 "problems": hashlib.sha256(json.dumps([train_set, test_set]).encode()).hexdigest()}
    if args.resume:
        settings |= state.compare(settings, out)
    else:
        state.write_json(out / "config.json", settings)

    folder, chat, model = open_model(args)
    print(f"load: {sum(p.numel() for p in model.parameters()):,} frozen parameters, {args.dtype} on {args.device}, {time.time() - began:.1f} s", flush=True)

    params = None if args.eval_only and not args.adapter else adapt(model, args)
    settings["trained"] = getattr(model, "adapter", None)
    if args.resume:
        settings |= state.compare(settings, out)
    state.write_json(out / "config.json", settings)

    def evaluation(label, step, sampled=False):
        start, name = time.time(), label + (" at T = 1" if sampled else ", greedy")
        result = evaluate(model, chat, test_set, args, name, sampled)
        state.append(out / "samples.jsonl", [{"step": step, "sampled": sampled, "prompt": chat.text(p["prompt"], args.system), "response": t,
                                        "answer": p["answer"]} for p, t in list(zip(test_set, result.pop("texts")))[:4]])
        strict, lenient = (f"{result[k]:.3f} +- {standard_error(result[k], len(test_set)):.3f}" for k in ("strict", "lenient"))
        print(f"{name}: strict {strict}  lenient {lenient}  format {result['format']:.3f}  ({len(test_set)} problems, {result['length']:.0f} tokens each, "
              f"{time.time() - start:.1f} s)", flush=True)
        return result

    if args.eval_only:
        base = evaluation("evaluation", 0), evaluation("evaluation", 0, sampled=True)
        state.write_json(out / "summary.json", {"model": args.model, "data": args.data, "adapter": args.adapter, "eval_count": len(test_set),
                                          **{key(kind, i): base[i][kind] for i in (0, 1) for kind in gsm8k.SCORES}, "seconds": time.time() - began})
    else:
        with state.alone(out):
            learn(model, chat, params, train_set, len(test_set), args, evaluation, began, folder)


def learn(model, chat, params, train_set, count, args, evaluation, began, folder):
    """The run proper: evaluate, train, evaluate, each step written down so that --resume goes on from it."""
    out = Path(args.out)
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0)
    reference = [p.detach().clone() for p in params] if args.kl > 0 else None
    done = state.load(out, params, optimizer, reference) if args.resume else None
    before = done["seconds"] if done else 0.0
    if not done:
        base = evaluation("evaluation", 0), evaluation("evaluation", 0, sampled=True)
        done = {"step": 0, "tokens": 0, "seconds": time.time() - began, "base": base, "slot": 1}
        state.save(out, done, params, optimizer, reference)
    base = done["base"]
    ranks.agree(done["step"], "the step they go on from")
    watch = state.watchers(args)
    try:
        for row in steps(model, chat, params, train_set, args, optimizer, reference, done["step"]):
            step = row["step"]
            ranks.agree(row["v_norm"], f"what they have learned after step {step}")
            if args.eval_every and step % args.eval_every == 0 and step < args.steps:
                row |= {f"eval_{k}": x for k, x in evaluation(f"evaluation after step {step}", step).items()}
            state.append(out / "log.jsonl", [row])
            watch(row)
            done |= {"step": step, "tokens": done["tokens"] + row["tokens"], "seconds": before + time.time() - began}
            if step % args.save_every == 0 or step == args.steps:
                state.save(out, done, params, optimizer, reference)
            print(f"step {step:3d}/{args.steps}  " + "  ".join(f"{name} {row[name]:{form}}" for name, form in SHOWN.items() if row.get(name) is not None), flush=True)
        final = evaluation("evaluation", args.steps), evaluation("evaluation", args.steps, sampled=True)
    except BaseException:  # Ctrl-C, SIGTERM, a full disk, a bug: what was learned so far is kept, even if Ctrl-C is pressed twice
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # until main() ends
        if ranks.RANK == 0:
            save(model, params, args, folder)
        raise
    if ranks.RANK:  # what is left is to be written and printed, once
        return
    saved = save(model, params, args, folder)
    total = sum(p.numel() for p in params)
    size = total * tinylora.DTYPES[args.v_dtype].itemsize
    summary = {"params": total, "adapter_bytes": size, "eval_count": count, "steps": args.steps, "tokens": done["tokens"],
               "seconds": before + time.time() - began, "seed": args.seed, "method": args.method, "algo": args.algo, "reward": args.reward,
               "model": args.model, "data": args.data, "adapter": args.adapter}
    print(f"\n{count} held-out problems       before            after")
    for i, name in enumerate(("greedy", "T = 1")):
        for kind in gsm8k.SCORES:
            pair = summary["base_" + key(kind, i)], summary["final_" + key(kind, i)] = base[i][kind], final[i][kind]
            print(f"{f'{name}, {kind}':<24}  " + "    ".join(f"{x:.3f} +- {standard_error(x, count):.3f}" for x in pair))
    state.write_json(out / "summary.json", summary)
    print(f"{total:,} trainable numbers, {size:,} bytes ({args.v_dtype}); {done['tokens']:,} tokens {'learned from' if args.algo == 'sft' else 'sampled'}; "
          f"{summary['seconds']:.0f} s in all")
    flags = ["--model", str(saved)] if args.method == "full" else ["--adapter", str(saved), "--model", args.model]
    for name in ("data", "eval_count", "max_new_tokens", "dtype", "system"):  # what the figures above depend on
        flags += [f"--{name.replace('_', '-')}", str(getattr(args, name))] if getattr(args, name) is not None else []
    print("next: python train.py --eval-only " + shlex.join(flags))


def steps(model, chat, params, train_set, args, optimizer, reference, first):
    """The training loop from step `first` (counted from 0) on: yields one log row a step. Each rank works on its share of every mini-batch."""
    part = args.prompts // args.minibatches
    warmup = max(1, round(args.warmup * args.steps * args.minibatches))
    common = {"vocab": chat.vocab, "grad_clip": args.grad_clip, "recompute": args.recompute, "v_dtype": tinylora.DTYPES[args.v_dtype],
              "micro_tokens": args.tokens_per_micro_batch or (65536 if args.device.startswith("cuda") else 2048)}
    for step in range(first, args.steps):
        start = time.time()
        picks = [step * args.prompts + k * part + i for k in range(args.minibatches) for i in range(part)[ranks.share(part)]]  # positions in an endless series of shuffled epochs
        shuffled = {epoch: np.random.RandomState([2, args.seed, epoch, 0]).permutation(len(train_set)) for epoch in {p // len(train_set) for p in picks}}
        problems = [train_set[shuffled[p // len(train_set)][p % len(train_set)]] for p in picks]
        lr = [args.lr * min(1, (step * args.minibatches + k + 1) / warmup) for k in range(args.minibatches)]
        if args.algo == "sft":
            prompts, ids, mask = solutions(chat, problems, args)
            metrics = grpo.sft_update(model, params, optimizer, prompts, ids, mask, lr=lr, minibatches=args.minibatches, **common)
        elif args.algo == "es":
            metrics, mask = es.step(model, params[0], optimizer, problems, [[args.seed, p] for p in picks], args, lr[-1],
                                    lambda rows, noise, which: merge(respond(model, chat, rows, args, 1, noise, args.temperature, f"step {step + 1}", which)),
                                    lambda ids, mask, rows: score(chat, ids, mask, rows, 1)[1])
            prompts = mask  # as many
        else:
            noise = grpo.uniforms([[3, args.seed, p, g] for p in picks for g in range(args.group)], args.max_new_tokens)
            prompts, ids, mask, old_logp = merge(respond(model, chat, problems, args, args.group, noise, args.temperature, f"step {step + 1}"))
            _, scores = score(chat, ids, mask, problems, args.group)
            advantage = grpo.advantages(scores[args.reward].view(-1, args.group))  # (P, G)
            metrics = {kind: ranks.mean(s) for kind, s in scores.items()}
            metrics |= {"signal": ranks.mean((advantage != 0).any(1)), "rollout_seconds": time.time() - start}
            metrics |= grpo.update(model, params, optimizer, prompts, ids, mask, old_logp, advantage.flatten().to(ids.device), lr=lr,
                                   minibatches=args.minibatches, temperature=args.temperature, clip_low=args.clip_low,
                                   clip_high=args.clip_high, kl=args.kl, reference=reference, **common)
        common["micro_tokens"] = metrics.get("micro_tokens")  # halved when memory ran out: what fitted is where the next step starts
        tokens, responses = map(int, ranks.total(mask.sum().item(), len(prompts)))
        seconds = time.time() - start
        yield {"step": step + 1, **metrics, "length": tokens / responses, "lr": lr[-1], "tokens": tokens, "tokens_per_s": tokens / seconds,
               "seconds": seconds, "memory_gb": memory_gb(args.device)}


class Terminated(KeyboardInterrupt):
    """SIGTERM: to end as Ctrl-C does."""


def terminate(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    raise Terminated


def again(args):
    """The command that goes on with this run."""
    return ("python" if ranks.SIZE == 1 else f"torchrun --nproc_per_node {ranks.SIZE}") + f" train.py --resume {shlex.quote(args.out)}"


def main(argv=None):
    """Exit codes: 0, 2 (a mistake of the user's, told in one line), 130 (Ctrl-C; adapter, log and state are kept), 143 (SIGTERM, likewise)."""
    args, handlers = None, {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGTERM, terminate)
    speaker = f"rank {ranks.RANK}: " if ranks.RANK else ""
    try:
        args = parse(argv, __doc__)
        ranks.join(args.device)
        converse(args) if args.chat else run(args)
        ranks.leave()
        return 0
    except KeyboardInterrupt as stop:
        if ranks.RANK < 2:  # the second speaks too: it may be the first that died
            kept = args and Path(args.out).exists()
            print(f"\n{speaker}interrupted" + (f"; what was done so far is in {args.out}" if kept else "")
                  + (f"; to go on: {again(args)}" if kept and not args.eval_only else ""), file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError, and so is the CPU's
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        print(f"{speaker}error: out of memory; lower --rollout-rows or --max-new-tokens for sampling; for updates use --recompute", file=sys.stderr)
    except ranks.Alone as error:
        print(f"{speaker}error: {error}; to go on: {again(args)}", file=sys.stderr)
    except (InputError, OSError) as error:
        print(f"{speaker}error: {error}", file=sys.stderr)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 2


if __name__ == "__main__":
    sys.exit(main())
