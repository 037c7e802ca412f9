"""Where problems come from: a folder with train.jsonl and test.jsonl, one file, or a download."""
import hashlib
import http.client
import importlib.util
import os
import urllib.request
from pathlib import Path

from support.errors import InputError
from support.files import make_folder, read_jsonl, replacing


def split_paths(data, eval_only):
    """--data -> (path of the training file or None, path of the test file)."""
    folder = Path(data)
    if folder.is_dir():
        return folder / "train.jsonl", folder / "test.jsonl"
    if not folder.exists():
        raise InputError(f"--data {data}: no such file or folder; give a folder with train.jsonl "
                         f"and test.jsonl")
    if not eval_only:
        raise InputError(f"--data {data}: one file is enough for --eval-only; training takes a "
                         f"folder with train.jsonl and test.jsonl")
    return None, folder


def load_rows(data, eval_only=False):
    """(training rows, test rows) as the JSON lines stand in the files: a task's default `load`."""
    def rows(path):
        if path is None:
            return []
        found = [row for _, row in read_jsonl(path)]
        if not found:
            raise InputError(f"{path}: holds no problems")
        return found
    train_path, test_path = split_paths(data, eval_only)
    return rows(train_path), rows(test_path)


def load_problems(task, args):
    """(training problems, test problems) of --data; the latter at most --eval-count.

    With --eval-data the test problems are those of its sets, at most --eval-count of each, one set
    after the other; every problem then has the name of its set as "eval_set".
    """
    if args.eval_data is None:
        train_problems, test_problems = task.load(args.data, args.eval_only)
        return train_problems, test_problems[:args.eval_count]
    test_problems = []
    for name in set_names(args.eval_data):
        try:
            found = task.load(name, True)[1]
        except InputError as error:
            raise InputError(str(error).replace("--data ", "--eval-data ", 1)) from None
        test_problems += [row | {"eval_set": name} for row in found[:args.eval_count]]
    return [] if args.eval_only else task.load(args.data, False)[0], test_problems


def set_names(text):
    """--eval-data -> the names of its sets."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if not name:
            raise InputError(f"--eval-data {text}: has an empty name; put one comma between two")
        if names.count(name) > 1:
            raise InputError(f"--eval-data {text}: has {name} twice")
    return names


def module_at(path):
    """A Python file, run as a module of its own; None if its name does not end in .py."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_task(path):
    """--task FILE.py -> the module, with `prompt`, `score` and, if it has none, our `load`.

    The file is the user's program and runs with the user's rights; InputError says what it lacks.
    """
    if not Path(path).is_file():
        raise InputError(f"--task {path}: no such file")
    try:
        task = module_at(path)
    except Exception as error:  # any: it is the user's program
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"--task {path}: fails when it is read ({reason})") from None
    if task is None:
        raise InputError(f"--task {path}: is no Python file; its name must end in .py")
    for name in ("prompt", "score"):
        if not callable(getattr(task, name, None)):
            raise InputError(f"--task {path}: has no function {name}; see docs/your-own-task.md")
    if not hasattr(task, "load"):
        task.load = load_rows
    return task


def download(url, name, sha256):
    """One file, fetched once, checked, and kept as `name` in the cache folder; returns its path."""
    path = Path(os.environ.get("TINYLORA_CACHE") or Path.home() / ".cache" / "tinylora") / name
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    print(f"downloading {url} to {path.parent}", flush=True)
    try:
        make_folder(path.parent)
        with urllib.request.urlopen(url, timeout=60) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:  # the second: cut in the middle
        raise InputError(f"{url} cannot be downloaded to {path.parent} ({error}); go online once, "
                         f"set TINYLORA_CACHE, or point --data at a folder with train.jsonl and "
                         f"test.jsonl") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InputError(f"{url} has changed (its sha256 is not {sha256[:12]}...); "
                         f"nothing was kept")
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return path
