"""Train a frozen model to reason with a handful of numbers.

    python train.py --params 13                                                # the toy, minutes on a laptop
    python train.py --params 13 --model Qwen/Qwen2.5-7B-Instruct --data gsm8k  # the paper's run, on one GPU
    python train.py --eval-only --model M --data D [--adapter A]               # evaluate
    python train.py --chat [--adapter A]                                       # ask it something

Where a flag is not given, tinylora.json in the model's folder decides, if there is one; else the paper's recipe (flags.py).
"""
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

import gsm8k
import grpo
import lora
import model as transformer
import tinylora
from chat import converse
from files import InputError, replacing
from flags import find_model, parse
from watch import watchers


SHOWN = {"strict": ".3f", "lenient": ".3f", "format": ".3f", "loss": ".4f", "length": ".0f", "entropy": ".3f", "v_norm": ".3f", "gap": ".0e",
         "lr": ".1e", "tokens_per_s": ".0f", "seconds": ".1f", "memory_gb": ".1f"}  # of a log row, what the terminal shows and how


def uniforms(keys, length):
    """(len(keys), length) sampling noise, a numpy stream per row: the same on every machine, whatever shares the batch."""
    return np.stack([np.random.RandomState(key).random_sample(length) for key in keys])


def respond(model, chat, problems, args, group, noise, temperature, label):
    """Responses to all problems, at most --rollout-rows at once: a list of (prompt ids, ids, mask, logprobs) per chunk."""
    prompts, parts = [chat.prompt(p["prompt"], args.system) for p in problems], []
    per = max(1, args.rollout_rows // group)
    bar = tqdm(total=len(prompts), desc=label, unit="problem", leave=False, disable=None)
    for i in range(0, len(prompts), per):
        some = prompts[i:i + per]
        part = grpo.generate(model, some, group, args.max_new_tokens, chat.stop_ids, temperature,
                             None if noise is None else noise[i * group:(i + per) * group], chat.vocab)
        parts.append(([p for p in some for _ in range(group)], *part))
        bar.update(len(some))
    bar.close()
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
    noise = uniforms([[4, 0, i, 0] for i in range(len(problems))], args.max_new_tokens) if sampled else None
    _, ids, mask, _ = merge(respond(model, chat, problems, args, 1, noise, 1.0, label))
    texts, scores = score(chat, ids, mask, problems, 1)
    return {kind: s.mean().item() for kind, s in scores.items()} | {"length": mask.sum(1).float().mean().item(), "texts": texts}


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


def append(path, rows):
    """Add JSON lines to a file: all of them or, on a full disk, none."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        os.truncate(path, size)
        raise InputError(f"{path}: cannot be written ({error}); free some space or choose another --out") from None


def write_json(path, value):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def adapt(model, args):
    """Make the model trainable as --method says, from --adapter or from the flags; returns the tensors to train."""
    start = time.time()
    if args.method == "full":
        params = lora.full(model)
    elif args.method == "lora":
        params = lora.load(args.adapter, model) if args.adapter else lora.adapt(model, args.rank or 1, args.alpha or 32.0, args.seed)
    else:
        bar = lambda items: tqdm(items, desc="SVD", unit="matrix", leave=False, disable=None)
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
    train_set, test_set = gsm8k.load_data(args.data, args.eval_only)
    test_set = test_set[:args.eval_count]
    if args.algo == "sft" and not all(p["solution"] for p in train_set):
        raise InputError(f"--algo sft: {args.data} has problems without a worked solution to learn from")
    args.steps = max(1, 3 * len(train_set) // args.prompts) if args.steps is None else args.steps
    print("settings: " + "  ".join(f"{k}={v}" for k, v in vars(args).items() if v is not None), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", vars(args) | {"torch": torch.__version__, "numpy": np.__version__})
    watch = None if args.eval_only else watchers(args)

    folder = find_model(args.model)
    transformer.read_config(folder)  # the cheap complaints first
    chat = gsm8k.Chat(folder)
    model = transformer.load(folder, tinylora.DTYPES[args.dtype], args.device)
    if chat.vocab > model.config.vocab_size:
        raise InputError(f"{folder}: the tokenizer has {chat.vocab} ids, the model only {model.config.vocab_size}")
    print(f"load: {sum(p.numel() for p in model.parameters()):,} frozen parameters, {args.dtype} on {args.device}, {time.time() - began:.1f} s", flush=True)

    params = None if args.eval_only and not args.adapter else adapt(model, args)
    write_json(out / "config.json", vars(args) | {"torch": torch.__version__, "numpy": np.__version__, "trained": getattr(model, "adapter", None)})

    def evaluation(label, step, sampled=False):
        start, name = time.time(), label + (" at T = 1" if sampled else ", greedy")
        result = evaluate(model, chat, test_set, args, name, sampled)
        append(out / "samples.jsonl", [{"step": step, "sampled": sampled, "prompt": chat.text(p["prompt"], args.system), "response": t,
                                        "answer": p["answer"]} for p, t in list(zip(test_set, result.pop("texts")))[:4]])
        strict, lenient = (f"{result[k]:.3f} +- {standard_error(result[k], len(test_set)):.3f}" for k in ("strict", "lenient"))
        print(f"{name}: strict {strict}  lenient {lenient}  format {result['format']:.3f}  ({len(test_set)} problems, {result['length']:.0f} tokens each, "
              f"{time.time() - start:.1f} s)", flush=True)
        return result

    base = evaluation("evaluation", 0), evaluation("evaluation", 0, sampled=True)
    if args.eval_only:
        write_json(out / "summary.json", {"model": args.model, "data": args.data, "adapter": args.adapter, "eval_count": len(test_set),
                                          **{key(kind, i): base[i][kind] for i in (0, 1) for kind in gsm8k.SCORES}, "seconds": time.time() - began})
        return
    tokens = 0
    try:
        for step, row in enumerate(steps(model, chat, params, train_set, args), 1):
            tokens += row["tokens"]
            if args.eval_every and step % args.eval_every == 0 and step < args.steps:
                row |= {f"eval_{k}": x for k, x in evaluation(f"evaluation after step {step}", step).items()}
            append(out / "log.jsonl", [row])
            watch(row)
            print(f"step {step:3d}/{args.steps}  " + "  ".join(f"{name} {row[name]:{form}}" for name, form in SHOWN.items() if row.get(name) is not None), flush=True)
        final = evaluation("evaluation", args.steps), evaluation("evaluation", args.steps, sampled=True)
    finally:  # Ctrl-C, a full disk, a bug: what was learned so far is kept, even if Ctrl-C is pressed twice
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        saved = save(model, params, args, folder)
        signal.signal(signal.SIGINT, handler)
    total = sum(p.numel() for p in params)
    size = total * tinylora.DTYPES[args.v_dtype].itemsize
    summary = {"params": total, "adapter_bytes": size, "eval_count": len(test_set), "steps": args.steps, "tokens": tokens,
               "seconds": time.time() - began, "seed": args.seed, "method": args.method, "algo": args.algo, "reward": args.reward,
               "model": args.model, "data": args.data, "adapter": args.adapter}
    print(f"\n{len(test_set)} held-out problems       before            after")
    for i, name in enumerate(("greedy", "T = 1")):
        for kind in gsm8k.SCORES:
            pair = summary["base_" + key(kind, i)], summary["final_" + key(kind, i)] = base[i][kind], final[i][kind]
            print(f"{f'{name}, {kind}':<24}  " + "    ".join(f"{x:.3f} +- {standard_error(x, len(test_set)):.3f}" for x in pair))
    write_json(out / "summary.json", summary)
    print(f"{total:,} trainable numbers, {size:,} bytes ({args.v_dtype}); {tokens:,} tokens {'sampled' if args.algo == 'grpo' else 'learned from'}; "
          f"{summary['seconds']:.0f} s in all")
    flags = ["--model", str(saved)] if args.method == "full" else ["--adapter", str(saved), "--model", args.model]
    for name in ("data", "eval_count", "max_new_tokens", "dtype", "system"):  # what the figures above depend on
        flags += [f"--{name.replace('_', '-')}", str(getattr(args, name))] if getattr(args, name) is not None else []
    print("next: python train.py --eval-only " + shlex.join(flags))


def steps(model, chat, params, train_set, args):
    """The training loop: yields one log row a step."""
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0)
    reference = [p.detach().clone() for p in params] if args.kl > 0 else None
    warmup = max(1, round(args.warmup * args.steps * args.minibatches))
    common = {"vocab": chat.vocab, "grad_clip": args.grad_clip, "recompute": args.recompute, "v_dtype": tinylora.DTYPES[args.v_dtype],
              "micro_tokens": args.tokens_per_micro_batch or (65536 if args.device.startswith("cuda") else 2048)}
    for step in range(args.steps):
        start = time.time()
        picks = [step * args.prompts + i for i in range(args.prompts)]  # positions in an endless series of shuffled epochs
        shuffled = {epoch: np.random.RandomState([2, args.seed, epoch, 0]).permutation(len(train_set)) for epoch in {p // len(train_set) for p in picks}}
        problems = [train_set[shuffled[p // len(train_set)][p % len(train_set)]] for p in picks]
        lr = [args.lr * min(1, (step * args.minibatches + k + 1) / warmup) for k in range(args.minibatches)]
        if args.algo == "sft":
            prompts, ids, mask = solutions(chat, problems, args)
            metrics = grpo.sft_update(model, params, optimizer, prompts, ids, mask, lr=lr, minibatches=args.minibatches, **common)
        else:
            noise = uniforms([[3, args.seed, p, g] for p in picks for g in range(args.group)], args.max_new_tokens)
            prompts, ids, mask, old_logp = merge(respond(model, chat, problems, args, args.group, noise, args.temperature, f"step {step + 1}"))
            _, scores = score(chat, ids, mask, problems, args.group)
            advantage = grpo.advantages(scores[args.reward].view(-1, args.group))  # (P, G)
            metrics = {kind: s.mean().item() for kind, s in scores.items()}
            metrics |= {"signal": (advantage != 0).any(1).float().mean().item(), "rollout_seconds": time.time() - start}
            metrics |= grpo.update(model, params, optimizer, prompts, ids, mask, old_logp, advantage.flatten().to(ids.device), lr=lr,
                                   minibatches=args.minibatches, temperature=args.temperature, clip_low=args.clip_low,
                                   clip_high=args.clip_high, kl=args.kl, reference=reference, **common)
        common["micro_tokens"] = metrics["micro_tokens"]  # halved when memory ran out: what fitted is where the next step starts
        tokens, seconds = int(mask.sum()), time.time() - start
        yield {"step": step + 1, **metrics, "length": tokens / len(prompts), "lr": lr[-1], "tokens": tokens, "tokens_per_s": tokens / seconds,
               "seconds": seconds, "memory_gb": memory_gb(args.device)}


def main(argv=None):
    """Exit codes: 0, 2 (a mistake of the user's, told in one line), 130 (Ctrl-C; adapter and log are kept)."""
    args = None
    try:
        args = parse(argv, __doc__)
        converse(args) if args.chat else run(args)
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted" + (f"; what was done so far is in {args.out}" if args and Path(args.out).exists() else ""), file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError, and so is the CPU's
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        print("error: out of memory; lower --rollout-rows or --max-new-tokens for sampling; for updates use --recompute", file=sys.stderr)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
