"""Ours beside what people would use instead: python bench/speed.py WHAT ... [--model FOLDER] [--rounds 3] (needs transformers, trl, peft)

    rollout   tokens/s of sampling: generate of transformers (default and static cache)
    step      seconds of one whole GRPO step, rollout and update: TRL's GRPOTrainer with PEFT's TinyLoRA
    wrap      seconds to put TinyLoRA on one 18944 x 3584 matrix, and on the model: PEFT's TinyLoRA
    start     seconds to put TinyLoRA on the 196 matrices of Qwen2.5-7B's shape, given --model's singular values (two layers x 14),
              and what the adapter adds to a forward of those two layers
    memory    peak resident memory of an update of 32 responses of 128 tokens, each in a process of its own: TRL's
    many      64 rows with 64 different v's: against 64 rows with one v
    skew      10% of rows run to the limit and the rest to a quarter of it: against decoding every row to the end

Ours and theirs take turns (ours, theirs, ours, theirs ...), figures are medians and ratios of medians; the last line is JSON. Both
sides get the same weights, prompts and lengths and sample at T = 1 from the full softmax. Default model: toy, 32 problems x 8, 96
tokens; any other: 4 problems x 8, 128 tokens.
"""
import argparse
import contextlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
warnings.filterwarnings("ignore")

import numpy as np
import torch

import grpo
import gsm8k
import model as transformer
import tinylora
from files import InputError
from scale import SHAPES, limited, random_model, seconds, wrapped

QUESTIONS = ["There are {} shells in the box of Omar. Then he loses {}. He gets {} more from Eva. How many shells does Omar have left?",
             "Mia has {} nuts. Then she gives {} to Jack. She picks up {} more. How many nuts does Mia have in the end?"]
NAMES = [target.split(".")[1] for target in tinylora.TARGETS]  # as PEFT wants them


def turns(rounds, **sides):
    """Each side once per round, in turn, after one round to warm up (none for a single round): {name: [result of each round]}."""
    out = {name: [] for name in sides}
    for i in range(rounds + (rounds > 1)):
        for name, f in sides.items():
            result = f()
            if i or rounds == 1:
                out[name].append(result)
    return out


def median(values):
    return statistics.median(values)


class Setup:
    """One model on both sides, with the same prompts: `ours` and (when asked for) `theirs`."""

    def __init__(self, args):
        self.folder, self.P, self.G, self.T = args.model, args.problems, args.group, args.tokens
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.chat = gsm8k.Chat(self.folder)
        self.questions = [QUESTIONS[i % 2].format(5 + i % 13, 1 + i % 4, 2 + i % 7) + gsm8k.INSTRUCTION for i in range(self.P)]
        self.prompts = [self.chat.prompt(q) for q in self.questions]
        self.rng = np.random.RandomState(0)

    def ours(self):
        model = transformer.load(self.folder, self.dtype, self.device)
        v = tinylora.adapt(model, 13)
        with torch.no_grad():
            v.copy_(torch.from_numpy(self.rng.standard_normal(v.shape) * 1e-3))
        return model, v

    def theirs(self):
        from transformers import AutoModelForCausalLM
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype).to(self.device).eval()

    def sample(self, model, stop_ids, **kw):
        noise = self.rng.random_sample((self.P * self.G, self.T))
        return grpo.generate(model, self.prompts, self.G, self.T, stop_ids, 1.0, noise, self.chat.vocab, **kw)


def rollout(args):
    s = Setup(args)
    (model, _), theirs = s.ours(), s.theirs()
    width = max(map(len, s.prompts))
    rows = [p for p in s.prompts for _ in range(s.G)]
    ids = torch.tensor([[0] * (width - len(p)) + p for p in rows], device=s.device)
    attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in rows], device=s.device)
    stops = sorted(s.chat.stop_ids)

    def mine(natural):
        took, (_, mask, _) = seconds(lambda: s.sample(model, stops if natural else [-1]))
        return int(mask.sum()) / took

    @torch.no_grad()
    def other(natural, **kw):
        kw |= {} if natural else {"min_new_tokens": s.T}
        took, out = seconds(lambda: theirs.generate(input_ids=ids, attention_mask=attention, max_new_tokens=s.T, do_sample=True, temperature=1.0,
                                                    top_k=0, top_p=1.0, eos_token_id=stops, pad_token_id=stops[0], **kw))
        ended = torch.isin(out[:, width:], torch.tensor(stops, device=s.device)).cumsum(1).cumsum(1)
        return int((ended <= 1).sum()) / took  # tokens up to and including the first stop token

    result = {}
    for name in args.lengths:
        natural = name == "natural"
        got = turns(args.rounds, ours=lambda: mine(natural), default=lambda: other(natural), static=lambda: other(natural, cache_implementation="static"))
        tokens = {side: round(median(x), 1) for side, x in got.items()}
        result[name] = tokens | {"ratio": round(tokens["ours"] / max(tokens["default"], tokens["static"]), 2)}
        print(f"rollout, {name}: tokens/s {result[name]}", flush=True)
    return result


def trl_trainer(s, out, **kw):
    """TRL's GRPOTrainer over PEFT's TinyLoRA, one step of s.P x s.G responses of s.T tokens; rewards are a coin's."""
    from datasets import Dataset
    from peft import TinyLoraConfig, get_peft_model
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer
    tokenizer = AutoTokenizer.from_pretrained(s.folder)
    rows = [{"prompt": [{"role": "user", "content": q}]} for q in s.questions] * 50
    rng = np.random.RandomState(0)
    config = GRPOConfig(output_dir=out, use_cpu=s.device == "cpu", bf16=s.device == "cuda", per_device_train_batch_size=s.P * s.G, gradient_accumulation_steps=1,
                        num_generations=s.G, max_completion_length=s.T, temperature=1.0, top_k=0, beta=0.0, loss_type="dapo", learning_rate=1e-4, report_to=[],
                        logging_strategy="no", save_strategy="no", disable_tqdm=True, **kw)
    peft = TinyLoraConfig(r=2, u=1, weight_tying=1.0, target_modules=NAMES)
    return GRPOTrainer(get_peft_model(s.theirs(), peft), lambda completions, **kw: rng.randint(0, 2, len(completions)).astype(float).tolist(), args=config,
                       train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def step(args):
    """Ours: generate + update. Theirs: GRPOTrainer.training_step, which rolls out, scores and runs forward and backward; with its
    defaults (activation checkpointing on) and at its fastest (off)."""
    s = Setup(args)
    model, v = s.ours()
    optimizer = torch.optim.AdamW([v], lr=1e-4, weight_decay=0.0)

    def mine(stop_ids):
        ids, mask, logp = s.sample(model, stop_ids)
        advantage = grpo.advantages(torch.from_numpy(s.rng.randint(0, 2, (s.P, s.G))).float()).flatten().to(s.device)
        grpo.update(model, [v], optimizer, [p for p in s.prompts for _ in range(s.G)], ids, mask, logp, advantage, lr=[1e-4], vocab=s.chat.vocab,
                    micro_tokens=2048 if s.device == "cpu" else 65536)

    result = {}
    for lengths in args.lengths:
        stop_ids, limits = (s.chat.stop_ids, {}) if lengths == "natural" else ([-1], {"generation_kwargs": {"min_new_tokens": s.T}})
        times = {"ours": []}
        for name, checkpointing in (("trl, default", True), ("trl, fastest", False)):
            times[name] = []
            with tempfile.TemporaryDirectory() as out:
                trainer = trl_trainer(s, out, max_steps=args.rounds + (args.rounds > 1), gradient_checkpointing=checkpointing, **limits)
                real = trainer.training_step

                def both(*a, **kw):
                    took, output = seconds(lambda: real(*a, **kw))
                    times[name].append(took)
                    times["ours"].append(seconds(lambda: mine(stop_ids))[0])
                    return output
                trainer.training_step = both
                with contextlib.redirect_stdout(io.StringIO()):
                    trainer.train()
            times[name] = times[name][args.rounds > 1:]
        figures = {side: round(median(x), 3) for side, x in times.items()}
        result[lengths] = figures | {f"ratio to {name}": round(figures[name] / figures["ours"], 2) for name in ("trl, default", "trl, fastest")}
        print(f"step, {lengths}: seconds {result[lengths]}", flush=True)
    return result


def wrap(args):
    """The SVDs and modules alone, weights loaded before; theirs is get_peft_model."""
    from peft import TinyLoraConfig, get_peft_model
    s, result = Setup(args), {}
    noise = torch.from_numpy(np.random.RandomState(0).standard_normal((18944, 3584)).astype(np.float32))
    U, V = (torch.linalg.qr(x)[0] for x in (noise[:, :64], noise[:3584, 64:128]))
    matrices = {"decaying": 0.02 * noise + U * (20 * torch.arange(1, 65)**-0.5) @ V.T,  # as trained weights are
                "noise": noise}  # the hardest: its largest singular values lie 0.2% apart
    for name, W in matrices.items():
        def one_theirs():
            holder = torch.nn.Sequential(torch.nn.Linear(3584, 18944, bias=False, device="meta"))
            holder[0].weight = torch.nn.Parameter(W, requires_grad=False)
            return get_peft_model(holder, TinyLoraConfig(r=2, u=1, target_modules=["0"]))

        got = turns(args.rounds, ours=lambda: seconds(lambda: tinylora.truncated_svd(W, 2)), theirs=lambda: seconds(one_theirs))
        theirs_S = got["theirs"][0][1].base_model.model[0].tinylora_B["default"].square().sum(0)  # B is U sqrt(S)
        _, S, _, residual = got["ours"][0][1]
        figures = {side: round(median([took for took, _ in x]), 2) for side, x in got.items()}
        result[f"18944 x 3584, {name}"] = figures | {"ratio": round(figures["theirs"] / figures["ours"], 1), "residual": f"{residual:.0e}",
                                                     "singular values differ by": f"{((S - theirs_S) / theirs_S).abs().max().item():.0e}"}
        print(f"wrap, {name}: {result[f'18944 x 3584, {name}']}", flush=True)
    models = [transformer.load(s.folder) for _ in range(args.rounds + 1)]
    got = turns(args.rounds, ours=lambda: seconds(lambda: tinylora.adapt(models.pop(), 13))[0],
                theirs=lambda: seconds(lambda m=s.theirs(): get_peft_model(m, TinyLoraConfig(r=2, u=1, weight_tying=1.0, target_modules=NAMES)))[0])
    result["the model"] = {side: round(median(x), 2) for side, x in got.items()}
    result["the model"]["ratio"] = round(result["the model"]["theirs"] / result["the model"]["ours"], 1)
    print(f"wrap, the model: {result['the model']}", flush=True)
    return result


def start(args):
    """Two layers of the 7B's shape; each matrix gets random singular vectors and the values of one of --model's."""
    small = transformer.load(args.model)
    _, hidden, mid, _, *heads, _ = SHAPES["7B"]
    large = random_model((1000, hidden, mid, 2, *heads, True), "cpu", torch.float32)
    rng, layers = np.random.RandomState(0), len(small.layers)
    for layer, source in zip(large.layers, (small.layers[layers // 6], small.layers[-layers // 4])):
        for target in tinylora.TARGETS:
            weight, S = layer.get_submodule(target).weight, torch.linalg.svdvals(source.get_submodule(target).weight)
            U, V = (torch.linalg.qr(torch.from_numpy(rng.standard_normal((n, len(S)))).float())[0] for n in weight.shape)
            weight.copy_(U * S @ V.T)
    _, figures = wrapped(large, 2 * args.rounds + 1)
    result = {"seconds": round(14 * figures.pop("wrap seconds"), 1)} | figures
    print(f"start: {result}", flush=True)
    return result


def peak_gb():
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def memory_of(args):
    """In a process of its own: how far one update of `side` lifts the peak above the model, in GB."""
    s = Setup(args)
    rows = s.P * s.G
    ids = torch.from_numpy(s.rng.randint(5, min(s.chat.vocab, 5000), (rows, s.T))).to(s.device)
    mask, advantage = torch.ones_like(ids, dtype=torch.bool), torch.tensor([1.0, -1.0] * (rows // 2), device=s.device)
    prompts = [p for p in s.prompts for _ in range(s.G)]
    if args.side == "ours":
        model, v = s.ours()
        logp = torch.zeros(ids.shape, device=s.device)
        before = peak_gb()
        grpo.update(model, [v], torch.optim.AdamW([v]), prompts, ids, mask, logp, advantage, lr=[1e-4], vocab=s.chat.vocab, micro_tokens=2048)
    else:
        with tempfile.TemporaryDirectory() as out:
            trainer = trl_trainer(s, out, max_steps=1, gradient_checkpointing=args.side == "trl, checkpointing")
            width = max(map(len, prompts))
            inputs = {"prompt_ids": torch.tensor([[0] * (width - len(p)) + p for p in prompts]), "prompt_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
                      "completion_ids": ids, "completion_mask": mask.long(), "advantages": advantage, "num_items_in_batch": mask.sum()}
            trainer.current_gradient_accumulation_steps = 1
            trainer.model.train()
            before = peak_gb()
            trainer._compute_loss(trainer.model, {k: x.to(s.device) for k, x in inputs.items()}).backward()
    print(json.dumps({"before": round(before, 2), "peak": round(peak_gb(), 2), "update": round(peak_gb() - before, 2)}))


def memory(args):
    result = {}
    for side in ("ours", "trl", "trl, checkpointing"):
        command = [sys.executable, __file__, "memory_of", "--side", side, "--model", args.model, "--problems", str(args.problems), "--group", str(args.group), "--tokens", str(args.tokens)]
        result[side] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        print(f"memory, {side}: GB {result[side]}", flush=True)
    result["ratio of updates"] = round(result["trl"]["update"] / result["ours"]["update"], 2)
    result["ratio of peaks"] = round(result["trl"]["peak"] / result["ours"]["peak"], 2)
    print(f"memory: {result}", flush=True)
    return result


def skew(args):
    """10% of the rows run to the limit, the rest to a quarter of it. A stop test that knows each row's limit stands in for torch.isin."""
    s = Setup(args)
    model, _ = s.ours()
    rows = s.P * s.G
    limit = torch.tensor([s.T if i % 10 == 3 else s.T // 4 for i in range(rows)], device=s.device)

    def one(check_every):
        with limited(limit):
            took, (_, mask, _) = seconds(lambda: s.sample(model, [-1], check_every=check_every))
        assert mask.sum(1).tolist() == limit.tolist()
        return took

    got = turns(args.rounds, dropping=lambda: one(4), whole=lambda: one(10**9))
    result = {"dropping": round(median(got["dropping"]), 2), "to the end": round(median(got["whole"]), 2)}
    result["ratio"] = round(result["to the end"] / result["dropping"], 2)
    print(f"skew: seconds {result}", flush=True)
    return result


def many(args):
    """64 rows with 64 different v's against 64 rows with one v; and 4 of them against runs with their v only."""
    s = Setup(args)
    model, v = s.ours()
    prompts = [s.prompts[i % s.P] for i in range(64)]
    noise, values = s.rng.random_sample((64, s.T)), torch.from_numpy(s.rng.standard_normal((64, *v.shape)) * 0.05).to(v)

    def one():
        return seconds(lambda: grpo.generate(model, prompts, 1, s.T, [-1], 1.0, noise, s.chat.vocab))

    def each():
        with tinylora.many(model, values):
            return seconds(lambda: grpo.generate(model, prompts, 1, s.T, [-1], 1.0, noise, s.chat.vocab, which=range(64)))

    got = turns(args.rounds, one=one, each=each)
    _, (ids, _, logp) = got["each"][0]
    worst, alike = {"one v": 0.0, "a row alone": 0.0}, {"one v": 0, "a row alone": 0}
    for i in range(4):  # row i against the same batch with its v for all rows, and against a batch of its own, where kernels round otherwise
        with torch.no_grad():
            v.copy_(values[i])
        for run, part, row in (("one v", slice(None), i), ("a row alone", slice(i, i + 1), 0)):
            other_ids, _, other = grpo.generate(model, prompts[part], 1, s.T, [-1], 1.0, noise[part], s.chat.vocab)
            same = (other_ids[row] == ids[i]).cumprod(0).bool()  # a number that falls within rounding of a boundary may draw the next token
            worst[run], alike[run] = max(worst[run], (other[row] - logp[i])[same].abs().max().item()), alike[run] + int(same.sum())
    figures = {side: round(median([took for took, _ in x]), 2) for side, x in got.items()}
    result = {"one v": figures["one"], "64 v's": figures["each"], "cost": round(figures["each"] / figures["one"], 2), "log-probs differ by": {run: f"{x:.1e}" for run, x in worst.items()},
              f"tokens alike, of {4 * s.T}": alike}
    print(f"many: seconds {result}", flush=True)
    return result


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("what", nargs="*", default=["rollout", "step", "wrap", "memory", "skew"])
    cli.add_argument("--model", default=str(ROOT / "toy"))
    for name, text in (("problems", "default 32 on the toy, else 4"), ("group", "8"), ("tokens", "96 on the toy, else 128"), ("rounds", "3")):
        cli.add_argument(f"--{name}", type=int, help=text)
    cli.add_argument("--lengths", nargs="+", default=["natural", "limit"], choices=["natural", "limit"], help="until a stop token, or all rows to the limit")
    cli.add_argument("--side", help=argparse.SUPPRESS)
    args = cli.parse_args()
    toy = Path(args.model).resolve() == ROOT / "toy"
    for name, value in (("problems", 32 if toy else 4), ("group", 8), ("tokens", 96 if toy else 128), ("rounds", 3)):
        setattr(args, name, getattr(args, name) or value)
    if args.what == ["memory_of"]:
        return memory_of(args)
    kinds = {"many": many, "start": start, "rollout": rollout, "step": step, "wrap": wrap, "memory": memory, "skew": skew}
    if unknown := set(args.what) - set(kinds):
        cli.error(f"{', '.join(unknown)}: is none of {', '.join(kinds)}")
    print(f"{args.model}: {args.problems} problems x {args.group}, {args.tokens} tokens, {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    try:
        print(json.dumps({what: kinds[what](args) for what in args.what}))
    except InputError as error:
        cli.error(str(error))


if __name__ == "__main__":
    main()
