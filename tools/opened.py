"""A model and what was trained on it, opened once for many evaluations: path.py, forgetting.py."""
import importlib
import tempfile
from contextlib import contextmanager

import gsm8k
import grpo
import model as transformer
import tinylora
import train
from support.chat_format import Chat
from support.data import load_problems, load_task
from support.flags import settle
from support.hub import find_model
from support.scores import MODES
from support.threads import choose_threads


@contextmanager
def opened(args, count=None):
    """(train.py's Run, what is trained: a list of tensors, test problems) for flags of train.py's.

    With args.eval_only and no args.adapter nothing is trained: []. count: problems, the first so
    many (all of the run's). Nothing is written but to a temporary folder, which is removed.
    """
    task = load_task(args.task) if args.task else gsm8k
    args.eval_count = count or args.eval_count
    training, problems = load_problems(task, args)
    names = list(task.score("", problems[0]))
    settle(args, names, training)
    args.samples = 0
    folder = find_model(args.model)
    chat = Chat(folder)
    engine = importlib.import_module("fast") if args.engine == "fast" else grpo
    model = transformer.load(folder, tinylora.DTYPES[args.dtype], args.device)
    chat.limit_vocab(model)
    choose_threads(model, args.device)
    params = train.adapt(model, args, engine) if args.adapter or not args.eval_only else []
    with tempfile.TemporaryDirectory() as args.out:
        yield train.Run(args, model, chat, task, names, engine), params, problems


def scores(run, problems, label):
    """{mode: {score or "length": mean}}: train.py's own evaluation, greedy and at T = 1."""
    return {mode: train.evaluate(run, problems, label, 0, bool(sampled))
            for sampled, mode in enumerate(MODES)}
