"""A model and what was trained on it, opened once for many evaluations: path.py, forgetting.py."""
import tempfile
from contextlib import contextmanager

import gsm8k
import train
from support.data import load_problems, load_task
from support.flags import settle
from support.scores import MODES
from tools.chat import load_model


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
    chat, model, engine = load_model(args)
    params = train.adapt(model, args, engine) if args.adapter or not args.eval_only else []
    with tempfile.TemporaryDirectory() as args.out:
        yield train.Run(args, model, chat, task, names, engine), params, problems


def scores(run, problems, label):
    """{mode: {score or "length": mean}}: train.py's own evaluation, greedy and at T = 1."""
    return {mode: train.evaluate(run, problems, label, 0, bool(sampled))
            for sampled, mode in enumerate(MODES)}
