"""python train.py --chat [--adapter A]: type a question, read what the base and the adapter answer.

Both are one model in memory: where everything trained is 0, what is left is the base, bit for bit.
"""
import importlib
import sys

import torch

import gsm8k
import grpo
import model as transformer
import tinylora
from methods import lora
from support.chat_format import Chat
from support.data import load_task
from support.errors import InputError
from support.hub import find_model
from support.params import with_values
from support.terminal import printable
from support.threads import choose_threads

# Of GSM8K's kind: the data itself would have to be fetched for two questions.
GSM8K_EXAMPLES = (
    "A baker sells 24 rolls in the morning and half as many in the afternoon. How many rolls does "
    "she sell in all?",
    "Ben saves 15 dollars a week. He wants a bicycle for 180 dollars and has 60 dollars already. "
    "How many weeks does he still have to save?")


def read_examples(task, args):
    """Two rows of the data's kind, or none where no data is given."""
    if args.data == "gsm8k":
        is_gsm8k = task is gsm8k
        return [{"question": q, "boxed": False} for q in GSM8K_EXAMPLES] if is_gsm8k else []
    _, rows = task.load(args.data, True)
    return rows[:2]


def split_prompt(task, row, instruction):
    """A row's prompt as (what one would type, what is appended to it).

    The first is the row's text with which the prompt begins, as gsm8k.py's question is. Where there
    is none, it is the whole prompt, and nothing is appended.
    """
    prompt = task.prompt(row, instruction)
    texts = [x for x in row.values() if isinstance(x, str) and x.strip() and prompt.startswith(x)]
    if not texts:
        return prompt, ""
    text = max(texts, key=len)
    return text, prompt[len(text):]


def one_line(text):
    return printable(" ".join(text.split()))


def answers(model, chat, engine, params, args, prompt):
    """{"base": its greedy answer, "adapted": the other one's, where something is trained}."""
    ids = chat.prompt(prompt, args.system)

    def answer():
        rollout = engine.generate(model, [ids], 1, args.max_new_tokens, chat.stop_ids, 0.0)
        text = chat.decode(rollout.ids[0].cpu(), rollout.mask[0].cpu())
        return printable(text, keep="\n")

    with with_values(params, [torch.zeros_like(p) for p in params]):
        texts = {"base": answer()}
    if params:
        texts["adapted"] = answer()
    return texts


def load_model(args):
    """(tokenizer and chat template, frozen model, engine) that train.py's flags ask for."""
    folder = find_model(args.model)
    chat = Chat(folder)
    model = transformer.load(folder, tinylora.DTYPES[args.dtype], args.device)
    chat.limit_vocab(model)
    choose_threads(model, args.device)
    return chat, model, importlib.import_module("fast") if args.engine == "fast" else grpo


def load_adapter(model, args, engine):
    """The trained tensors of --adapter, put on the model; [] without one."""
    if not args.adapter:
        return []
    if args.method == "lora":
        return lora.load(args.adapter, model)
    return [tinylora.load(args.adapter, model, engine.svd)]


def read_question():
    """The next line typed, or None at the end. InputError if it is no text."""
    try:
        question = input("\n> ").strip()
    except (EOFError, RuntimeError):  # the second: stdin is closed
        return None
    try:
        question.encode()
    except UnicodeEncodeError:  # from "surrogateescape", see converse
        raise InputError("the question is not valid UTF-8") from None
    return question or None


def converse(args):
    """Read questions and print answers, until an empty line or Ctrl-D."""
    if hasattr(sys.stdin, "reconfigure"):  # bytes that are no text must not end the program
        sys.stdin.reconfigure(errors="surrogateescape")
    task = load_task(args.task) if args.task else gsm8k
    examples = read_examples(task, args)
    chat, model, engine = load_model(args)
    params = load_adapter(model, args, engine)
    if args.engine == "fast":
        prompts = [chat.prompt(text, args.system) for text in GSM8K_EXAMPLES]
        engine.check(model, prompts, chat.stop_ids)
        if args.cuda_graph:
            engine.use_graphs(model)

    appended = args.instruction or ""
    if examples:
        texts, ends = zip(*(split_prompt(task, row, args.instruction) for row in examples))
        appended = ends[0]
    both = f" and {args.adapter}" if params else ""
    print(printable(f"{args.model}{both}, greedy. A question in one line; an empty line ends."))
    if appended:
        print("What is appended to each (--instruction TEXT for another, --instruction \"\" for "
              f"none):\n  {one_line(appended)}")
    if examples:
        print("Questions like those of the data:")
        for text in texts:
            print(f"  {one_line(text)}")
    sys.stdout.flush()
    while True:
        try:
            question = read_question()
            if question is None:
                return
            texts = answers(model, chat, engine, params, args, question + appended)
        except InputError as error:  # in this question: the next one may do
            print(f"error: {error}", flush=True)
            continue
        for title, text in texts.items():
            print(f"{title}:\n{text}\n", flush=True)
