"""This project beside what people would use instead: python bench/speed.py WHAT ... [--model M]

    rollout  tokens/s of sampling: transformers' generate (default and static cache)
    step     seconds of a whole GRPO step, rollout and update: TRL's GRPOTrainer, PEFT's TinyLoRA
    wrap     seconds to put TinyLoRA on one 18944 x 3584 matrix, and on the model: PEFT's TinyLoRA
    memory   what an update of 32 responses of 128 tokens adds to the peak memory, each in a process
             of its own: TRL's
    start, skew, many, head    parts of the fast engine, see bench/parts.py

`fast` and `plain` are the two engines. All sides get the same weights, prompts and lengths, sample
at T = 1 from the full softmax, and take turns (fast, plain, theirs, fast ...). Figures are medians
of --rounds rounds, ratios are theirs to fast's; the last line is JSON. The toy runs with 32
problems x 8 and 96 tokens, any other model with 4 x 8 and 128. Needs transformers, trl and peft.
"""
import argparse
import contextlib
import io
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from common import ROOT, seconds, settings, turns  # first: it finds the project
from sides import NAMES, Setup, padded_left, trl_trainer

import numpy as np
import torch

import fast
import grpo
import tinylora
from fast.lanczos import truncated_svd
from support.program import run_main

ENGINES = {"fast": fast, "plain": grpo}
SIDES = ("fast", "plain", "trl", "trl, checkpointing")  # of `memory`


def rollout(args):
    s = Setup(args)
    model, _ = s.ours()
    theirs = s.theirs()
    ids, attention = padded_left(s.rows, s.device)
    stops = sorted(s.chat.stop_ids)

    def mine(engine, natural):
        took, out = seconds(lambda: s.sample(engine, model, stops if natural else [-1]))
        return int(out.mask.sum()) / took

    @torch.no_grad()
    def other(natural, **kw):
        if not natural:
            kw["min_new_tokens"] = s.T
        took, out = seconds(lambda: theirs.generate(
            input_ids=ids, attention_mask=attention, max_new_tokens=s.T, do_sample=True,
            temperature=1.0, top_k=0, top_p=1.0, eos_token_id=stops, pad_token_id=stops[0], **kw))
        is_stop = torch.isin(out[:, ids.shape[1]:], torch.tensor(stops, device=s.device))
        stops_so_far = is_stop.cumsum(1).cumsum(1)  # 1 at the first stop token, 2 or more after it
        return int((stops_so_far <= 1).sum()) / took

    result = {}
    for lengths in args.lengths:
        natural = lengths == "natural"
        speeds = turns(args.rounds, fast=lambda: mine(fast, natural),
                       plain=lambda: mine(grpo, natural), default=lambda: other(natural),
                       static=lambda: other(natural, cache_implementation="static"))
        figures = {side: round(median(x), 1) for side, x in speeds.items()}
        best = max(figures["default"], figures["static"])
        figures["ratio"] = round(figures["fast"] / best, 2)
        figures["fast to plain"] = round(figures["fast"] / figures["plain"], 2)
        result[lengths] = figures
        print(f"rollout, {lengths}: tokens/s {figures}", flush=True)
    return result


def step(args):
    """Theirs: GRPOTrainer.training_step, which rolls out, scores, runs forward and backward.

    With its defaults (activation checkpointing on) and at its fastest (off).
    """
    s = Setup(args)
    model, v = s.ours()
    optimizer = torch.optim.AdamW([v], lr=1e-4, weight_decay=0.0)
    flags = settings(s.device)

    def mine(engine, stop_ids):
        out = s.sample(engine, model, stop_ids)
        rewards = torch.from_numpy(s.rng.randint(0, 2, (s.P, s.G))).float()
        out.advantage = grpo.advantages(rewards).flatten().to(s.device)
        grpo.update(model, optimizer, out, flags, engine)

    def measure(name, checkpointing, stop_ids, limits, times):
        """TRL's steps, each followed by one of either engine."""
        rounds = args.rounds + (args.rounds > 1)
        with tempfile.TemporaryDirectory() as out:
            trainer = trl_trainer(s, out, max_steps=rounds, gradient_checkpointing=checkpointing,
                                  **limits)
            real = trainer.training_step

            def all_sides(*a, **kw):
                took, output = seconds(lambda: real(*a, **kw))
                times.setdefault(name, []).append(took)
                for side, engine in ENGINES.items():
                    took = seconds(lambda: mine(engine, stop_ids))[0]
                    times.setdefault(side, []).append(took)
                return output
            trainer.training_step = all_sides
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.train()
        times[name] = times[name][args.rounds > 1:]  # without the round that warms up

    result = {}
    for lengths in args.lengths:
        stop_ids = s.chat.stop_ids
        limits = {}
        if lengths == "limit":
            stop_ids = [-1]
            limits = {"generation_kwargs": {"min_new_tokens": s.T}}
        times = {}
        measure("trl, default", True, stop_ids, limits, times)
        measure("trl, fastest", False, stop_ids, limits, times)
        figures = {side: round(median(x), 3) for side, x in times.items()}
        ratios = {f"{side} to fast": round(figures[side] / figures["fast"], 2)
                  for side in figures if side != "fast"}
        result[lengths] = figures | ratios
        print(f"step, {lengths}: seconds {result[lengths]}", flush=True)
    return result


def matrices():
    """{name: 18944 x 3584 matrix}"""
    random = np.random.RandomState(0).standard_normal((18944, 3584)).astype(np.float32)
    noise = torch.from_numpy(random)
    U = torch.linalg.qr(noise[:, :64])[0]
    V = torch.linalg.qr(noise[:3584, 64:128])[0]
    decaying = 0.02 * noise + U * (20 * torch.arange(1, 65)**-0.5) @ V.T  # as trained weights are
    return {"decaying": decaying, "noise": noise}  # noise: its singular values lie 0.2% apart


def wrap(args):
    """The SVDs and modules alone, weights loaded before; theirs is get_peft_model."""
    from peft import TinyLoraConfig, get_peft_model
    s = Setup(args)
    result = {}
    for name, W in matrices().items():
        def theirs():
            holder = torch.nn.Sequential(torch.nn.Linear(3584, 18944, bias=False, device="meta"))
            holder[0].weight = torch.nn.Parameter(W, requires_grad=False)
            return get_peft_model(holder, TinyLoraConfig(r=2, u=1, target_modules=["0"]))

        # one matrix on all threads, as theirs; in a run fast.svd gives each matrix one thread
        got = turns(args.rounds, fast=lambda: seconds(lambda: truncated_svd(W, 2)),
                    plain=lambda: seconds(lambda: tinylora.truncated_svd(W, 2)),
                    theirs=lambda: seconds(theirs))
        figures = {side: round(median([took for took, _ in x]), 2) for side, x in got.items()}
        _, S, _, residual = got["fast"][0][1]
        # their B is U sqrt(S)
        their_S = got["theirs"][0][1].base_model.model[0].tinylora_B["default"].square().sum(0)
        figures |= {"ratio": round(figures["theirs"] / figures["fast"], 1),
                    "residual": f"{residual:.0e}",
                    "singular values differ by": f"{((S - their_S) / their_S).abs().max():.0e}"}
        result[f"18944 x 3584, {name}"] = figures
        print(f"wrap, {name}: {figures}", flush=True)

    def ours(svd):
        model = s.bare()
        return seconds(lambda: tinylora.adapt(model, 13, svd=svd))[0]

    def peft():
        model = s.theirs()
        config = TinyLoraConfig(r=2, u=1, weight_tying=1.0, target_modules=NAMES)
        return seconds(lambda: get_peft_model(model, config))[0]
    got = turns(args.rounds, fast=lambda: ours(fast.svd), plain=lambda: ours(tinylora.svd),
                theirs=peft)
    figures = {side: round(median(x), 2) for side, x in got.items()}
    figures["ratio"] = round(figures["theirs"] / figures["fast"], 1)
    result["the model"] = figures
    print(f"wrap, the model: {figures}", flush=True)
    return result


def peak_gb():
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss begins with the peak of the process that started this one
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS counts bytes


def memory_of(args):
    """In a process of its own: how far one update of --side lifts the peak above the model's."""
    s = Setup(args)
    B = s.P * s.G
    ids = torch.from_numpy(s.rng.randint(5, min(s.chat.vocab, 5000), (B, s.T))).to(s.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    advantage = torch.tensor([1.0, -1.0] * (B // 2), device=s.device)
    if args.side in ENGINES:
        model, v = s.ours()
        logp = torch.zeros(ids.shape, device=s.device)
        rows = grpo.Rollout(s.rows, ids, mask, logp, 1.0, advantage)
        flags = settings(s.device, tokens_per_micro_batch=2048)
        before = peak_gb()
        grpo.update(model, torch.optim.AdamW([v]), rows, flags, ENGINES[args.side])
    else:
        with tempfile.TemporaryDirectory() as out:
            trainer = trl_trainer(s, out, max_steps=1, gradient_checkpointing="," in args.side)
            prompts, prompt_mask = padded_left(s.rows, s.device)
            inputs = {"prompt_ids": prompts, "prompt_mask": prompt_mask, "completion_ids": ids,
                      "completion_mask": mask.long(), "advantages": advantage,
                      "num_items_in_batch": mask.sum()}
            trainer.current_gradient_accumulation_steps = 1
            trainer.model.train()
            before = peak_gb()
            trainer._compute_loss(trainer.model, inputs).backward()
    peak = peak_gb()
    print(json.dumps({"before": round(before, 2), "peak": round(peak, 2),
                      "update": round(peak - before, 2)}))


def memory(args):
    result = {}
    for side in SIDES:
        command = [sys.executable, __file__, "memory_of", "--side", side, "--model", args.model]
        for name in ("problems", "group", "tokens"):
            command += [f"--{name}", str(getattr(args, name))]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        result[side] = json.loads(done.stdout.splitlines()[-1])
        print(f"memory, {side}: GB {result[side]}", flush=True)
    for name in ("update", "peak"):
        ratio = result["trl"][name] / max(result["fast"][name], 0.01)
        result[f"ratio of the {name}s"] = round(ratio, 2)
    return result


def parse():
    cli = argparse.ArgumentParser(description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("what", nargs="*", default=["rollout", "step", "wrap", "memory"])
    cli.add_argument("--model", default=str(ROOT / "toy"), help="folder or hub name (the toy)")
    cli.add_argument("--problems", type=int, help="32 for the toy, else 4")
    cli.add_argument("--group", type=int, default=8)
    cli.add_argument("--tokens", type=int, help="96 for the toy, else 128")
    cli.add_argument("--rounds", type=int, default=3)
    cli.add_argument("--lengths", nargs="+", default=["natural", "limit"],
                     choices=["natural", "limit"],
                     help="until a stop token, or all rows to the limit")
    cli.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = cli.parse_args()
    is_toy = Path(args.model).resolve() == ROOT / "toy"
    args.problems = args.problems or (32 if is_toy else 4)
    args.tokens = args.tokens or (96 if is_toy else 128)
    import parts
    args.kinds = {f.__name__: f for f in (rollout, step, wrap, memory, memory_of)} | parts.KINDS
    unknown = [what for what in args.what if what not in args.kinds]
    if unknown:
        cli.error(f"{', '.join(unknown)}: is none of {', '.join(args.kinds)}")
    return args


def work(args):
    if args.what == ["memory_of"]:
        memory_of(args)
        return
    print(f"{args.model}: {args.problems} problems x {args.group}, {args.tokens} tokens, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    print(json.dumps({what: args.kinds[what](args) for what in args.what}))


if __name__ == "__main__":
    sys.exit(run_main(parse, work))
