"""Runs a model folder's chat template and tokenizer in a child process with limits.

A chat template is a program that comes with a model. Jinja's sandbox keeps it away from Python's
internals, but not from counting to 10**10 or asking for 100 GB. A tokenizer.json is as dangerous:
a normalizer of 40 replacements that each double the text, or a regular expression that takes
exponential time, and the library that runs it cannot be interrupted. So this file, started as a
script, is a child process that does both; the operating system limits its CPU time, its memory and
its writing to files. One child serves all templates, holds the tokenizer used last, and starts when
it is first needed. What exceeds a limit ends the child and is reported as an error; the next
question gets a new child. Starting costs 0.15 s, a prompt or a response 0.2 ms. Any thread may ask.
"""
import json
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import lru_cache

SECONDS = {"load": 5}  # CPU time, by question; Qwen2.5's 150,000 tokens load in 0.5 s and 130 MB
OTHER_SECONDS = 2
MEMORY = 640 << 20  # bytes of the child's address space
LONGEST = 1_000_000  # characters of a text, or token ids

child = None
held = None  # the tokenizer.json that the child has loaded
lock = threading.Lock()


def render(template, values=None):
    """(text, None), or (None, what went wrong). Without values only the syntax is checked."""
    with lock:
        return ask("render", template, values)


def tokenize(tokenizer, question, value):
    """(answer, None), or (None, what went wrong). tokenizer: the text of a tokenizer.json.

        "encode" a text    its token ids, without those that the tokenizer would add itself
        "decode" ids       their text, without special tokens
        "find" tokens      [the largest id + 1, or 0; {token: id} of those that there are]
    """
    global held
    with lock:
        if tokenizer is not held or not is_alive():
            answer, error = ask("load", tokenizer)
            if error:
                return answer, error
            held = tokenizer
        return ask(question, value)


def is_alive():
    return child is not None and child.poll() is None


def ask(question, *values):
    """[answer, None] or [None, what went wrong], from the child or from a new one."""
    global child, held
    if not is_alive():
        child = start_child()
        held = None
    try:
        child.stdin.write(json.dumps([question, *values]) + "\n")
        child.stdin.flush()
        return json.loads(child.stdout.readline())
    except BaseException as error:
        # Ctrl-C comes here too: an answer that was not read must not be taken for the answer
        # to the next question, so the child is replaced.
        child.kill()
        child.communicate()
        child = None
        if isinstance(error, (OSError, ValueError)):  # the child ended before its answer did
            seconds = SECONDS.get(question, OTHER_SECONDS)
            return [None, f"it used more than {seconds} s of CPU time or {MEMORY >> 20} MB"]
        raise


def start_child():
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
        start_new_session=True)  # in its own session Ctrl-C does not reach it


def raise_exception(message):
    """A function that chat templates expect to find."""
    raise ValueError(message)


def templates():
    """The function that answers "render"."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # only the child needs it
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda x, **kw: json.dumps(x, ensure_ascii=False, **kw)
    environment.globals["raise_exception"] = raise_exception
    # Llama 3.2 writes today's date into its prompts, so a run depends on its day.
    environment.globals["strftime_now"] = time.strftime
    compiled = lru_cache(maxsize=8)(environment.from_string)

    def answer(template, values):
        program = compiled(template)
        text = "" if values is None else program.render(**values)
        text.encode()  # ValueError for half of a surrogate pair
        return text
    return answer


class Tokenizer:
    """Answers the other questions."""

    def __init__(self):
        from tokenizers import Tokenizer as Library  # only the child needs it
        self.library = Library
        self.tokenizer = None

    def load(self, text):
        self.tokenizer = None  # two at once may be too much
        self.tokenizer = self.library.from_str(text)
        self.tokenizer.no_truncation()  # some files carry a length limit from their training
        self.tokenizer.no_padding()

    def find(self, tokens):
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        found = {token: vocabulary[token] for token in tokens if token in vocabulary}
        return max(vocabulary.values(), default=-1) + 1, found

    def encode(self, text):
        # The template writes the BOS token if there is one, so the tokenizer must not add another.
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def serve():
    """The child: reads lines [question, value ...], answers each with a line [answer, error]."""
    tokenizer = Tokenizer()
    answers = {"render": templates(), "load": tokenizer.load, "find": tokenizer.find,
               "encode": tokenizer.encode, "decode": tokenizer.decode}
    limits = {resource.RLIMIT_AS: MEMORY, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    for limit, value in limits.items():
        with suppress(ValueError, OSError):  # macOS does not limit memory
            resource.setrlimit(limit, (value, value))
    for line in sys.stdin:
        question, *values = json.loads(line)
        seconds = SECONDS.get(question, OTHER_SECONDS)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal, SIGPROF, ends the process
        try:
            answer = answers[question](*values)
            if question in ("render", "encode", "decode") and len(answer) > LONGEST:
                raise ValueError(f"it wrote {len(answer):,} characters or tokens, the limit is "
                                 f"{LONGEST:,}")
            reply = (answer, None)
        except BaseException as error:  # a panic of the tokenizers library is no Exception
            reply = (None, f"{type(error).__name__}: {error}"[:1000])
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
