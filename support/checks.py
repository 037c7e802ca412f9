"""What the flags of a run must fit, beyond what argparse sees in one flag alone."""
import re

import torch

from support import ranks
from support.errors import InputError

MOST_NEW_TOKENS = 2**17  # no model here has a longer context
MOST_TOKENS = 2**27  # that a step may sample: a GB of noise
SHAPE = ("params", "u", "n-tie", "tie", "rank", "directions", "alpha")  # how many numbers there are
TAKES = {"tinylora": SHAPE[:6], "lora-xs": SHAPE[4:6], "lora": ("rank", "alpha"), "full": ()}


def check(args, given):
    """What argparse cannot see in one flag alone."""
    for name in SHAPE:
        if name in given and name not in TAKES[args.method]:
            raise InputError(f"--{name} means nothing to --method {args.method}")
    if args.method == "full":
        for name in ("dtype", "v_dtype"):
            if getattr(args, name) not in (None, "fp32"):
                raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: --method full "
                                 f"trains the weights, whose small steps would round away")
    if args.algo == "es" and (args.method not in ("tinylora", "lora-xs") or args.group % 2):
        raise InputError("--algo es: searches over v (--method tinylora or lora-xs), in pairs "
                         "(an even --group)")
    if args.algo == "es" and args.engine == "plain":
        raise InputError("--algo es: needs a v of its own for every row, which only --engine fast "
                         "can sample")
    if args.group < 2 and args.algo == "grpo" and not args.eval_only:
        raise InputError("--group 1: an advantage compares the responses to one problem, so a "
                         "group needs at least 2")
    if args.algo != "grpo":  # what a model folder may have set for GRPO
        args.kl = 0.0
    if args.algo == "es":
        args.minibatches = 1
    copies = 1 if args.shard else ranks.SIZE  # of the model
    if args.prompts % (args.minibatches * copies):
        shares = f" of {copies} equal shares, one for each rank" if copies > 1 else ""
        raise InputError(f"--prompts {args.prompts} cannot be split into "
                         f"--minibatches {args.minibatches}{shares}")
    if args.cuda_graph and (not args.device.startswith("cuda") or args.engine == "plain"):
        raise InputError("--cuda-graph: is for --device cuda and --engine fast")
    if args.shard and (args.method not in ("tinylora", "lora-xs") or args.algo == "es"
                       or args.cuda_graph or args.chat):
        raise InputError("--shard: is for --method tinylora or lora-xs, without --algo es, "
                         "--cuda-graph and --chat")
    if args.shard and not ranks.LAUNCHED:
        raise InputError("--shard: needs torchrun, which starts a process for each part: "
                         "torchrun --nproc_per_node 2 train.py --shard ...")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", args.device):
        raise InputError(f"--device {args.device}: use cpu, cuda or cuda:N")
    if args.max_new_tokens > MOST_NEW_TOKENS:
        raise InputError(f"--max-new-tokens {args.max_new_tokens}: the limit is {MOST_NEW_TOKENS}")
    tokens = args.prompts * args.group * args.max_new_tokens
    if tokens > MOST_TOKENS and not (args.eval_only or args.chat):
        raise InputError(f"--prompts {args.prompts} x --group {args.group} x --max-new-tokens "
                         f"{args.max_new_tokens}: {tokens:,} tokens a step; the limit is "
                         f"{MOST_TOKENS:,}")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {args.device}: not to be had here ({reason})") from None
