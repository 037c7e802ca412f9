"""python train.py --chat [--adapter FILE]: type a question, read the answers of the base and of the adapted model side by side.

Both are one model in memory: where everything trained is 0, what is left is the base, bit for bit.
"""
import shutil
from itertools import zip_longest
from textwrap import wrap

import torch

import gsm8k
import grpo
import lora
import model as transformer
import tinylora
from files import InputError
from flags import find_model
from graph import Graphs


def open_model(args):
    """--model -> (its folder, Chat, Transformer); InputError when one is damaged or they do not belong together."""
    folder = find_model(args.model)
    transformer.read_config(folder)  # the cheap complaints first
    chat = gsm8k.Chat(folder)
    model = transformer.load(folder, tinylora.DTYPES[args.dtype], args.device)
    if chat.vocab > model.config.vocab_size:
        raise InputError(f"{folder}: the tokenizer has {chat.vocab} ids, the model only {model.config.vocab_size}")
    model.graphs = Graphs(model) if args.cuda_graph else None
    return folder, chat, model


def answers(model, chat, params, args, question):
    """{"base": its greedy answer, "adapted": the other one's, where something is trained} to a question, asked as GSM8K's are."""
    def answer():
        ids, mask, _ = grpo.generate(model, [chat.prompt(question + gsm8k.INSTRUCTION, args.system)], 1, args.max_new_tokens, chat.stop_ids, vocab=chat.vocab)
        text = chat.decode(ids[0].cpu(), mask[0].cpu())
        return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)  # no terminal codes
    with grpo.with_values(params, [torch.zeros_like(p) for p in params]):
        texts = {"base": answer()}
    return texts | ({"adapted": answer()} if params else {})


def columns(texts, width):
    """Texts by title -> lines of `width` characters with the texts side by side."""
    each = (width + 3) // len(texts) - 3
    blocks = [[title, "-" * each] + [part for line in text.split("\n") for part in wrap(line, each) or [""]] for title, text in texts.items()]
    return ["   ".join(f"{cell:{each}}" for cell in row).rstrip() for row in zip_longest(*blocks, fillvalue="")]


def converse(args):
    """Reads questions until an empty line or Ctrl-D."""
    _, chat, model = open_model(args)
    params = [] if not args.adapter else lora.load(args.adapter, model) if args.method == "lora" else [tinylora.load(args.adapter, model)]
    print(f"{args.model}" + (f" and {args.adapter}" if params else "") + ", greedy. A question in one line; an empty line ends.", flush=True)
    while True:
        try:
            question = input("\n> ").strip()
        except EOFError:
            question = ""
        if not question:
            return
        try:
            print("\n".join(columns(answers(model, chat, params, args, question), shutil.get_terminal_size().columns)), flush=True)
        except InputError as error:  # of this question: the next one may do
            print(f"error: {error}", flush=True)
