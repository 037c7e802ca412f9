"""Draw runs from their logs: python results/plot.py RUN... [OUT.png] (default plot.png; needs matplotlib).

RUN is a folder that train.py wrote, finished or not. Runs whose settings differ in nothing but the seed are drawn as one line,
their mean, in a band from the lowest to the highest of them.
"""
import json
import sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt

# what does not make two runs two settings: the seed, and what says where, how far and with what they were run
IGNORED = {"seed", "out", "trained", "tinylora", "torch", "numpy", "device", "resume", "save_every", "wandb", "tensorboard", "threads", "ranks", "chat"}


def read(run):
    """A run -> (its settings, {panel: {step: value}})."""
    run = Path(run)
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8")) if (run / "summary.json").exists() else {}
    # a row's rollouts are from v BEFORE its update, its |v| and evaluation from after; the base's and the last evaluation are in the summary
    greedy = {r["step"]: r["eval_strict"] for r in rows if "eval_strict" in r}
    if summary:
        greedy = {0: summary["base_strict"]} | greedy | {summary["steps"]: summary["final_strict"]}
    before = {key: {r["step"] - 1: r[key] for r in rows if r.get(key) is not None} for key in ("length", "entropy", "loss", config.get("reward", "strict"))}
    panels = {"held-out problems right, greedy (strict)": greedy,
              "reward of the samples trained on": before[config.get("reward", "strict")],
              "length (tokens)": before["length"], "entropy (nats per token)": before["entropy"],
              "|v|": {0: 0.0 if config.get("method", "tinylora") in ("tinylora", "lora-xs") and not config.get("adapter") else None} | {r["step"]: r["v_norm"] for r in rows}, "loss (--algo sft)": before["loss"]}
    return {k: x for k, x in config.items() if k not in IGNORED}, {name: {s: x for s, x in points.items() if x is not None} for name, points in panels.items()}


def main(*names):
    out, runs = (names[-1], names[:-1]) if names[-1].endswith((".png", ".svg", ".pdf")) else ("plot.png", names)
    groups = {}  # the runs of each setting
    for settings, panels in map(read, runs):
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(panels)
    settings = [json.loads(key) for key in groups]
    differ = sorted({k for s in settings for k in s if any(s[k] != other.get(k, s[k]) for other in settings)})
    shown = [name for name in next(iter(groups.values()))[0] if any(len(p[name]) > (name == "|v|") for members in groups.values() for p in members)]
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), dpi=110)
    for axis, name in zip(axes.flat, shown):
        for (setting, members), colour in zip(zip(settings, groups.values()), plt.rcParams["axes.prop_cycle"].by_key()["color"] * len(groups)):
            steps = sorted({s for p in members for s in p[name]})
            values = [[p[name][s] for p in members if s in p[name]] for s in steps]
            label = ", ".join(f"{k}={setting.get(k)}" for k in differ) or "all"
            axis.plot(steps, [sum(x) / len(x) for x in values], "o-" if "greedy" in name else "-", markersize=3, color=colour, label=f"{label} ({len(members)} seed{'s'[:len(members) > 1]})")
            if len(members) > 1:
                axis.fill_between(steps, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.2, linewidth=0)
        axis.set(title=name, xlabel="step")
        if "right" in name or "reward" in name:
            axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(shown):]:
        axis.axis("off")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="lower center", fontsize=8)
    figure.tight_layout(rect=(0, 0.03 + 0.02 * len(groups), 1, 1))
    figure.savefig(out)
    print(f"{out}: {len(runs)} runs of {len(groups)} settings")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].endswith(".png"):
        sys.exit(__doc__)
    main(*sys.argv[1:])
