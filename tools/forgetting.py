"""What a model has unlearned by training: its loss on other texts, its obedience to other orders.

    python -m tools.forgetting ADAPTER [--count N] [--out FILE.json]            the toy
    python -m tools.forgetting ADAPTER --model M --text PROSE.txt [--text ...]  any model

ADAPTER is an adapter.safetensors, a LoRA's folder, or the model folder of a run with --method full;
--model is the model before (the toy unless given).

The toy's training text has three styles, and a system message may announce which one follows. The
test questions, which it never saw, are answered by toy/make.py in each announced style, and without
an announcement in the shares of its training text. Told is, before and after, the mean loss in nats
per token on these answers, and on the questions; and the strict score of the model's own responses
where a system message asks for each style, and how many responses are in that style. A hasty or
guessed answer is often wrong: where a guess is asked for, a high score is no success.

--text: the mean loss per token on a file of prose, in pieces of at most 256 tokens. An error is
that of the change: texts before and after are paired.

Another task is forgotten, or not, by the command that evaluates any adapter, once with it and once
without:   python train.py --eval-only --adapter ADAPTER --model M --data D [--task T]
"""
import os
import re
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch

import grpo
import train
from support.data import module_at
from support.errors import InputError
from support.files import LARGEST_DATA, read_jsonl, read_text, write_json
from support.flags import TOY, Parser, count
from support.params import with_values
from support.program import run_main
from support.scores import MODES, main_score
from support.terminal import printable
from tools import opened
from tools.runs import markdown_table

PIECE = 256  # tokens of prose that are read at once
PARAGRAPH = 4000  # characters that are tokenized at once
ROWS = 64  # texts in a batch
PLAIN = "plain"  # no announcement
SHARES = (0.3, 0.3, 0.4)  # careful, hasty, guess: after a plain question, as toy/make.py says
SEED = 0


# ---- texts: pairs (ids before, ids whose loss is measured)

def toy_maker():
    """The module toy/make.py."""
    return module_at(TOY / "make.py")


def sums_of(answer):
    """The steps of a problem, as make.solution takes them, from its answer in the test file."""
    found = re.findall(r"^(\d+) ([+-]) (\d+) = <<[^>]*>>(\d+)$", answer, re.MULTILINE)
    return [(int(a), sign, int(b), int(c)) for a, sign, b, c in found]


def toy_texts(make, chat, problems):
    """{"careful, answers": [(prompt ids, response ids)], "careful, questions": ..., "plain, ...}"""
    stream = np.random.RandomState(SEED)
    styles = list(make.SYSTEM)
    texts = {}
    for style in (*styles, PLAIN):
        system = make.SYSTEM.get(style)
        answers = []
        for problem in problems:
            own = styles[stream.choice(len(styles), p=SHARES)] if style == PLAIN else style
            text = make.solution(sums_of(problem["answer"]), own, stream)
            prompt = problem["question"] + make.INSTRUCTION
            answers.append((chat.prompt(prompt, system), chat.response(prompt, text, system)))
        texts[f"{style}, answers"] = answers
        texts[f"{style}, questions"] = [(ids[:1], ids[1:]) for ids, _ in answers]
    return texts


def prose(chat, path):
    """A file's text in pieces: of each, the first token is given, the others are predicted."""
    text = read_text(path, LARGEST_DATA)
    ids = []
    for start in range(0, len(text), PARAGRAPH):
        ids += chat.encode(text[start:start + PARAGRAPH])
    pieces = [ids[start:start + PIECE] for start in range(0, len(ids), PIECE)]
    pairs = [(piece[:1], piece[1:]) for piece in pieces if len(piece) > 1]
    if not pairs:
        raise InputError(f"--text {path}: holds no text to predict")
    return pairs


# ---- measurements

@torch.no_grad()
def losses(run, pairs):
    """(nats (N,), tokens (N,)) of texts, pairs of ids: of the second ids, after the first."""
    nats = []
    for start in range(0, len(pairs), ROWS):
        some = pairs[start:start + ROWS]
        ids = grpo.pad([list(ids) for _, ids in some], run.args.device)  # (B, T)
        lengths = torch.tensor([len(ids) for _, ids in some], device=ids.device)
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        logp = torch.zeros(ids.shape, device=ids.device)
        rollout = grpo.Rollout([list(ids) for ids, _ in some], ids, mask, logp, temperature=1.0)
        nats += (-run.engine.logprobs(run.model, rollout).double().sum(1)).tolist()
    return np.array(nats), np.array([len(ids) for _, ids in pairs])


def compared(before, after, tokens):
    """Means per token before and after, and the change's standard error, texts paired."""
    change = after - before
    error = change.std(ddof=1) * len(change) ** 0.5 / tokens.sum() if len(change) > 1 else None
    return {"before": before.sum() / tokens.sum(), "after": after.sum() / tokens.sum(),
            "error": error, "texts": len(tokens), "tokens": int(tokens.sum())}


def side(run, problems, texts, make):
    """What is measured of a model: ({name of texts: (nats, tokens)}, {style: {mode: scores}}).

    To the scores come the shares of the responses in each style, by its name.
    """
    nats = {name: losses(run, pairs) for name, pairs in texts.items()}
    asked = {}
    path = Path(run.args.out) / "samples.jsonl"
    run.args.samples = len(problems)
    for style in (*make.SYSTEM, PLAIN) if make else ():
        run.args.system = make.SYSTEM.get(style)
        asked[style] = opened.scores(run, problems, style)
        rows = [row for _, row in read_jsonl(path)]
        path.unlink()
        for sampled, mode in enumerate(MODES):
            found = [style_of(row["response"]) for row in rows if row["sampled"] == bool(sampled)]
            asked[style][mode] |= {name: found.count(name) / len(found) for name in make.SYSTEM}
    run.args.system = None
    return nats, asked


def style_of(text):
    """careful, hasty, guess or None, by how toy/make.py's solutions begin."""
    beginnings = {"careful": "Let's go step by step", "hasty": r"\d+ [+-] ", "guess": "Maybe "}
    return next((name for name, start in beginnings.items() if re.match(start, text)), None)


def is_toy(model):
    return Path(model).resolve() == TOY.resolve()


def is_full(path):
    """True for the model folder of --method full; a LoRA's folder has adapter_config.json."""
    return (path / "config.json").is_file() and not (path / "adapter_config.json").is_file()


def measure(args):
    """The JSON's contents."""
    make = toy_maker() if is_toy(args.model) else None
    words = ["--eval-only", f"--data={TOY}"]  # another model has no use for these problems
    words += [f"--device={args.device}"] if args.device else []
    if is_full(Path(args.adapter)):  # two models, one after the other; both with the first's limit
        limit = train.flags([*words, f"--model={args.model}"]).max_new_tokens
        words.append(f"--max-new-tokens={limit}")
        commands = [[*words, f"--model={folder}"] for folder in (args.model, args.adapter)]
    else:  # one model, and where everything trained is 0, it is the base
        commands = [[*words, f"--model={args.model}", f"--adapter={args.adapter}"]]
    sides = []
    for command in commands:
        with opened.opened(train.flags(command), args.count) as (run, params, problems):
            texts = toy_texts(make, run.chat, problems) if make else {}
            texts |= {f"prose, {path}": prose(run.chat, path) for path in args.text}
            if params:
                with with_values(params, [torch.zeros_like(p) for p in params]):
                    sides.append(side(run, problems, texts, make))
            sides.append(side(run, problems, texts, make))
    (nats, asked), (nats_after, asked_after) = sides
    loss = {name: compared(nats[name][0], nats_after[name][0], nats[name][1]) for name in nats}
    pairs = {style: {mode: {"before": modes[mode], "after": asked_after[style][mode]}
                     for mode in MODES} for style, modes in asked.items()}
    return {"adapter": args.adapter, "model": args.model, "count": len(problems), "loss": loss,
            "asked": pairs}


# ---- the report

def markdown(found):
    rows = []
    for name, x in found["loss"].items():
        error = "" if x["error"] is None else f" +- {x['error']:.3f}"
        rows.append((printable(name), x["texts"], x["tokens"], f"{x['before']:.3f}",
                     f"{x['after']:.3f}", f"{x['after'] - x['before']:+.3f}{error}"))
    header = ("nats per token", "texts", "tokens", "before", "after", "change")
    losses_table = markdown_table(header, rows)
    if not found["asked"]:
        return losses_table
    rows = []
    for style, modes in found["asked"].items():
        cells = []
        for pair in modes.values():
            score = main_score([name for name in pair["before"] if name != "length"])
            for name in (score, style):
                cells += [f"{pair[when][name]:.3f}" if name in pair[when] else ""
                          for when in ("before", "after")]
        rows.append((style, *cells))
    header = (f"asked for ({found['count']} problems)",
              *(f"{mode}: {what}" for mode in MODES
                for what in ("score before", "after", "in style before", "after")))
    return f"{losses_table}\n\n{markdown_table(header, rows)}"


def parse(argv):
    cli = Parser(prog="python -m tools.forgetting", description=__doc__, allow_abbrev=False,
                 formatter_class=RawDescriptionHelpFormatter)
    cli.add_argument("adapter", metavar="ADAPTER")
    cli.add_argument("--model", default=os.path.relpath(TOY), help="the model before (the toy)")
    cli.add_argument("--text", action="append", help="a file of prose; may be repeated")
    cli.add_argument("--count", type=count, default=500, help="test problems of the toy (500)")
    cli.add_argument("--device", default="", help="cpu, cuda or cuda:1 (cuda if there is one)")
    cli.add_argument("--out", metavar="FILE.json")
    args = cli.parse_args(argv)
    args.text = args.text or []
    return args


def work(args):
    if not args.text and not is_toy(args.model):
        raise InputError("nothing to measure: only the toy has texts of its own; give --text")
    found = measure(args)
    if args.out:
        write_json(args.out, found)
    print(f"\n{markdown(found)}")


def main(argv=None):
    """Returns the exit code, see program.run_main."""
    return run_main(lambda: parse(argv), work)


if __name__ == "__main__":
    sys.exit(main())
