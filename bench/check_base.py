"""Is a run's base accuracy what transformers gets?

    python bench/check_base.py RUN [--model M] [--data D]      (needs transformers)

Takes the flags of the run's config.json (model and data may be elsewhere now), decodes the same
test problems greedily with transformers' generate, one at a time, so that no padding can be at
fault, through its own chat template, and scores the texts with gsm8k.py. The last line is JSON.
"""
import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import gsm8k
from support.adapter_file import DTYPES
from support.chat_format import Chat
from support.errors import InputError
from support.files import read_json
from support.hub import find_model
from support.program import run_main


@torch.no_grad()
def generate(model, tokenizer, question, config, stop_ids):
    """The text of transformers' greedy response."""
    messages = [{"role": "user", "content": question}]
    if config["system"]:
        messages.insert(0, {"role": "system", "content": config["system"]})
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True,
                                           return_tensors="pt").to(model.device)
    ids = model.generate(**prompt, max_new_tokens=config["max_new_tokens"], do_sample=False,
                         eos_token_id=stop_ids, pad_token_id=stop_ids[0])
    response = ids[0, prompt["input_ids"].shape[1]:]
    return tokenizer.decode(response, skip_special_tokens=True)


def work(args):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    config = read_json(Path(args.run) / "config.json")
    if config.get("eval_data"):
        raise InputError(f"{args.run}: has a mean over sets (--eval-data); check one with --data")
    summary = read_json(Path(args.run) / "summary.json")
    folder = find_model(args.model or config["model"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stop_ids = sorted(Chat(folder).stop_ids)
    dtype = DTYPES[config["dtype"]]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(config["device"])
    rows = gsm8k.load(args.data or config["data"], config["eval_only"])[1][:config["eval_count"]]
    scores = []
    for row in rows:
        question = gsm8k.prompt(row, config.get("instruction"))
        text = generate(model, tokenizer, question, config, stop_ids)
        scores.append(gsm8k.score(text, row))
        print(f"\r{len(scores)}/{len(rows)}", end="", file=sys.stderr)
    print(file=sys.stderr)
    theirs = {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]}
    ours = {name: summary.get(f"base_{name}", summary.get(name)) for name in theirs}
    equal = all(abs(theirs[name] - ours[name]) < 1e-6 for name in theirs)
    print(json.dumps({"problems": len(rows), "transformers": theirs, "ours": ours,
                      "equal": equal}))


def parse():
    cli = argparse.ArgumentParser(description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("run", metavar="RUN", help="a folder that train.py wrote")
    cli.add_argument("--model", metavar="M", help="folder or hub name (the run's)")
    cli.add_argument("--data", metavar="D", help="folder or file (the run's)")
    return cli.parse_args()


if __name__ == "__main__":
    sys.exit(run_main(parse, work))
