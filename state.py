"""What a run writes, so that it can go on as if nothing had happened: state-0.safetensors and state-1.safetensors, in turns.

One file is one state, complete: the trained tensors, Adam's, and what --kl holds on to; in the header, as JSON, how far the run
had come (`done`: step, tokens, seconds, the base's evaluation, and the sizes of log.jsonl and samples.jsonl at that moment) and a
checksum of it all. Nothing else carries over from step to step: problems and noise are functions of seed and step. Because the
two take turns, the last good state is never the one being written over.
"""
import fcntl
import hashlib
import json
import os
from contextlib import contextmanager, suppress

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import ranks
from files import InputError, read_json, replacing

FILES = ("state-0.safetensors", "state-1.safetensors")
LOGS = ("log.jsonl", "samples.jsonl")


@contextmanager
def alone(out):
    """Inside the block no other process may go on with the run in this folder: two would write one log."""
    handle = os.open(out, os.O_RDONLY)
    try:
        if ranks.RANK == 0:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{out}: another process is busy with this run") from None
            except OSError:  # a file system without locks
                pass
        yield
    finally:
        os.close(handle)


def append(path, rows):
    """Add JSON lines to a file: all of them or, on a full disk, none."""
    if ranks.RANK:
        return
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        with suppress(OSError):  # it may not be there, or the disk is read-only by now: what counts is the error above
            os.truncate(path, size)
        raise InputError(f"{path}: cannot be written ({error}); free some space, then go on with --resume, or choose another --out") from None


def write_json(path, value):
    if ranks.RANK:
        return
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def compare(settings, out):
    """The settings of the run in `out`. InputError when what it began with has changed, a note where only the last bits may differ."""
    before = read_json(out / "config.json")
    for name, what in (("problems", f"the problems in {settings['data']}"), ("trained", f"{settings['model']}, or what --adapter brought,")):
        if name in settings and before.get(name, settings[name]) != settings[name]:
            raise InputError(f"--resume {out}: {what} changed since the run began")
    differs = [f"{name} {before.get(name)}, now {settings[name]}" for name in ("torch", "numpy", "threads", "ranks", "device") if before.get(name) != settings[name]]
    if differs and "trained" not in settings:
        print(f"note: the run began with {', '.join(differs)}: what follows is equal up to rounding, not bit for bit", flush=True)
    return before


def size(path):
    return path.stat().st_size if path.exists() else 0


def checksum(text, tensors):
    digest = hashlib.sha256(text.encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save(out, done, params, optimizer, reference):
    """Write the state over the older of the two."""
    if ranks.RANK:
        return
    for name in LOGS:  # a state must not outlive, in a power cut, the rows it counts on
        if (out / name).exists():
            with open(out / name, "rb") as file:
                os.fsync(file.fileno())
    done |= {"slot": 1 - done["slot"]} | {name: size(out / name) for name in LOGS}
    tensors = {f"param.{i}": p for i, p in enumerate(params)} | {f"reference.{i}": p for i, p in enumerate(reference or [])}
    tensors |= {f"{name}.{i}": x for i, state in optimizer.state_dict()["state"].items() for name, x in state.items()}
    tensors, text = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}, json.dumps(done)
    with replacing(out / FILES[done["slot"]]) as temporary:
        save_file(tensors, temporary, {"format": "tinylora state", "done": text, "sha256": checksum(text, tensors)})


def read(path, out):
    """(done, tensors) of one file; InputError when it is damaged, or counts on rows that are not there."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged ({error})") from None
    if metadata.get("sha256") != checksum(metadata.get("done", ""), tensors):
        raise InputError(f"{path} is damaged (its checksum is wrong)")
    done = json.loads(metadata["done"])
    for name in LOGS:
        if size(out / name) < done[name]:
            raise InputError(f"{path} cannot be used ({name} is shorter than it was then)")
    return done, tensors


def load(out, params, optimizer, reference):
    """Go back to the newest good state; returns `done`, or None where the run had not come to its first."""
    there = [out / name for name in FILES if (out / name).exists()]
    good, bad = [], []
    for path in there:
        try:
            good.append((read(path, out)[0]["step"], path))
        except InputError as error:
            bad.append(str(error))
    if not good:
        if there or size(out / "log.jsonl"):
            raise InputError(f"--resume {out}: " + ("; ".join(bad) if bad else "log.jsonl has rows, but there is no state") + "; this run cannot go on")
        done = dict.fromkeys(LOGS, 0)
        print("no state yet: the run was stopped before its first; starting over", flush=True)
    else:
        step, path = max(good)
        done, tensors = read(path, out)
        print("".join(f"{complaint}; " for complaint in bad) + f"going on from {path}, after step {step}", flush=True)
        state = {}
        with torch.no_grad():
            for name, x in tensors.items():
                kind, i = name.rsplit(".", 1)
                if kind in ("param", "reference"):
                    (params if kind == "param" else reference)[int(i)].copy_(x)
                else:
                    state.setdefault(int(i), {})[kind] = x
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if ranks.RANK == 0:
        for name in LOGS:  # rows of steps that will be done again, or half a row
            if (out / name).exists():
                os.truncate(out / name, done[name])
        for path in out.rglob("*.tmp*"):  # of a kill while writing
            path.unlink()
    return done if good else None


def watchers(args):
    """A function that passes a row of log.jsonl on to Weights & Biases (--wandb PROJECT) and TensorBoard (--tensorboard), which are
    imported only when asked for. On the first rank, that is; elsewhere it does nothing."""
    sinks, flag = [], "--wandb"
    if ranks.RANK:
        return lambda row: None
    try:
        if args.wandb:
            import wandb
            wandb.init(project=args.wandb, dir=args.out, config=vars(args))
            sinks.append(wandb.log)
        flag = "--tensorboard"
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(args.out)

            def write(row, step):
                for name, value in row.items():
                    writer.add_scalar(name, value, step)
                writer.flush()  # it would keep two minutes' rows to itself, and lose them when the run is killed
            sinks.append(write)
    except Exception as error:  # not installed, not logged in, no network: its own errors, of many kinds
        raise InputError(f"{flag}: {error}; see that it is installed and set up, or leave the flag out") from None
    return lambda row: [sink({name: x for name, x in row.items() if x is not None}, step=row["step"]) for sink in sinks]
