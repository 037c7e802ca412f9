"""Runs of train.py as processes: several at a time, gone on with after any end, none made twice.

A run is a dict (tools/sweep.py: request): its key, and the words after train.py. It lives in the
folder that has the key's name, and is over when its summary.json is there. A lock file beside the
folder is open in the process that works on it, and a process that survives the kill -9 of its
sweep keeps it: so a sweep that is started anew, or another one, waits for that process's result.
"""
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from support.errors import InputError
from support.files import make_folder
from support.terminal import printable

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
PAUSE = 0.1  # seconds between two looks at the processes
TRIES = 2  # of a run in one sweep: one may be killed, or find its state damaged


def work_off(needed, collect, folder, at_once):
    """Make runs until there is nothing to do.

    needed() -> the runs that are missing now, the most urgent first; collect(run, its folder) takes
    the result of one, after which needed() leaves it out. InputError at the end if a run failed:
    what does not wait for it is done before.
    """
    make_folder(folder)
    processes = {}  # key: (process, lock)
    fails = {}  # key: times
    try:
        missing = needed()
        while True:
            ended = note_ends(processes)
            ready = [run for run in missing if (folder / run["key"] / "summary.json").is_file()]
            for run in ready:
                collect(run, folder / run["key"])
            for run in missing:
                if run["key"] in ended and run not in ready:
                    fails[run["key"]] = fails.get(run["key"], 0) + 1
            if ready:
                missing = needed()
                continue  # some of them may be there
            waiting = [run for run in missing if fails.get(run["key"], 0) < TRIES]
            if not waiting and not processes:
                break
            start_some(waiting, processes, fails, folder, at_once)
            time.sleep(PAUSE)
    finally:  # Ctrl-C, an error: every run keeps its state
        for process, _ in processes.values():
            process.terminate()
        for process, lock in processes.values():
            process.wait()
            os.close(lock)
    failed = [key for key, times in fails.items() if times >= TRIES]
    if failed:
        path = folder / f"{failed[0]}.txt"
        last = path.read_text(errors="replace").strip().rpartition("\n")[2]
        raise InputError(f"{len(failed)} of the runs failed; the first, see {path}: {last}")


def note_ends(processes):
    """Forget the processes that have ended; their keys."""
    ended = {key for key, (process, _) in processes.items() if process.poll() is not None}
    for key in ended:
        os.close(processes.pop(key)[1])
    return ended


def start_some(missing, processes, fails, folder, at_once):
    """Start the first of the missing runs, until `at_once` are at work, whoever started them."""
    working = len(processes)
    for run in missing:
        if working >= at_once:
            return
        if run["key"] in processes:
            continue
        working += 1
        lock = lock_file(folder / f"{run['key']}.lock")
        if lock is not None:  # else a process of an earlier or another sweep is at it
            processes[run["key"]] = start(run, folder, lock, fails.get(run["key"], 0)), lock


@contextmanager
def alone(path):
    """A block in which no other sweep writes the results in `path`. InputError if one does."""
    try:
        lock = lock_file(Path(f"{path}.lock"))
    except OSError as error:  # a read-only folder
        raise InputError(f"{path}: cannot be written ({error.strerror}); use --out") from None
    if lock is None:
        raise InputError(f"{path}: another sweep is writing it; wait, or choose another --out")
    try:
        yield
    finally:
        os.close(lock)


def lock_file(path):
    """A handle that holds the lock on a file, or None if another process holds it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def start(run, folder, lock, fails):
    """The process of a run: gone on with where it stopped, or begun anew after a failure."""
    out = folder / run["key"]
    command = [sys.executable, str(TRAIN)]
    if (out / "config.json").is_file() and not fails:
        words = ["--resume", str(out)]
    else:
        shutil.rmtree(out, ignore_errors=True)
        words = [*run["words"], "--out", str(out)]
    print(printable(f"start: train.py {shlex.join(words)}"), flush=True)
    # One thread each: the runs share the cores. The lock is inherited and ends with the process.
    with open(folder / f"{run['key']}.txt", "ab") as log:
        return subprocess.Popen(command + words, env=os.environ | {"OMP_NUM_THREADS": "1"},
                                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[lock])
