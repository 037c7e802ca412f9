"""Draw accuracy against steps from the log of a run: python results/plot.py RUN_DIR OUT.png (needs matplotlib)."""
import json
import sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(run, out):
    run = Path(run)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    # a row's evaluation is of v AFTER its update; the base's and the last one's are in the summary
    greedy = [(0, summary["base_strict"])] + [(r["step"], r["eval_strict"]) for r in rows if "eval_strict" in r] + [(summary["steps"], summary["final_strict"])]
    sampled = [(0, summary["base_sampled"]), (summary["steps"], summary["final_sampled"])]
    figure, axes = plt.subplots(figsize=(7, 3.6), dpi=130)
    axes.plot([r["step"] - 1 for r in rows], [r["strict"] for r in rows], color="tab:gray", linewidth=1.2, label="training problems, sampled at T = 1 (the reward)")
    axes.plot(*zip(*greedy), "o-", color="tab:blue", label=f"{summary['eval_count']} held-out problems, greedy")
    axes.plot(*zip(*sampled), "s", color="tab:orange", label=f"{summary['eval_count']} held-out problems, sampled at T = 1")
    axes.set(xlabel="GRPO step", ylabel="accuracy (strict)", ylim=(0, 1.02), title=f"{summary['params']} trainable numbers, {summary['adapter_bytes']} bytes")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(out)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
