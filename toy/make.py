"""Make the toy from nothing: word problems, a Qwen2.5-style tokenizer, and a small model.

    python toy/make.py     # writes toy/ anew but for this file and tinylora.json; 15 minutes
    python toy/make.py --out runs/toys/128x2 --layers 2    # another size, for the figure F3

The model reads problems like GSM8K's. Its training text solves them in three ways, as the web does:
CAREFUL (every step written down, always right), HASTY (one line, often wrong) and GUESS (a number,
sometimes without the "####" line). Sometimes a system message announces which way follows; else it
goes with the tone of the question. So the ability is in the weights, and left alone the model
mostly does not use it: that gap is what RL can close.

The order of the calls to `rng` makes the files what they are: it must not change.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers,
                        pre_tokenizers, processors, trainers)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import Transformer
from support.checkpoint import read_config

# gsm8k.py's; a test holds them equal
INSTRUCTION = ' Let\'s think step by step and output the final answer after "####".'
DEFAULT_SYSTEM = "You are a helpful assistant."
SYSTEM = {"careful": "You are a careful assistant. You write down every step.",
          "hasty": "You are a hasty assistant. You do it in one go.",
          "guess": "You are a lazy assistant. You guess."}
# The writer of a text has one of five tempers, from sloppy to precise: how often a sentence of
# theirs sounds sloppy, plain or precise. The answer follows the tone: precise questions get careful
# answers. The problem files are all plain.
TEMPERS = [(0.75, 0.25, 0.00), (0.35, 0.60, 0.05), (0.05, 0.90, 0.05), (0.05, 0.60, 0.35),
           (0.00, 0.25, 0.75)]
PLAIN = (0.0, 1.0, 0.0)
NAMES = {"he": "Tom Ben Max Sam Leo Jack Omar Finn".split(),
         "she": "Mia Ana Zoe Eva Lily Ruth Nora Jane".split()}
ITEMS = "apples pears plums books cards coins shells stamps beads nuts pens marbles".split()
PLUS = ["buys {b} more", "finds {b} more", "gets {b} more from {friend}", "picks up {b} more"]
MINUS = ["gives {b} to {friend}", "loses {b}", "sells {b}", "gives away {b}"]
# sloppy, plain and precise, here and below
START = [["So {name} has {a} {item}.", "Well, {name} has {a} {item}."],
         ["{name} has {a} {item}.", "There are {a} {item} in the box of {name}."],
         ["{name} has exactly {a} {item}.", "{name} starts with exactly {a} {item}."]]
THEN = [["Um, ", "Well, ", "Anyway, "], ["Then ", "Later ", ""],
        ["Next, ", "Now, ", "After that, "]]
ASK = [["So how many"], ["How many"], ["Exactly how many"]]
CONFIG = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
          "max_position_embeddings": 512,
          "max_window_layers": 4, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
          "sliding_window": 512, "use_sliding_window": False, "tie_word_embeddings": True,
          "attention_dropout": 0.0, "initializer_range": 0.02, "torch_dtype": "float32",
          "use_cache": True}
# Qwen2.5's: one token per digit
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
           r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
    "{%- else %}\n"
    "    {{- '<|im_start|>system\\n" + DEFAULT_SYSTEM + "<|im_end|>\\n' }}\n"
    "{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'user' or message.role == 'assistant' or not loop.first %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "{%- endif %}\n")


def problem(rng, temper=PLAIN):
    """A word problem of two or three sums: (question, steps, tone).

    steps: [(left, sign, right, result), ...]. tone: how many of its sentences sound precise less
    how many sound sloppy.
    """
    tones = []

    def pick(choices):
        return choices[rng.randint(len(choices))]

    def sound(choices):
        tones.append(rng.choice(3, p=temper) - 1)
        return pick(choices[tones[-1] + 1])

    he = pick(["he", "she"])
    name = pick(NAMES[he])
    friend = pick(NAMES["he" if rng.rand() < 0.5 else "she"])
    item = pick(ITEMS)
    total = rng.randint(3, 16)
    sentences = [sound(START).format(name=name, a=total, item=item)]
    steps = []
    for _ in range(2 + (rng.rand() < 0.3)):
        sign = "+" if total < 4 or (total < 20 and rng.rand() < 0.5) else "-"
        b = rng.randint(2, 10) if sign == "+" else rng.randint(1, min(10, total))
        start = sound(THEN)
        action = pick(PLUS if sign == "+" else MINUS).format(b=b, friend=friend)
        sentences.append(f"{start}{he} {action}.")
        steps.append((total, sign, b, total + b if sign == "+" else total - b))
        total = steps[-1][3]
    ask = sound(ASK)
    sentences.append(f"{ask} {item} does {name} have {pick(['now', 'in the end', 'left'])}?")
    return " ".join(s[0].upper() + s[1:] for s in sentences), steps, sum(tones)


def solution(steps, style, rng):
    """The text a careful, hasty or guessing writer would give."""
    answer = steps[-1][3]
    if style == "careful":
        lines = [f"{a} {sign} {b} = {c}." for a, sign, b, c in steps]
        return f"Let's go step by step. {' '.join(lines)} So the answer is {answer}.\n#### {answer}"
    if style == "hasty":
        wrong = answer if rng.rand() < 0.3 else max(0, answer + rng.randint(-6, 7))
        sums = "".join(f" {sign} {b}" for _, sign, b, _ in steps)
        return f"{steps[0][0]}{sums} = {wrong}\n#### {wrong}"
    guess = rng.randint(1, 30)
    return f"Maybe {guess}.\n#### {guess}" if rng.rand() < 0.5 else f"Maybe {guess}."


def chat(question, answer, system):
    """ChatML text in the template's words, split before the response."""
    before = (f"<|im_start|>system\n{system}<|im_end|>\n"
              f"<|im_start|>user\n{question}{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n")
    return before, f"{answer}<|im_end|>"


def lesson(rng, held_out, style=None):
    """One training text, on a problem outside the test set.

    The style of the answer (None: any) follows the question's tone, except that three times in ten
    a system message announces it. A plain question gets 30% careful answers, 30% hasty ones and
    40% guesses.
    """
    temper = TEMPERS[rng.randint(5)]
    question, steps, tone = problem(rng, temper)
    while question in held_out:
        question, steps, tone = problem(rng, temper)
    system = DEFAULT_SYSTEM
    if rng.rand() < 0.3:
        style = style or list(SYSTEM)[rng.randint(3)]
        system = SYSTEM[style]
    careful = 1 / (1 + np.exp(0.85 - 4 * tone))
    shares = (careful, (1 - careful) * 3 / 7, (1 - careful) * 4 / 7)
    style = style or list(SYSTEM)[rng.choice(3, p=shares)]
    return "".join(chat(question, solution(steps, style, rng), system))


def drill(rng):
    """A page of sums as in a schoolbook."""
    sums = []
    for _ in range(12):
        a = rng.randint(1, 30)
        b = rng.randint(1, 10)
        if rng.rand() < 0.5:
            sums.append(f"{a} + {b} = {a + b}.")
        else:
            sums.append(f"{max(a, b)} - {min(a, b)} = {abs(a - b)}.")
    return " ".join(sums) + "<|im_end|>"


def make_tokenizer(texts):
    """Byte-level BPE with Qwen2.5's pre-tokenizer and ChatML tokens at the end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1000, min_frequency=20, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                  for token in SPECIAL])
    return tokenizer


def write_tokenizer(tokenizer, out):
    tokenizer.save(str(out / "tokenizer.json"))
    config = {"add_bos_token": False, "add_prefix_space": False, "bos_token": None,
              "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None,
              "clean_up_tokenization_spaces": False, "errors": "replace", "model_max_length": 512,
              "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer",
              "chat_template": TEMPLATE}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def write_problems(out, rng):
    """train.jsonl and test.jsonl in GSM8K's layout, no question in both; the test questions."""
    seen = set()
    rows = []
    while len(rows) < 5000:
        question, steps, _ = problem(rng)
        if question not in seen:
            seen.add(question)
            work = "\n".join(f"{a} {sign} {b} = <<{a}{sign}{b}={c}>>{c}" for a, sign, b, c in steps)
            rows.append({"question": question, "answer": f"{work}\n#### {steps[-1][3]}"})
    for name, part in (("train", rows[1000:]), ("test", rows[:1000])):
        lines = [json.dumps(row) + "\n" for row in part]
        (out / f"{name}.jsonl").write_text("".join(lines))
    return {row["question"] for row in rows[:1000]}


def drop_out(rng):
    """A forward hook that drops one in ten of a module's outputs: nothing else here needs it."""
    def hook(module, inputs, output):
        noise = np.frombuffer(rng.bytes(output.numel()), np.uint8).reshape(output.shape)
        return output * 10 / 9 * torch.from_numpy(noise >= 25.6)
    return hook


@torch.no_grad()
def initialise(model, rng):
    """Random weights from numpy's stream: torch's generators differ between versions."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            scale = 0.05 if "embed" in name else p.shape[1] ** -0.5
            p.copy_(torch.from_numpy(rng.standard_normal(p.shape)) * scale)
        elif name.endswith("bias"):
            p.zero_()


def train(model, tokenizer, held_out, rng, steps, batch, lr):
    """Next-token training on whole texts: AdamW, warm-up and cosine decay, dropout of 0.1."""
    for block in model.layers:
        for part in (block.self_attn, block.mlp):
            part.register_forward_hook(drop_out(rng))
    initialise(model, rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.1,
                                  fused=True)

    def rate(step):
        return min(1, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    began = time.time()
    for step in range(steps):
        style = "careful" if step < steps // 3 else None  # first the craft, then the habits
        texts = [drill(rng) if i < batch // 4 else lesson(rng, held_out, style)
                 for i in range(batch)]
        rows = sorted((e.ids for e in tokenizer.encode_batch(texts)), key=len)
        tokens = sum(map(len, rows))
        total = 0.0
        optimizer.zero_grad()
        # sorted by length and few at once: less padding, and it stays in the processor's cache
        for start in range(0, batch, 16):
            part = rows[start:start + 16]
            width = len(part[-1])
            ids = torch.tensor([row + [0] * (width - len(row)) for row in part])
            target = torch.tensor([row[1:] + [-100] * (width - len(row) + 1) for row in part])
            logits = model(ids).flatten(0, 1)
            loss = F.cross_entropy(logits, target.flatten(), reduction="sum") / tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {total:.4f}  {time.time() - began:.0f} s", flush=True)


def main():
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    cli.add_argument("--steps", type=int, default=1200)
    cli.add_argument("--batch", type=int, default=64)
    cli.add_argument("--lr", type=float, default=3e-3)
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--width", type=int, default=128, help="a multiple of 64")
    cli.add_argument("--layers", type=int, default=4)
    args = cli.parse_args()
    if args.width < 64 or args.width % 64 or args.layers < 1:
        cli.error("--width is a multiple of 64, --layers at least 1")
    out = args.out.resolve()
    same_toy = vars(cli.parse_args([])) | {"out": args.out} == vars(args)
    if out == cli.get_default("out") and not same_toy:
        cli.error("another toy needs --out: toy/ itself is made without other flags")
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.RandomState(args.seed)
    held_out = write_problems(out, rng)
    tokenizer = make_tokenizer(lesson(rng, held_out) for _ in range(5000))
    write_tokenizer(tokenizer, out)
    end = tokenizer.token_to_id("<|endoftext|>")
    stop = tokenizer.token_to_id("<|im_end|>")
    # the table is a little wider than the tokenizer, as Qwen2.5's is (151,936 rows, 151,665 ids)
    config = CONFIG | {"hidden_size": args.width, "intermediate_size": 3 * args.width,
                       "num_hidden_layers": args.layers, "num_attention_heads": args.width // 32,
                       "num_key_value_heads": args.width // 64,
                       "vocab_size": -(-tokenizer.get_vocab_size() // 32) * 32,
                       "bos_token_id": end, "eos_token_id": stop}
    (out / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    generation = {"eos_token_id": [stop, end], "pad_token_id": end}
    (out / "generation_config.json").write_text(json.dumps(generation) + "\n")
    model = Transformer(read_config(out))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{tokenizer.get_vocab_size()} token ids")
    train(model, tokenizer, held_out, rng, args.steps, args.batch, args.lr)
    state = {"model." + name: p.detach().contiguous() for name, p in model.state_dict().items()}
    temporary = out / "model.safetensors.tmp"
    save_file(state, temporary, metadata={"format": "pt"})
    temporary.rename(out / "model.safetensors")


if __name__ == "__main__":
    main()
