"""Lines that say why a run learns nothing, and what to try: a run that fails must not look well."""
from support import ranks
from support.files import read_jsonl

SILENT_STEPS = 5  # after so many steps without signal a line says so
SLOW = 0.005  # at rank 2, numbers of 0.01 change W's top two directions by about 1%


def logged_signals(out):
    """The "signal" of every step so far: the share of groups whose responses differ in reward."""
    path = out / "log.jsonl"
    rows = [row for _, row in read_jsonl(path)] if path.exists() else []
    return [row["signal"] for row in rows if row.get("signal") is not None]


def print_silence(out, args, last=0):
    """One line if no group had a signal in the last steps (0: in all steps)."""
    signals = logged_signals(out)[-last:]
    if ranks.RANK or not signals or any(signals):
        return
    others = "lenient, format or another score" if args.reward == "strict" else "another score"
    print(f"note: {len(signals)} steps without any signal: within every group all rewards "
          f"({args.reward}) were equal, so nothing is learned; try --reward {others}, easier "
          f"problems or a larger --group, and read samples.jsonl", flush=True)


def print_slowness(out, size, args):
    """One line if TinyLoRA's numbers have hardly moved, though there was a signal. size: of one."""
    if args.method == "tinylora" and any(logged_signals(out)) and size < SLOW:
        print(f"note: after {args.steps} steps a trained number is {size:.1e}: --lr {args.lr:g} is "
              f"slow (the authors' 1.6e-4 is for 700 updates); try 3 times more, then again",
              flush=True)
