"""How a program of this project ends: signals, exit codes, and one line for what went wrong."""
import os
import signal
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from support import ranks, terminal
from support.errors import InputError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a program as Ctrl-C does."""


def raise_terminated(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second SIGTERM must not disturb the saving
    raise Terminated


def ignore_signals():
    """Ignore Ctrl-C and SIGTERM until run_main ends, so that saving is not interrupted."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def saving_on_error(save, *args):
    """A block of training. If anything ends it, save(*args) is called: Ctrl-C, a full disk, a bug.

    A second Ctrl-C does not interrupt the saving. Rank 0 saves.
    """
    try:
        yield
    except BaseException:
        ignore_signals()
        if ranks.RANK == 0:
            save(*args)
        raise


def resume_command(args):
    """The command that goes on with a run."""
    launcher = "python"
    if ranks.SIZE > 1:
        launcher = f"torchrun --nproc_per_node {ranks.SIZE}"
    return f"{launcher} train.py --resume {terminal.shell_word(args.out)}"


def run_main(parse, work, resumable=False):
    """args = parse(), then work(args). Returns the exit code:

        0    it worked
        2    a mistake of the user, told in one line
        130  Ctrl-C, 143 SIGTERM, 141 nobody reads the output any more (as in `| head`)

    resumable: `work` is train.py's, which keeps a run in the folder args.out; then the message
    says how to go on.
    """
    args = None
    terminal.prepare()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGTERM, raise_terminated)
    speaker = f"rank {ranks.RANK}: " if ranks.RANK else ""
    try:
        args = parse()
        ranks.join(getattr(args, "device", "cpu"), getattr(args, "shard", False))
        work(args)
        ranks.leave()
        sys.stdout.flush()  # a closed pipe is an error only when it is written to
        if ranks.RANK:  # all is done; torch's threads abort an ordinary end now and then
            sys.stderr.flush()
            os._exit(0)
        return 0
    except KeyboardInterrupt as error:
        if ranks.RANK < 2:  # rank 1 reports it too, because rank 0 may be the one that ended
            hint = interrupted_hint(args) if resumable and args else ""
            print(f"\n{speaker}interrupted{hint}", file=sys.stderr)
        return 143 if isinstance(error, Terminated) else 130
    except BrokenPipeError:
        return 141
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        hint = ("; lower --rollout-rows or --max-new-tokens for sampling; "
                "for updates use --recompute") if resumable else ""
        print(f"{speaker}error: out of memory{hint}", file=sys.stderr)
    except ranks.Alone as error:
        hint = f"; to go on: {resume_command(args)}" if resumable and args else ""
        print(f"{speaker}error: {error}{hint}", file=sys.stderr)
    except (InputError, OSError) as error:
        # InputError: one line of limited length, whatever the system's error quotes
        print(f"{speaker}error: {InputError(error)}", file=sys.stderr)
    finally:
        drop_unread_output()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 2


def interrupted_hint(args):
    """What to say after "interrupted": where the run is, and how to go on with it."""
    if not Path(args.out).exists():
        return ""
    hint = f"; what was done so far is in {terminal.printable(args.out)}"
    if not args.eval_only:
        hint += f"; to go on: {resume_command(args)}"
    return hint


def is_out_of_memory(error):
    """torch raises its own error on a GPU and a plain RuntimeError on a CPU."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "allocate memory" in str(error)


def drop_unread_output():
    """If nobody reads stdout, send what is left in its buffer nowhere.

    Otherwise Python would try to write it once more at its exit, and report the failure.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # stdout may be no file (in a test)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
