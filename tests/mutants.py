"""Do the tests notice? Each line of MUTANTS breaks the program at one place; a test must fail.

    python tests/mutants.py              all of them, some minutes
    python tests/mutants.py warm clip    those whose name holds one of the words

Works on a copy of the tree in a temporary folder. It ends with exit code 1 if a mutant survives,
if the text it replaces is not there exactly once, or if the tests fail on the tree as it is. Not
part of the test suite: run it after a change of train.py, grpo.py or support/, and when a line
named here changes, change it here too.
"""
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("fast", "methods", "support", "tools", "tests", "toy", "results")
RECIPE = "tests/test_recipe.py"

RUN = [f"{RECIPE}::test_a_run_is_the_recipe"]
DEFAULTS = [f"{RECIPE}::test_the_defaults_are_the_papers"]
RESUMED = [f"{RECIPE}::test_a_resumed_run_holds_on_to_the_first_policy"]
DISK = [f"{RECIPE}::test_log_rows_are_on_the_disk_before_their_state"]
AGREEMENT = ["tests/test_agreement.py"]
LAST = [f"{RECIPE}::test_the_last_state_is_saved"]
AGREE = [f"{RECIPE}::test_ranks_that_differ_end_the_run",
         f"{RECIPE}::test_ranks_that_resume_from_different_steps_end"]
SEARCH = [f"{RECIPE}::test_noise_of_a_search_never_repeats"]
SHUFFLE = "RandomState([2, args.seed, epoch, 0])"
CLAMP = "clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)"
HIGH = "too_high = (advantage > 0) & (delta.exp() > 1 + args.clip_high)"
KEEP = "reference = [p.detach().clone() for p in params] if args.kl > 0 else None"
LOAD = "state = resume.load(out, params, optimizer, reference) if args.resume else None"

# (name, file, text that is there once, what replaces it, tests of which one must fail)
MUTANTS = [
    ("warm-up dropped", "train.py",
     "return args.lr * min(1, (update + 1) / warmup)", "return args.lr", RUN),
    ("warm-up one update late", "train.py",
     "min(1, (update + 1) / warmup)", "min(1, update / warmup)", RUN),
    ("evaluation on training problems", "support/data.py",
     "return train_problems, test_problems[:args.eval_count]",
     "return train_problems, train_problems[:args.eval_count]", RUN),
    ("first evaluation on training problems", "train.py",
     "base = [evaluate(run, test_problems,", "base = [evaluate(run, train_problems,", RUN),
    ("last evaluation on training problems", "train.py",
     "final = [evaluate(run, test_problems,", "final = [evaluate(run, train_problems,", RUN),
    ("evaluation after a step on training problems", "train.py",
     "evaluate(run, test_problems, f", "evaluate(run, train_problems, f", RUN),
    ("evaluation sampled at the run's temperature", "train.py",
     "1.0 if sampled else 0.0, label)", "run.args.temperature if sampled else 0.0, label)", RUN),
    ("the first score paid, whatever --reward", "train.py",
     "scores[args.reward].view", "scores[run.score_names[0]].view", RUN),
    ("the second score paid, whatever --reward", "train.py",
     "scores[args.reward].view", "scores[run.score_names[1]].view", RUN),
    ("temperature 1.0 given to the update", "grpo.py",
     "temperature=chunks[0].temperature)", "temperature=1.0)", RUN),
    ("temperature missing in the plain trainer", "grpo.py",
     "log_softmax(model.logits(hidden), rollout.temperature or 1.0)",
     "log_softmax(model.logits(hidden), 1.0)", RUN),
    ("temperature missing in the fast trainer", "fast/training.py",
     "token_logps(model, hidden, target, rollout.temperature or 1.0)",
     "token_logps(model, hidden, target, 1.0)", RUN),
    ("clip bounds swapped in the loss", "grpo.py",
     CLAMP, "clipped = ratio.clamp(1 - args.clip_high, 1 + args.clip_low)", RUN),
    ("the upper clip bound as low as the lower", "grpo.py",
     CLAMP, CLAMP.replace("args.clip_high", "args.clip_low"), RUN),
    ("clip bounds swapped in the log", "grpo.py",
     HIGH, HIGH.replace("high)", "low)"), RUN),
    ("weight decay 0.01", "train.py", "weight_decay=0.0", "weight_decay=0.01", RUN),
    ("weight decay 0.01, seen in the optimizer", "train.py",
     "weight_decay=0.0", "weight_decay=0.01", DEFAULTS),
    ("betas 0.9, 0.95", "train.py", "betas=(0.9, 0.999)", "betas=(0.9, 0.95)", RUN),
    ("every epoch shuffled alike", "train.py",
     SHUFFLE, SHUFFLE.replace("epoch", "0"), RUN),
    ("every seed shuffles alike", "train.py",
     SHUFFLE, SHUFFLE.replace("args.seed", "0"), RUN),
    ("one epoch by default", "support/flags.py",
     "3 * len(train_rows) // args.prompts", "len(train_rows) // args.prompts", RUN),
    ("kl=0 given to the update", "grpo.py",
     "loss = loss + args.kl * k3", "loss = loss + 0 * k3", RUN),
    ("kl turned round", "grpo.py",
     "return (ref_logp - logp).exp() - (ref_logp - logp) - 1",
     "return (logp - ref_logp).exp() - (logp - ref_logp) - 1", RUN),
    ("gradient clipping off", "grpo.py",
     "clip_grad_norm_(params, args.grad_clip)", "clip_grad_norm_(params, 1e9)", RUN),
    ("the loss divided by the rows", "grpo.py",
     "loss(logp, micro_batch, tokens, args)", "loss(logp, micro_batch, len(index), args)", RUN),
    ("a population's std in the advantage", "grpo.py",
     "correction=min(1, rewards.shape[1] - 1)", "correction=0", RUN),
    ("v not rounded to --v-dtype", "grpo.py",
     "p.copy_(p.to(DTYPES[args.v_dtype]))", "p.copy_(p)", RUN),
    ("the log's fsync dropped", "support/resume.py", "os.fsync(file.fileno())", "pass", DISK),
    ("ranks never object", "support/ranks.py",
     "if max(values) - min(values) >", "if False and max(values) - min(values) >", AGREE),
    ("ranks do not compare v", "train.py",
     'ranks.agree(row["v_norm"],', "ranks.agree(0,", AGREE),
    ("ranks do not compare the step", "train.py",
     'ranks.agree(state["step"],', "ranks.agree(0,", AGREE),
    ("the KL reference not restored", "support/resume.py",
     "reference[int(i)].copy_(x)", "pass", RESUMED),
    ("the KL reference taken after the state", "train.py",
     f"{KEEP}\n        {LOAD}",
     f"reference = [p.detach().clone() for p in params]\n        {LOAD}\n        {KEEP}", RESUMED),
    ("Adam's moments not restored", "support/resume.py",
     "optimizer.load_state_dict(", "str(", RESUMED),
    ("the last state not saved", "train.py",
     "(step + 1) % args.save_every == 0 or step + 1 == args.steps",
     "(step + 1) % args.save_every == 0", LAST),
    ("a mini-batch agrees with itself", "methods/agreement.py",
     "updates) * g * m ", "updates) * m * m ", AGREEMENT),
    ("opposite gradients agree", "methods/agreement.py",
     "max(0.0, confirmed /", "abs(confirmed /", AGREEMENT),
    ("the agreement's means not restored", "support/resume.py",
     "optimizer_state.setdefault(int(i), {})[kind] = x",
     "optimizer_state.setdefault(int(i), {}).update({} if kind == 'dot' else {kind: x})",
     AGREEMENT),
    ("chance counts as agreement", "methods/agreement.py", "CHANCE = 2.0", "CHANCE = 0.0",
     AGREEMENT),
    ("default lr 1.6e-3", "train.py", '{"tinylora": 1.6e-4', '{"tinylora": 1.6e-3', DEFAULTS),
    ("default clip-high 0.2", "train.py", '("clip-high", 0.4', '("clip-high", 0.2', DEFAULTS),
    ("default prompts 32", "train.py", '("prompts", 64', '("prompts", 32', DEFAULTS),
    ("default minibatches 1", "train.py", '("minibatches", 2', '("minibatches", 1', DEFAULTS),
    ("noise alike in a group", "train.py",
     "[3, args.seed, p, g]", "[3, args.seed, p, 0]", RUN),
    ("noise keys that collide", "train.py",
     "[3, args.seed, p, g]", "[3, args.seed, p + g, 0]", RUN),
    ("noise of every problem alike", "train.py",
     "[3, args.seed, p, g]", "[3, args.seed, 0, g]", RUN),
    ("evaluation noise alike", "train.py", "[[4, 0, i, 0]", "[[4, 0, 0, 0]", RUN),
    ("directions of a search that collide", "methods/es.py", "[6, *key]", "[6, *key[:2]]", SEARCH),
    ("noise of a search that collides", "methods/es.py", "[3, *key]", "[3, *key[:2]]", SEARCH),
]


def failing(tree, tests):
    """(the first test that fails or None, pytest's last lines)."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    # no bytecode: a file changed twice in one second, at the same length, would not be read again
    settings = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tree, env=os.environ | settings, capture_output=True,
                          text=True)
    if done.returncode == 0:
        return None, ""
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if done.returncode != 1 or not failed:
        output = done.stdout[-3000:] + done.stderr[-1000:]
        raise SystemExit(f"pytest could not run {tests}:\n{output}")
    return failed[0], done.stdout[-3000:]


def main(words):
    chosen = [m for m in MUTANTS if not words or any(word in m[0] for word in words)]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        tree.mkdir()
        for path in ROOT.glob("*.py"):
            shutil.copy(path, tree)
        for name in FOLDERS:
            if (ROOT / name).is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / name, tree / name, ignore=ignore)
        tests = sorted({test for *_, names in chosen for test in names})
        failed, output = failing(tree, tests)
        if failed:
            raise SystemExit(f"the tree as it is fails: {failed}\n{output}")
        for what, file, old, new, names in chosen:
            start = time.time()
            text = (ROOT / file).read_text(encoding="utf-8")
            if text.count(old) != 1:
                print(f"NOT FOUND  {what}: {file} holds {text.count(old)} times\n{old}", flush=True)
                survivors.append(what)
                continue
            broken = text.replace(old, new)
            compile(broken, file, "exec")  # a syntax error would prove nothing
            (tree / file).write_text(broken, encoding="utf-8")
            failed, _ = failing(tree, names)
            (tree / file).write_text(text, encoding="utf-8")
            verdict = "caught  " if failed else "SURVIVED"
            print(f"{verdict} {time.time() - start:4.0f} s  {what}: {failed or file}", flush=True)
            if not failed:
                survivors.append(what)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
