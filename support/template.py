"""Renders chat templates in a child process with limits on time and memory.

A chat template is a program that comes with a model. Jinja's sandbox keeps it away from Python's
internals, but not from counting to 10**10 or asking for 100 GB. So this file, started as a
script, is a child process that renders templates; the operating system limits its CPU time, its
memory and its writing to files. One child serves all templates and starts when it is first
needed. A template that exceeds a limit ends the child and is reported as an error; the next
template gets a new child. Starting costs 0.1 s, a prompt 0.2 ms. Any thread may call `render`.
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

SECONDS = 2  # CPU time to render one template
MEMORY = 1 << 30  # bytes of the child's address space
LONGEST = 1_000_000  # characters of the rendered text

child = None
lock = threading.Lock()


def render(template, values=None):
    """(text, None), or (None, what went wrong). Without values only the syntax is checked."""
    global child
    with lock:
        if child is None or child.poll() is not None:
            child = start_child()
        try:
            child.stdin.write(json.dumps([template, values]) + "\n")
            child.stdin.flush()
            return json.loads(child.stdout.readline())
        except BaseException as error:
            # Ctrl-C comes here too: an answer that was not read must not be taken for the answer
            # to the next question, so the child is replaced.
            child.kill()
            child.communicate()
            child = None
            if isinstance(error, (OSError, ValueError)):  # the child ended before its answer did
                return None, f"it used more than {SECONDS} s of CPU time or {MEMORY >> 20} MB"
            raise


def start_child():
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
        start_new_session=True)  # in its own session Ctrl-C does not reach it


def raise_exception(message):
    """A function that chat templates expect to find."""
    raise ValueError(message)


def serve():
    """The child: reads lines [template, values], answers each with a line [text, error]."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # only the child needs it
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda x, **kw: json.dumps(x, ensure_ascii=False, **kw)
    environment.globals["raise_exception"] = raise_exception
    # Llama 3.2 writes today's date into its prompts, so a run depends on its day.
    environment.globals["strftime_now"] = time.strftime
    compiled = lru_cache(maxsize=8)(environment.from_string)
    limits = {resource.RLIMIT_AS: MEMORY, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    for limit, value in limits.items():
        with suppress(ValueError, OSError):  # macOS does not limit memory
            resource.setrlimit(limit, (value, value))
    for line in sys.stdin:
        template, values = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal, SIGPROF, ends the process
        try:
            program = compiled(template)
            text = "" if values is None else program.render(**values)
            text.encode()  # ValueError for half of a surrogate pair
            if len(text) > LONGEST:
                raise ValueError(f"it wrote {len(text):,} characters, the limit is {LONGEST:,}")
            answer = (text, None)
        except Exception as error:  # the template may fail in any way
            answer = (None, f"{type(error).__name__}: {error}"[:1000])
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
