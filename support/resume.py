"""What a run writes so that it can be continued (--resume) exactly where it stopped.

Two files, state-0.safetensors and state-1.safetensors, are written in turns, so the last good
state is never the one being overwritten. Each file is a complete state: the trained tensors
(param.0, param.1, ...), the reference of the KL term (reference.0, ...) and the optimizer's
tensors (exp_avg.0, exp_avg_sq.0, step.0, ...). Its header holds, as JSON, the progress `done`
(step, tokens, seconds, the scores of the base model, the sizes of log.jsonl and samples.jsonl at
that moment) and a checksum of everything. Nothing else is needed: problems and sampling noise are
functions of the seed and the step.
"""
import fcntl
import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from support import ranks
from support.checkpoint import same_base
from support.errors import InputError
from support.files import make_folder, open_tensors, parse_json, read_json, replacing, write_json
from support.terminal import printable

FILES = ("state-0.safetensors", "state-1.safetensors")
LOGS = ("log.jsonl", "samples.jsonl")
MUST_NOT_CHANGE = {  # entries of config.json, and what has changed if they differ
    "problems": "the problems in {data}{eval_data}",
    "task_code": "the task in {task}",
    "chat_format": "the chat template or tokenizer of {model}",
    "trained": "{model}, or what --adapter brought,",
}
CHANGES_ROUNDING = ("torch", "numpy", "threads", "ranks", "device")


@contextmanager
def alone(out):
    """Make a run's folder; a block in which no other process can work on the run in it.

    Take it before the first write to the folder: two processes would mix their files. The lock
    ends with the process, however that ends. InputError if the folder cannot be made.
    """
    make_folder(out)
    if ranks.RANK:  # rank 0 holds the lock for all ranks
        yield
        return
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{out}: another process is busy with this run") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def is_finished(out, steps):
    """True if the run in the folder has come to its end, of at least `steps` steps; says so."""
    path = out / "summary.json"
    if not path.exists():
        return False
    done = read_json(path).get("steps", steps)
    if type(done) is not int:
        raise InputError(f"{path}: steps is {done!r}; it must be a whole number")
    if done < steps:
        return False
    print(printable(f"{out}: this run is finished; its results are in {path}"))
    return True


def begin(args, out, problems):
    """The settings of a run: the flags, and what the results depend on besides.

    A new run writes them to config.json; a resumed one compares them with those there.
    """
    settings = {name: value for name, value in vars(args).items() if name != "resume"}
    settings |= {"torch": torch.__version__, "numpy": np.__version__, "ranks": ranks.SIZE,
                 "problems": hashlib.sha256(json.dumps(problems).encode()).hexdigest()}
    if settings.get("task"):  # its prompts and scores; what it imports is not seen
        settings["task_code"] = hashlib.sha256(Path(args.task).read_bytes()).hexdigest()
    return record(settings, args, out)


def complete(settings, args, out, model, chat):
    """The same for what is known only when the model has been loaded."""
    settings["threads"] = torch.get_num_threads()  # a small model has got one
    settings["trained"] = getattr(model, "adapter", None)
    settings["chat_format"] = chat.fingerprint()
    return record(settings, args, out)


def record(settings, args, out):
    """Compare the settings with config.json (--resume), and write it anew if anything is added."""
    path = out / "config.json"
    before = {}
    if args.resume:
        before = compare(settings, out)
        # a finished run may get more steps, which leave its warm-up as long as it was
        settings |= before | {"steps": args.steps, "warmup": args.warmup}
    if settings != before and not ranks.RANK:
        write_json(path, settings)
    return settings


def compare(settings, out):
    """The settings with which the run in `out` began, from its config.json.

    InputError if what the run depends on has changed; a note if only rounding may differ. What
    either side does not have (an older config.json, a model not loaded yet) is not compared.
    """
    before = read_json(out / "config.json")
    if "chat_format" not in before:
        before.pop("problems", None)  # an older version hashed the problems in another form
    changed = {name for name in before.keys() & settings.keys()
               if not is_same(before[name], settings[name])}
    for name, description in MUST_NOT_CHANGE.items():
        if name in changed:
            beside = f" or {settings['eval_data']}" if settings.get("eval_data") else ""
            what = description.format(data=settings["data"], eval_data=beside,
                                      task=settings.get("task"), model=settings["model"])
            raise InputError(f"--resume {out}: {what} changed since the run began")
    differences = [f"{name} {before[name]}, now {settings[name]}"
                   for name in CHANGES_ROUNDING if name in changed]
    if differences:
        print(printable(f"note: the run began with {', '.join(differences)}: what follows is "
                        "equal up to rounding, not bit for bit"), flush=True)
    return before


def is_same(before, now):
    """Equal settings. An older version's fingerprint of the model is compared as far as it goes."""
    both = (before, now)
    if all(isinstance(x, dict) and isinstance(x.get("base"), str) for x in both):
        return (same_base(before["base"], now["base"])
                and before | {"base": ""} == now | {"base": ""})
    return before == now


def size(path):
    """The bytes of a file, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def checksum(text, tensors):
    """A sha256 of a text and of the tensors' names, types, shapes and bytes."""
    digest = hashlib.sha256(text.encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save(out, done, params, optimizer, reference):
    """Write a state over the older of the two files.

    `done` is updated in place: its "slot" (the file written last) and the sizes of the logs.
    """
    if ranks.RANK:
        return
    for name in LOGS:
        # After a power cut the disk must not hold a state that counts on rows it does not hold.
        if (out / name).exists():
            with open(out / name, "rb") as file:
                os.fsync(file.fileno())
        done[name] = size(out / name)
    done["slot"] = 1 - done.get("slot", 1)
    tensors = {f"param.{i}": p for i, p in enumerate(params)}
    tensors |= {f"reference.{i}": p for i, p in enumerate(reference or [])}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{name}.{i}": x for name, x in state.items()}
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    text = json.dumps(done)
    header = {"format": "tinylora state", "done": text, "sha256": checksum(text, tensors)}
    with replacing(out / FILES[done["slot"]]) as temporary:
        save_file(tensors, temporary, header)


def read(path, out):
    """(done, tensors) of a state file.

    InputError if the file is damaged, or if a log is shorter than it was when this was written.
    """
    if not path.is_file():  # a pipe would keep us waiting
        raise InputError(f"{path} is not an ordinary file")
    try:
        with open_tensors(path) as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged ({error})") from None
    if header.get("sha256") != checksum(header.get("done", ""), tensors):
        raise InputError(f"{path} is damaged (its checksum is wrong)")
    done = progress(path, header)
    for name in LOGS:
        if size(out / name) < done[name]:
            raise InputError(f"{path} cannot be used ({name} is shorter than it was then)")
    return done, tensors


def progress(path, header):
    """`done` of a state file's header. InputError if it is not what `save` writes."""
    try:
        done = parse_json(header["done"])
        numbers = [done[name] for name in ("step", "slot", *LOGS)]
    except (KeyError, RecursionError, TypeError, ValueError):
        numbers = [None]
    if not all(type(x) is int and 0 <= x < 2**63 for x in numbers) or done["slot"] > 1:
        raise InputError(f"{path} is damaged (its header)")
    return done


def load(out, params, optimizer, reference):
    """Go back to the newest good state and return its `done`.

    Returns None if the run was stopped before its first state. InputError if it cannot go on.
    """
    for name in LOGS:
        if (out / name).exists() and not (out / name).is_file():  # a pipe would keep us waiting
            raise InputError(f"{out / name}: is not an ordinary file")
    states = []
    complaints = []
    paths = [out / name for name in FILES if (out / name).exists()]
    for path in paths:
        try:
            states.append((read(path, out)[0]["step"], path))
        except InputError as error:
            complaints.append(str(error))
    if states:
        step, path = max(states)
        done, tensors = read(path, out)  # again: two states in memory may be too much
        complaint = "".join(f"{complaint}; " for complaint in complaints)
        print(printable(f"{complaint}going on from {path}, after step {step}"), flush=True)
        check_tensors(path, tensors, params, reference)
        restore(tensors, params, optimizer, reference)
        remove_rest(out, done)
        return done
    if paths or size(out / "log.jsonl"):
        reason = "; ".join(complaints) or "log.jsonl has rows, but there is no state"
        raise InputError(f"--resume {out}: {reason}; this run cannot go on")
    print("no state yet: the run was stopped before its first; starting over", flush=True)
    remove_rest(out, dict.fromkeys(LOGS, 0))
    return None


def check_tensors(path, tensors, params, reference):
    """InputError unless a state's tensors are those of this run, and Adam's of all or of none.

    So are the means of methods/agreement.py, which the first update does not make yet.
    """
    shapes = {f"param.{i}": p.shape for i, p in enumerate(params)}
    moments = {f"{name}.{i}": p.shape for i, p in enumerate(params)
               for name in ("exp_avg", "exp_avg_sq")}
    moments |= {f"step.{i}": torch.Size() for i in range(len(params))}
    shapes |= {f"reference.{i}": p.shape for i, p in enumerate(reference or [])}
    found = {name: x.shape for name, x in tensors.items()}
    means = {f"{name}.{i}": torch.Size() for i in range(len(params))
             for name in ("dot", "square", "variance")}
    if found not in (shapes, shapes | moments, shapes | moments | means):
        raise InputError(f"{path}: does not hold the trained numbers of this run")


@torch.no_grad()
def restore(tensors, params, optimizer, reference):
    """Copy the tensors of a state file to where they were saved from."""
    optimizer_state = {}
    for name, x in tensors.items():
        kind, i = name.rsplit(".", 1)
        if kind == "param":
            params[int(i)].copy_(x)
        elif kind == "reference":
            reference[int(i)].copy_(x)
        else:
            optimizer_state.setdefault(int(i), {})[kind] = x
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})


def remove_rest(out, done):
    """Remove what was written after a state: log rows, and temporary files of a killed process."""
    if ranks.RANK:
        return
    for name in LOGS:
        if (out / name).exists():
            os.truncate(out / name, done[name])
    for path in out.rglob("*.tmp*"):
        path.unlink()
