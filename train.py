"""Train a frozen model to reason with a handful of numbers.

    python train.py --params 13                                                # the toy, minutes on a laptop
    python train.py --params 13 --model Qwen/Qwen2.5-7B-Instruct --data gsm8k  # the paper's run, on one GPU
    python train.py --eval-only --model M --data D [--adapter FILE]            # evaluate

Where a flag is not given, tinylora.json in the model's folder decides, if there is one; else the paper's recipe.
"""
import argparse
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
import model as transformer
import tinylora
from model import InputError, read_json, replacing

TOY = Path(__file__).resolve().parent / "toy"


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one clear line, not argparse's page of usage
        raise InputError(f"{message}; see python train.py --help")


def within(kind, low, high=2.0**63):
    """A converter for argparse: an int or float from low to high."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high:  # NaN neither
            raise ValueError
        return value
    convert.__name__ = f"{kind.__name__} from {low}"  # argparse puts this into its message
    return convert


count, whole, fraction, positive = within(int, 1), within(int, 0), within(float, 0, 1), within(float, 1e-9, 1e9)


def parse(argv):
    """The flags, every one resolved: command line, then the model folder's tinylora.json, then the defaults below."""
    cli = Parser(description=__doc__.split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                 epilog=__doc__.split("\n\n")[-1])
    add = cli.add_argument_group("model and data").add_argument
    add("--model", default=os.path.relpath(TOY), metavar="M", help="a folder in Hugging Face layout, or a name on the hub (default: toy/)")
    add("--data", default="gsm8k", metavar="D", help="gsm8k, or a folder with train.jsonl and test.jsonl (question, answer)")
    add("--system", default=None, metavar="TEXT", help="a system message for every prompt (default: the template's own)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:1 (default: cuda if there)")
    add("--dtype", default=None, choices=["fp32", "bf16"], help="of the frozen model (default: bf16 on cuda, fp32 on cpu)")
    add = cli.add_argument_group("the trainable numbers (tinylora.py)").add_argument
    add("--params", type=count, default=None, metavar="N", help="how many numbers to train, exactly (default: 13)")
    add("--u", type=count, default=None, help="numbers per group (default: 1 unless N exceeds the modules)")
    add("--n-tie", type=count, default=None, help="modules (tiled) or layers (structured) per group")
    add("--tie", default=None, choices=["tiled", "structured"], help="which modules share (default: tiled)")
    add("--rank", type=count, default=None, metavar="R", help="of the frozen SVD directions (default: 2)")
    add("--v-dtype", default="fp32", choices=list(tinylora.DTYPES), help="in which v is kept and saved (default: fp32)")
    add("--seed", type=within(int, 0, 2**32 - 1), default=0, help="of P (unless --adapter brings its own), the problems' order and the sampling (default: 0)")
    add("--adapter", default=None, metavar="FILE", help="evaluate, or start from, this adapter.safetensors")
    add = cli.add_argument_group("GRPO (grpo.py)").add_argument
    add("--steps", type=whole, default=None, help="GRPO steps (default: 3 epochs of the training set)")
    add("--prompts", type=count, default=64, metavar="P", help="problems a step (64)")
    add("--group", type=count, default=4, metavar="G", help="responses to each problem (4)")
    add("--minibatches", type=count, default=2, metavar="K", help="Adam updates a step (2)")
    add("--lr", type=positive, default=1.6e-4, help="learning rate (1.6e-4: the fork's 1e-5 at its scale of 16)")
    add("--warmup", type=fraction, default=0.05, help="share of the updates with a rising rate, then constant (0.05)")
    add("--temperature", type=positive, default=1.0, metavar="T", help="of sampling, in sampler and trainer alike (1.0)")
    add("--max-new-tokens", type=count, default=1024, metavar="N", help="longest response (1024; the paper's longest runs: 4096)")
    add("--clip-low", type=fraction, default=0.2, help="the ratio's clip below 1 (0.2)")
    add("--clip-high", type=positive, default=0.4, help="the ratio's clip above 1 (0.4)")
    add("--kl", type=within(float, 0, 1e9), default=0.0, help="weight of the KL to the base (0; the MATH recipe: 0.001)")
    add("--grad-clip", type=positive, default=1.0, help="largest gradient norm (1.0)")
    add("--reward", default="strict", choices=["strict", "lenient"], help='pays for "#### 7" only, or for the last number too (strict)')
    add = cli.add_argument_group("evaluation, memory, output").add_argument
    add("--eval-count", type=count, default=None, metavar="N", help="test problems, the first N (default: all)")
    add("--eval-every", type=whole, default=0, metavar="K", help="also evaluate greedily every K steps (0: never)")
    add("--eval-only", action="store_true", help="evaluate and stop")
    add("--rollout-rows", type=count, default=256, metavar="N", help="sequences sampled at once (256)")
    add("--micro-tokens", type=count, default=4096, metavar="N", help="padded tokens per forward and backward (4096: 20 GB on 7B by estimate)")
    add("--recompute", action="store_true", help="activation checkpointing: less memory, a third more time")
    add("--out", default=None, metavar="DIR", help="where the run is written (default: runs/<time>)")
    args = cli.parse_args(argv)
    check(args)  # before anything is fetched
    defaults = Path(find_model(args.model)) / "tinylora.json"
    if defaults.is_file():
        known = {action.dest: action for action in cli._actions}
        for key, value in read_json(defaults).items():
            name = key.replace("-", "_")
            if name not in known or name in ("help", "model", "adapter", "out", "eval_only"):
                raise InputError(f"{defaults}: {key!r} is not a flag that a model folder may set")
            action = known[name]
            if (action.choices and value not in action.choices) or (action.nargs == 0) != isinstance(value, bool):
                raise InputError(f"{defaults}: {value!r} will not do for {key!r}")
            if name == "data" and value != "gsm8k":
                value = str(defaults.parent / str(value))  # a folder, beside the file that names it
            cli.set_defaults(**{name: str(value) if action.type else value})  # text, which argparse checks and converts
    args = cli.parse_args(argv)
    check(args)
    args.dtype = args.dtype or ("bf16" if args.device.startswith("cuda") else "fp32")
    args.out = args.out or time.strftime("runs/%Y%m%d-%H%M%S")
    return args


def check(args):
    """What argparse cannot see in one flag alone."""
    if args.group < 2 and not args.eval_only:
        raise InputError("--group 1: an advantage compares the responses to one problem, so a group needs at least 2")
    if args.prompts % args.minibatches:
        raise InputError(f"--prompts {args.prompts} cannot be split into --minibatches {args.minibatches}")
    if args.adapter and not Path(args.adapter).is_file():
        raise InputError(f"--adapter {args.adapter}: no such file")
    if args.out and any((Path(args.out) / name).exists() for name in ("samples.jsonl", "log.jsonl", "summary.json")):
        raise InputError(f"--out {args.out}: holds a run already; choose another folder")
    try:
        if not args.device.startswith(("cpu", "cuda")):
            raise RuntimeError("only cpu and cuda are supported")
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {args.device}: not to be had here ({str(error).splitlines()[0]})") from None


def find_model(name):
    """A folder as it is; owner/name from the hub's cache or, online, the hub: config, tokenizer and safetensors only."""
    if Path(name).exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return name
    from huggingface_hub import snapshot_download  # comes with tokenizers; only a hub name needs it
    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"])
    except Exception as error:  # offline, no such repository, no access, a full disk: all reported the same way
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"--model {name}: neither a folder here nor to be had from the hub ({type(error).__name__}: {reason})") from None


def uniforms(keys, length):
    """(len(keys), length) sampling noise, a numpy stream per row: the same on every machine, whatever shares the batch."""
    return np.stack([np.random.RandomState(key).random_sample(length) for key in keys])


def respond(model, chat, problems, args, group, noise, temperature, label):
    """Responses to all problems, at most --rollout-rows at once: a list of (prompt ids, ids, mask, logprobs) per chunk."""
    prompts, parts = [chat.prompt(p["question"], args.system) for p in problems], []
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
    """(texts, strict, lenient): rewards as tensors (rows,)."""
    texts = [chat.decode(i, m) for i, m in zip(ids.cpu(), mask.cpu())]
    gold = [p["answer"] for p in problems for _ in range(group)]
    return texts, *(torch.tensor([gsm8k.reward(t, g, strict=s) for t, g in zip(texts, gold)]) for s in (True, False))


def evaluate(model, chat, problems, args, label, sampled=False):
    """Fixed problems, greedy or (sampled) at T = 1 with fixed noise: strict and lenient accuracy, and the texts."""
    noise = uniforms([[4, 0, i, 0] for i in range(len(problems))], args.max_new_tokens) if sampled else None
    _, ids, mask, _ = merge(respond(model, chat, problems, args, 1, noise, 1.0, label))
    texts, strict, lenient = score(chat, ids, mask, problems, 1)
    return {"strict": strict.mean().item(), "lenient": lenient.mean().item(), "length": mask.sum(1).float().mean().item(), "texts": texts}


def standard_error(p, n):
    """The binomial standard error of an accuracy p over n problems."""
    return (p * (1 - p) / n) ** 0.5


def memory_gb(device):
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, kilobytes elsewhere
    return peak / (1e9 if sys.platform == "darwin" else 1e6)


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
    """TinyLoRA on the model, from --adapter or from the flags; returns v."""
    start = time.time()
    bar = lambda items: tqdm(items, desc="SVD", unit="matrix", leave=False, disable=None)
    if args.adapter:
        v = tinylora.load(args.adapter, model, bar)
        for name, there in (model.adapter | {"params": v.numel()}).items():
            if name != "seed" and getattr(args, name, None) not in (None, there):
                raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: {args.adapter} was made with {there}")
    else:
        v = tinylora.adapt(model, args.params, args.u, args.n_tie, args.tie or "tiled", args.rank or 2, args.seed, bar)
    residuals = [m.residual for m in model.modules() if isinstance(m, tinylora.TinyLoRALinear)]
    print(f"SVD: {len(residuals)} matrices, rank {model.adapter['rank']}, largest residual {max(residuals):.0e}, {time.time() - start:.1f} s; "
          f"{v.numel()} trainable numbers = {v.shape[0]} {model.adapter['tie']} groups x u {v.shape[1]}, seed {model.adapter['seed']}", flush=True)
    return v


def run(args):
    began, out = time.time(), Path(args.out)
    train_set, test_set = gsm8k.load_data(args.data)
    test_set = test_set[:args.eval_count]
    args.steps = max(1, 3 * len(train_set) // args.prompts) if args.steps is None else args.steps
    print("settings: " + "  ".join(f"{k}={v}" for k, v in vars(args).items() if v is not None), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", vars(args) | {"torch": torch.__version__, "numpy": np.__version__})

    folder = find_model(args.model)
    transformer.read_config(folder)  # the cheap complaints first
    chat = gsm8k.Chat(folder)
    model = transformer.load(folder, tinylora.DTYPES[args.dtype], args.device)
    if chat.vocab > model.config.vocab_size:
        raise InputError(f"{folder}: the tokenizer has {chat.vocab} ids, the model only {model.config.vocab_size}")
    print(f"load: {sum(p.numel() for p in model.parameters()):,} frozen parameters, {args.dtype} on {args.device}, {time.time() - began:.1f} s", flush=True)

    v = None if args.eval_only and not args.adapter else adapt(model, args)
    write_json(out / "config.json", vars(args) | {"torch": torch.__version__, "numpy": np.__version__, "tinylora": getattr(model, "adapter", None)})

    def evaluation(label, step, sampled=False):
        start, name = time.time(), label + (" at T = 1" if sampled else ", greedy")
        result = evaluate(model, chat, test_set, args, name, sampled)
        append(out / "samples.jsonl", [{"step": step, "sampled": sampled, "prompt": chat.text(p["question"], args.system), "response": t,
                                        "answer": p["answer"]} for p, t in list(zip(test_set, result.pop("texts")))[:4]])
        strict, lenient = (f"{result[k]:.3f} +- {standard_error(result[k], len(test_set)):.3f}" for k in ("strict", "lenient"))
        print(f"{name}: strict {strict}  lenient {lenient}  ({len(test_set)} problems, {result['length']:.0f} tokens each, "
              f"{time.time() - start:.1f} s)", flush=True)
        return result

    base = evaluation("evaluation", 0), evaluation("evaluation", 0, sampled=True)
    if args.eval_only:
        write_json(out / "summary.json", {"model": args.model, "data": args.data, "adapter": args.adapter, "eval_count": len(test_set),
                                          "strict": base[0]["strict"], "lenient": base[0]["lenient"], "sampled": base[1]["strict"],
                                          "sampled_lenient": base[1]["lenient"], "seconds": time.time() - began})
        return
    tokens = 0
    try:
        for step, row in enumerate(steps(model, chat, v, train_set, args), 1):
            tokens += row["tokens"]
            if args.eval_every and step % args.eval_every == 0 and step < args.steps:
                row |= {f"eval_{k}": x for k, x in evaluation(f"evaluation after step {step}", step).items()}
            append(out / "log.jsonl", [row])
            print(f"step {step:3d}/{args.steps}  strict {row['strict']:.3f}  lenient {row['lenient']:.3f}  length {row['length']:.0f}  "
                  f"entropy {row['entropy']:.3f}  |v| {row['v_norm']:.3f}  gap {row['gap'] or 0:.0e}  lr {row['lr']:.1e}  "
                  f"{row['tokens_per_s']:.0f} tok/s  {row['seconds']:.1f} s  {row['memory_gb']:.1f} GB", flush=True)
        final = evaluation("evaluation", args.steps), evaluation("evaluation", args.steps, sampled=True)
    finally:  # Ctrl-C, a full disk, a bug: what was learned so far is kept, even if Ctrl-C is pressed twice
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        tinylora.save(out / "adapter.safetensors", v, model, args.v_dtype)
        signal.signal(signal.SIGINT, handler)
    size = v.numel() * tinylora.DTYPES[args.v_dtype].itemsize
    summary = {"params": v.numel(), "adapter_bytes": size, "base_strict": base[0]["strict"], "base_lenient": base[0]["lenient"],
               "final_strict": final[0]["strict"], "final_lenient": final[0]["lenient"], "base_sampled": base[1]["strict"],
               "final_sampled": final[1]["strict"], "base_sampled_lenient": base[1]["lenient"], "final_sampled_lenient": final[1]["lenient"],
               "eval_count": len(test_set), "steps": args.steps, "tokens": tokens, "seconds": time.time() - began, "seed": args.seed,
               "model": args.model, "data": args.data, "adapter": args.adapter}
    write_json(out / "summary.json", summary)
    n = len(test_set)
    print(f"\n{n} held-out problems       before            after")
    for name, i, kind in (("greedy, strict", 0, "strict"), ("greedy, lenient", 0, "lenient"),
                          ("T = 1, strict", 1, "strict"), ("T = 1, lenient", 1, "lenient")):
        before, after = base[i][kind], final[i][kind]
        print(f"{name:<24}  {before:.3f} +- {standard_error(before, n):.3f}    {after:.3f} +- {standard_error(after, n):.3f}")
    print(f"{v.numel()} trainable numbers, {size} bytes ({args.v_dtype}); {tokens:,} tokens sampled; {summary['seconds']:.0f} s in all")
    again = ("model", "data", "eval_count", "max_new_tokens", "dtype", "system")  # what the figures above depend on
    flags = [x for name in again if getattr(args, name) is not None for x in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    print("next: python train.py --eval-only " + shlex.join(["--adapter", str(out / "adapter.safetensors"), *flags]))


def steps(model, chat, v, train_set, args):
    """The training loop: yields one log row a step."""
    optimizer = torch.optim.AdamW([v], lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0)
    warmup = max(1, round(args.warmup * args.steps * args.minibatches))
    for step in range(args.steps):
        start = time.time()
        picks = [step * args.prompts + i for i in range(args.prompts)]  # positions in an endless series of shuffled epochs
        shuffled = {epoch: np.random.RandomState([2, args.seed, epoch, 0]).permutation(len(train_set)) for epoch in {p // len(train_set) for p in picks}}
        problems = [train_set[shuffled[p // len(train_set)][p % len(train_set)]] for p in picks]
        noise = uniforms([[3, args.seed, p, g] for p in picks for g in range(args.group)], args.max_new_tokens)
        prompts, ids, mask, old_logp = merge(respond(model, chat, problems, args, args.group, noise, args.temperature, f"step {step + 1}"))
        _, strict, lenient = score(chat, ids, mask, problems, args.group)
        rewards = strict if args.reward == "strict" else lenient
        advantage = grpo.advantages(rewards.view(-1, args.group)).flatten().to(ids.device)
        rollout_seconds = time.time() - start
        lr = [args.lr * min(1, (step * args.minibatches + k + 1) / warmup) for k in range(args.minibatches)]
        metrics = grpo.update(model, v, optimizer, prompts, ids, mask, old_logp, advantage, lr=lr, minibatches=args.minibatches,
                              temperature=args.temperature, vocab=chat.vocab, clip_low=args.clip_low, clip_high=args.clip_high,
                              kl=args.kl, grad_clip=args.grad_clip, micro_tokens=args.micro_tokens, recompute=args.recompute,
                              v_dtype=tinylora.DTYPES[args.v_dtype])
        tokens, seconds = int(mask.sum()), time.time() - start
        share = (advantage.view(-1, args.group) != 0).any(1).float().mean().item()
        yield {"step": step + 1, "strict": strict.mean().item(), "lenient": lenient.mean().item(), "length": tokens / len(prompts),
               "signal": share, **metrics, "lr": lr[-1], "tokens": tokens, "tokens_per_s": tokens / seconds,
               "rollout_seconds": rollout_seconds, "seconds": seconds, "memory_gb": memory_gb(args.device)}


def main(argv=None):
    """Exit codes: 0, 2 (a mistake of the user's, told in one line), 130 (Ctrl-C; adapter and log are kept)."""
    args = None
    try:
        args = parse(argv)
        run(args)
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted" + (f"; what was done so far is in {args.out}" if args and Path(args.out).exists() else ""), file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError, and so is the CPU's
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        print("error: out of memory; lower --rollout-rows or --max-new-tokens for sampling, --micro-tokens (or --recompute) for updates", file=sys.stderr)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
