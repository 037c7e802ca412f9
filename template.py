"""A chat template is a program that comes with a model. It runs in a process of its own, which can do little and not for long.

Jinja's sandbox keeps a template away from Python's insides, but not from counting to 10**10 or asking for 100 GB. So this file,
run as a script, is the one that renders: one child for all templates, started when first needed, in which the operating
system itself sets the limits: CPU time, memory, and not one byte written to a file. A template that goes too far kills its own
process and becomes an InputError; the next one gets a new process. It works from any thread, and costs 0.1 s once and
0.2 ms a prompt.
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

SECONDS, MEMORY, LONGEST = 2, 1 << 30, 1_000_000  # CPU time of one rendering; bytes of address space; characters of its result
child, lock = None, threading.Lock()


def render(template, values=None):
    """(the text, None), or (None, what went wrong). values: what the template may use; None only checks its grammar."""
    global child
    with lock:
        if child is None or child.poll() is not None:
            child = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                     text=True, encoding="utf-8", start_new_session=True)  # its own session: Ctrl-C is ours to handle
        try:
            child.stdin.write(json.dumps([template, values]) + "\n")
            child.stdin.flush()
            return json.loads(child.stdout.readline())
        except BaseException as error:  # Ctrl-C too: an answer that nobody waited for must not be taken for the next one's
            child.kill()
            child.communicate()
            child = None
            if isinstance(error, (OSError, ValueError)):  # a pipe closed at the other end, an answer cut short
                return None, f"it used more than {SECONDS} s of CPU time or {MEMORY >> 20} MB"
            raise


def fail(message):
    """raise_exception, which templates expect to find."""
    raise ValueError(message)


def serve():
    """The child: one JSON line [template, values] in, one JSON line [text, error] out, until our parent is gone."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # here, because only the child needs it
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.filters["tojson"] = lambda x, **kw: json.dumps(x, ensure_ascii=False, **kw)
    env.globals["raise_exception"] = fail
    env.globals["strftime_now"] = time.strftime  # Llama 3.2 writes the date into its prompts: a run is of its day
    compiled = lru_cache(maxsize=8)(env.from_string)
    for limit, value in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        with suppress(ValueError, OSError):  # macOS does not limit memory
            resource.setrlimit(limit, (value, value))
    for line in sys.stdin:
        template, values = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # SIGPROF has no handler here, so it ends the process
        try:
            program = compiled(template)
            text = "" if values is None else program.render(**values)
            text.encode()  # half a surrogate pair is no text
            if len(text) > LONGEST:
                raise ValueError(f"it wrote {len(text):,} characters, the limit is {LONGEST:,}")
            answer = text, None
        except Exception as error:  # it is somebody else's program: it may fail in any way
            answer = None, f"{type(error).__name__}: {error}"[:1000]
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
