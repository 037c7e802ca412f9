"""Is a run's base accuracy what transformers gets? python bench/check_base.py RUN_DIR (needs transformers)

Takes model, data and limits from the run's config.json, decodes the same test problems greedily with transformers' generate, one at
a time (so no padding can be at fault), through its own chat template, and scores the texts with gsm8k.py. Last line: JSON.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gsm8k
from flags import find_model


@torch.no_grad()
def main(run):
    config, summary = (json.loads((Path(run) / name).read_text()) for name in ("config.json", "summary.json"))
    folder = find_model(config["model"])
    tokenizer, stop_ids = AutoTokenizer.from_pretrained(folder), sorted(gsm8k.Chat(folder).stop_ids)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[config["dtype"]]).to(config["device"])
    problems = gsm8k.load_data(config["data"], config["eval_only"])[1][:config["eval_count"]]
    scores = []
    for p in problems:
        messages = [{"role": "system", "content": config["system"]}] * bool(config["system"]) + [{"role": "user", "content": p["prompt"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt").to(config["device"])
        ids = model.generate(**prompt, max_new_tokens=config["max_new_tokens"], do_sample=False, eos_token_id=stop_ids, pad_token_id=stop_ids[0])
        scores.append(gsm8k.score(tokenizer.decode(ids[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True), p))
        print(f"\r{len(scores)}/{len(problems)}", end="", file=sys.stderr)
    theirs = {kind: sum(s[kind] for s in scores) / len(scores) for kind in gsm8k.SCORES}
    ours = {kind: summary.get(f"base_{kind}", summary.get(kind)) for kind in gsm8k.SCORES}
    print(json.dumps({"problems": len(problems), "transformers": theirs, "ours": ours, "equal": all(abs(theirs[k] - ours[k]) < 1e-6 for k in theirs)}))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
