"""The model card that every export gets: README.md in the exported folder."""
from pathlib import Path

from support.errors import InputError
from support.files import read_json, replacing
from support.scores import main_score, with_error
from support.terminal import printable

PEFT = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, {out!r})
tokenizer = AutoTokenizer.from_pretrained({out!r})
```
"""
MERGED = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({out!r})
tokenizer = AutoTokenizer.from_pretrained({out!r})
```
"""


def readable(text):
    """A text from somebody else's file in one line, at most 200 characters of it."""
    return printable(text[:200])


def scores_table(path):
    """Lines with the scores in a run's summary.json before and after; [] if there is none.

    With --eval-data: those of each set.
    """
    try:
        summary = read_json(path)
    except InputError:
        return []
    names = [name.removeprefix("final_") for name in summary if name.startswith("final_")]
    main = main_score(names) if names else ""
    sets = summary.get("sets")
    if not isinstance(sets, dict) or not all(isinstance(one, dict) for one in sets.values()):
        sets = {}
    lines = []
    for part, entries in (sets or {"": summary}).items():
        count = entries.get("eval_count")
        for name in names:
            pair = [entries.get(f"base_{name}"), entries.get(f"final_{name}")]
            if not all(type(x) in (int, float) for x in (*pair, count)) or count < 1:
                continue
            # scores.key: the main score at T = 1 is called "sampled"
            label = f"{name}, greedy"
            if name.startswith("sampled"):
                label = f"{name.removeprefix('sampled').strip('_') or main}, T = 1"
            label = f"{part} ({count}), {label}" if part else label
            lines.append(f"| {readable(label)} | {with_error(pair[0], count)} | "
                         f"{with_error(pair[1], count)} |")
    if not lines:
        return []
    where = readable(", ".join(sets) or str(summary.get("data")))
    return [f"{readable(str(summary.get('eval_count')))} held-out problems of `{where}`:", "",
            "| score | before | after |", "|---|---|---|", *lines, ""]


def write_card(out, args, base, v, settings, dtype):
    """README.md in the folder `out`: base, method, numbers, how to load it, and the scores."""
    form = f"The same as an ordinary LoRA of rank {settings['rank']} (B = U S, A = R V^T), {dtype}."
    load = PEFT
    if args.to == "merged":
        form = f"The whole model, with the update added to its weights in fp32, then {dtype}."
        load = MERGED
    name = "TinyLoRA (arXiv 2602.04118)"
    if settings["method"] == "lora-xs":
        name = "LoRA-XS (arXiv 2405.17604)"
    which = f"the rank {settings['rank']} SVD"
    if "directions" in settings:
        which = f"{settings['rank']} singular directions ({settings['directions']}) of the SVD"
    library = "peft" if args.to == "peft" else "transformers"
    head = ["---", f"library_name: {library}"]
    if not Path(base).is_absolute():  # what the hub understands
        head.append(f"base_model: {readable(base)}")
    lines = [*head, "---", f"# {name} on {readable(base)}", "",
             f"{v.numel()} trained numbers ({v.nbytes} bytes) in {settings['groups']} ties: "
             f"W + U S R V^T with {which} of every linear layer W.", form,
             "", load.format(base=base, out=str(Path(out).resolve())),
             *scores_table(Path(args.adapter).parent / "summary.json")]
    with replacing(Path(out) / "README.md") as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")
