"""Before a run on a GPU: settings that fit its memory, by tools/fit.py's count (docs/gpu.md)."""
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from support.hub import find_model
from support.terminal import printable

ROOT = Path(__file__).resolve().parent.parent
FLAGS = re.compile(r"^flags: --rollout-rows (\d+) --tokens-per-micro-batch (\d+)( --recompute)?$",
                   re.MULTILINE)
PATIENCE = 300  # seconds; the 7B shape takes about 30


def lower(args):
    """Lower --rollout-rows and --tokens-per-micro-batch, or set --recompute, so that the run fits.

    None of them changes a result. What is counted: TinyLoRA or LoRA-XS on a model in bf16, whole.
    Where nothing can be told, a line says so and nothing changes: the fast engine halves what does
    not fit. Counting is left to another process, which must see no GPU.
    """
    if args.method not in ("tinylora", "lora-xs") or args.dtype != "bf16" or args.shard:
        return
    _, total = torch.cuda.mem_get_info(args.device)
    gib = f"{total / 2**30:.1f}"
    command = [sys.executable, "-m", "tools.fit", "--model", find_model(args.model), "--gpu", gib,
               "--engine", args.engine, "--group", str(args.group),
               "--max-new-tokens", str(max(16, args.max_new_tokens))]
    try:
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
                              capture_output=True, text=True, timeout=PATIENCE)
        found = FLAGS.search(done.stdout)
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
    except subprocess.TimeoutExpired:
        found = None
        reason = f"no answer in {PATIENCE} s"
    if not found:
        print(printable(f"note: what fits {gib} GiB is not known ({reason}); going on as the flags "
                        f"say"), flush=True)
        return
    fitting = {"rollout_rows": min(args.rollout_rows, int(found[1])),
               "tokens_per_micro_batch": min(args.tokens_per_micro_batch, int(found[2])),
               "recompute": args.recompute or bool(found[3])}
    changed = {name: x for name, x in fitting.items() if x != getattr(args, name)}
    vars(args).update(changed)
    if changed:
        cells = [f"--{name.replace('_', '-')} {x}" for name, x in changed.items()]
        print(f"to fit {gib} GiB: {', '.join(cells)}", flush=True)
