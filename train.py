"""Train a frozen model to reason with a handful of numbers.

    python train.py --params 13                   # the toy, minutes on a laptop
    python train.py --params 13 --model Qwen/Qwen2.5-7B-Instruct  # the paper's, on one GPU
    python train.py --eval-only --model M --data D [--adapter A]
    python train.py --chat [--adapter A]          # ask it something
    python train.py --resume DIR [--steps N]      # go on with a run, or extend it
    torchrun --nproc_per_node 8 train.py ...      # many GPUs, or CPUs
"""
import importlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import gsm8k
import grpo
import model as transformer
import tinylora
from support import program, ranks, report, resume
from support.chat_format import Chat
from support.data import load_problems, load_task
from support.flags import count, fraction, natural, nonnegative, parse, positive, seed, settle
from support.hub import find_model
from support.live import LiveBar
from support.params import not_none, reference_logprobs
from support.scores import averages, print_evaluation
from support.threads import choose_threads

LR = {"tinylora": 1.6e-4, "lora-xs": 1.6e-4, "lora": 2e-5, "full": 1e-6}  # authors' fork: 1e-5 x 16
# The recipe: name, default, kind, meaning. None: decided later, as the meaning says. A model folder
# may bring other defaults in its tinylora.json. All other flags are in support/flags.py.
RECIPE = [
    ("method", "tinylora", ["tinylora", "lora-xs", "lora", "full"], "what is trained"),
    ("params", None, count, "how many numbers to train: ties x u (13)"),
    ("u", None, count, "numbers per tie (as few as --params allows)"),
    ("n-tie", None, count, "modules (tiled) or layers (structured) per tie"),
    ("tie", None, ["tiled", "structured"], "who shares v (tiled)"),
    ("rank", None, count, "number of SVD directions (2), or LoRA's rank (1)"),
    ("directions", None, ["top", "middle", "bottom", "random"], "which of them (top)"),
    ("v-dtype", "fp32", ["fp32", "bf16", "fp16"], "of the trained numbers, kept and saved"),
    ("seed", 0, seed, "of the random P, the problems' order, the sampling"),
    ("algo", "grpo", ["grpo", "es", "sft"], "GRPO, evolution strategy, SFT"),
    ("steps", None, natural, "training steps (3 epochs)"),
    ("prompts", 64, count, "problems a step"),
    ("group", 4, count, "responses to each problem"),
    ("minibatches", 2, count, "Adam updates a step"),
    ("lr", None, positive, f"learning rate ({', '.join(f'{m} {x:g}' for m, x in LR.items())})"),
    ("warmup", 0.05, fraction, "share of updates with rising lr"),
    ("temperature", 1.0, positive, "of the sampling"),
    ("max-new-tokens", 1024, count, "longest response (paper: up to 4096)"),
    ("clip-low", 0.2, fraction, "the ratio's clip below 1"),
    ("clip-high", 0.4, positive, "the ratio's clip above 1"),
    ("kl", 0.0, nonnegative, "weight of the KL to the reference (MATH: 0.001)"),
    ("grad-clip", 1.0, positive, "largest gradient norm"),
    ("reward", None, str, "the score to learn from (the task's first: strict)"),
]
SAMPLED = (False, True)  # of evaluate: greedy, then at T = 1


@dataclass
class Run:
    """What every step works with."""
    args: object
    model: transformer.Transformer
    chat: Chat  # tokenizer and chat template
    task: object  # gsm8k, or --task
    score_names: list
    engine: object  # the module with generate, logprobs, accumulate, svd (for adapt): grpo or fast

    def prompt_ids(self, problem):  # the task's prompt in the chat template
        text = self.task.prompt(problem, self.args.instruction)
        return self.chat.prompt(text, self.args.system)


def problems_of_step(step, problems, args):
    """(positions, problems) of a step, from 0. All epochs, each shuffled anew, make one long list;
    a position is a place in it. Of every mini-batch each rank (process) has a part."""
    total = len(problems)
    size = args.prompts // args.minibatches
    positions = []
    for k in range(args.minibatches):
        first = step * args.prompts + k * size
        mini_batch = range(first, first + size)
        positions += mini_batch[ranks.share(size)]
    orders = {epoch: np.random.RandomState([2, args.seed, epoch, 0]).permutation(total)
              for epoch in {position // total for position in positions}}
    return positions, [problems[orders[p // total][p % total]] for p in positions]


def learning_rate(update, args):
    """Of update `update` (from 0): rises to lr over the --warmup share of updates, then lr."""
    warmup = max(1, round(args.warmup * args.steps * args.minibatches))
    return args.lr * min(1, (update + 1) / warmup)


def roll_out(run, problems, group, noise, temperature, label, values=None):
    """`group` responses to each of the problems, --rollout-rows at once -> Rollout.

    noise: (problems x group, max_new_tokens). values: a v for every problem (methods/es.py).
    """
    args = run.args
    prompts = [run.prompt_ids(problem) for problem in problems]
    chunk = max(1, args.rollout_rows // group)
    rollouts = []
    with LiveBar(label, len(prompts) * group, args.max_new_tokens) as bar:
        for start in range(0, len(prompts), chunk):
            some = slice(start, start + chunk)  # of the prompts
            rows = slice(start * group, (start + chunk) * group)
            extra = {} if values is None else {"values": values[some]}
            bar.start_chunk(len(prompts[some]) * group)
            rollouts.append(run.engine.generate(
                run.model, prompts[some], group, args.max_new_tokens, run.chat.stop_ids,
                temperature, noise[rows], bar.progress, **extra))
            bar.end_chunk()
    return grpo.Rollout.join(rollouts)


def score(run, rollout, problems):
    """(texts, {name: (B,) tensor}): the responses as text, and what the task says of each."""
    group = len(rollout.prompts) // len(problems)
    texts = [run.chat.decode(*row) for row in zip(rollout.ids.cpu(), rollout.mask.cpu())]
    scores = [run.task.score(text, problems[i // group]) for i, text in enumerate(texts)]
    return texts, {name: torch.tensor([float(s[name]) for s in scores]) for name in run.score_names}


def evaluate(run, problems, label, step, sampled=False):
    """Fixed problems, greedy or at T = 1 with fixed noise -> a result, see support/scores.py."""
    start = time.time()
    label = f"{label} at T = 1" if sampled else f"{label}, greedy"
    numbers = range(len(problems))[ranks.share(len(problems))]  # this rank's
    results = []
    if numbers:  # there may be more ranks than problems
        mine = [problems[i] for i in numbers]
        noise = grpo.uniforms([[4, 0, i, 0] for i in numbers], run.args.max_new_tokens)
        rollout = roll_out(run, mine, 1, noise, 1.0 if sampled else 0.0, label)
        texts, scores = score(run, rollout, mine)
        columns = [scores[name].tolist() for name in run.score_names]
        results = list(zip(texts, rollout.mask.sum(1).tolist(), *columns))
    texts, lengths, *columns = zip(*ranks.gather(results))
    result = averages(problems, {"length": lengths} | dict(zip(run.score_names, columns)))
    report.write_samples(run, problems, texts, columns, step, sampled)
    print_evaluation(label, result, len(problems), time.time() - start, run.score_names)
    return result


def adapt(model, args, engine):
    """Make the model trainable, from --adapter or anew; returns the trained tensors."""
    if args.method in ("lora", "full"):
        from methods import lora
        params = lora.start(model, args)
    elif args.adapter:
        params = [tinylora.load(args.adapter, model, engine.svd)]
    else:
        settings = not_none(rank=args.rank, tying=args.tie, directions=args.directions)
        params = [tinylora.adapt(model, args.params, args.u, args.n_tie, seed=args.seed,
                                 method=args.method, svd=engine.svd, **settings)]
    report.check_adapted(model, params, args)
    return params


def save(model, params, args, model_folder):
    """Write adapter.safetensors, or what methods/lora.py writes; returns the path."""
    if args.method in ("lora", "full"):
        from methods import lora
        return lora.save_run(model, args, model_folder)
    path = Path(args.out) / "adapter.safetensors"
    tinylora.save(path, params[0], model, args.v_dtype, args.model)
    return path


def grpo_step(run, optimizer, reference, problems, positions, rates):
    """Sample, score, update: (Rollout of B = P * G rows, {name: scores (B,)}, updates: what each
    grpo.update returned). positions: see problems_of_step. rates: one for each mini-batch.
    reference: the values that training began with, for --kl; else None.
    """
    args = run.args
    label = f"step {positions[0] // args.prompts + 1}"
    keys = [[3, args.seed, p, g] for p in positions for g in range(args.group)]
    noise = grpo.uniforms(keys, args.max_new_tokens)  # (B, max_new_tokens)
    rollout = roll_out(run, problems, args.group, noise, args.temperature, label)
    _, scores = score(run, rollout, problems)
    advantage = grpo.advantages(scores[args.reward].view(-1, args.group))  # (P, G)
    rollout.advantage = advantage.flatten().to(rollout.ids.device)  # (B,)

    updates = []
    for rate, mini_batch in zip(rates, rollout.split(args.minibatches)):
        optimizer.param_groups[0]["lr"] = rate
        if args.kl > 0:  # cut as in update, see support/params.py
            mini_batch.ref_logp = reference_logprobs(run, mini_batch, optimizer, reference)
        updates.append(grpo.update(run.model, optimizer, mini_batch, args, run.engine))
    return rollout, scores, updates


def train(run, params, optimizer, reference, state, train_problems, test_problems, log_elsewhere):
    """The loop, which keeps `state` for --resume; returns the final evaluations."""
    args = run.args
    out = Path(args.out)
    began = time.time() - state["seconds"]  # as if the run had never stopped
    for step in range(state["step"], args.steps):
        start = time.time()
        positions, problems = problems_of_step(step, train_problems, args)
        rates = [learning_rate(step * args.minibatches + k, args) for k in range(args.minibatches)]
        if args.algo == "grpo":
            outcome = grpo_step(run, optimizer, reference, problems, positions, rates)
        elif args.algo == "sft":
            from methods import sft
            outcome = sft.step(run, optimizer, problems, rates)
        else:
            from methods import es
            outcome = es.step(run, optimizer, problems, positions, rates, roll_out, score)
        rollout, scores, updates = outcome
        row = report.step_row(step + 1, rollout, scores, updates, optimizer, args, start)
        ranks.agree(row["v_norm"], f"what they have learned after step {step + 1}")
        if args.eval_every and (step + 1) % args.eval_every == 0 and step + 1 < args.steps:
            result = evaluate(run, test_problems, f"evaluation after step {step + 1}", step + 1)
            row |= {f"eval_{name}": value for name, value in result.items()}
        report.log_step(row, run, out, log_elsewhere, problems, rollout, scores)
        state |= {"step": step + 1, "tokens": state["tokens"] + row["tokens"],
                  "seconds": time.time() - began}
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            resume.save(out, state, params, optimizer, reference)
    final = [evaluate(run, test_problems, "evaluation", args.steps, how) for how in SAMPLED]
    state["seconds"] = time.time() - began
    return final


def work(args):
    """One run: problems, settings, model; then the chat, the evaluation or the training."""
    if args.chat:
        from tools import chat
        return chat.converse(args)
    began = time.time()
    out = Path(args.out)
    if args.resume and resume.is_finished(out, args.steps):
        return None
    task = load_task(args.task) if args.task else gsm8k
    train_problems, test_problems = load_problems(task, args)
    score_names = list(task.score("", test_problems[0]))
    settle(args, score_names, train_problems)
    report.print_settings(vars(args))
    log_elsewhere = report.wandb_logger(args)

    with resume.alone(out):
        settings = resume.begin(args, out, [train_problems, test_problems])
        folder = find_model(args.model)
        chat = Chat(folder)
        engine = importlib.import_module("fast") if args.engine == "fast" else grpo
        load = transformer.load
        if args.shard:
            from fast import shard
            load = shard.load
            engine = shard.in_parts(engine)
        model = load(folder, tinylora.DTYPES[args.dtype], args.device)
        chat.limit_vocab(model)  # model.vocab: only ids that the tokenizer has
        choose_threads(model, args.device)
        report.print_loaded(model, args, time.time() - began)
        params = adapt(model, args, engine) if args.adapter or not args.eval_only else []
        resume.complete(settings, args, out, model, chat)
        run = Run(args, model, chat, task, score_names, engine)
        if args.engine == "fast":
            engine.check(model, [run.prompt_ids(p) for p in test_problems[:3]], chat.stop_ids)
            if args.cuda_graph:
                engine.use_graphs(model)
        if args.eval_only:
            results = [evaluate(run, test_problems, "evaluation", 0, how) for how in SAMPLED]
            return report.write_evaluation(run, results, len(test_problems), began)

        optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0)
        if args.agreement:
            from methods import agreement
            agreement.start(optimizer)
        reference = [p.detach().clone() for p in params] if args.kl > 0 else None
        state = resume.load(out, params, optimizer, reference) if args.resume else None
        if state is None:  # new, or stopped before it had any
            base = [evaluate(run, test_problems, "evaluation", 0, how) for how in SAMPLED]
            state = {"step": 0, "tokens": 0, "seconds": time.time() - began, "base": base}
            resume.save(out, state, params, optimizer, reference)
        ranks.agree(state["step"], "the step they go on from")
        with program.saving_on_error(save, model, params, args, folder):
            final = train(run, params, optimizer, reference, state, train_problems, test_problems,
                          log_elsewhere)
        if ranks.RANK == 0:
            saved = save(model, params, args, folder)
            report.write_summary(run, params, saved, state, final, len(test_problems))


def flags(argv=None):
    return parse(argv, __doc__, RECIPE, LR)


def main(argv=None):  # returns the exit code, see program.run_main
    return program.run_main(lambda: flags(argv), work, resumable=True)


if __name__ == "__main__":
    sys.exit(main())
