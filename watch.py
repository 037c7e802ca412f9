"""Where else a log row goes: Weights & Biases (--wandb PROJECT) and TensorBoard (--tensorboard), imported only when asked for."""
from files import InputError


def watchers(args):
    """A function that passes a row of log.jsonl on to whoever was asked for; log.jsonl itself is train.py's."""
    sinks, flag = [], "--wandb"
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
