"""What a training run must give, computed in plain Python: the expectation of test_recipe.py.

`Recipe` has its own order of problems, noise, sampling (the whole text anew for every token, no
cache), advantages, loss, KL, gradient clipping, AdamW (numpy) and warm-up. It shares with the
program only the forward pass, the adapter and the tokenizer, which have tests of their own, and
calls nothing of train.py, grpo.py or fast/.
"""
import json
from pathlib import Path

import numpy as np
import torch

import model as transformer
import tinylora
from support.chat_format import Chat

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "toy"
torch.set_num_threads(1)  # the toy's products are small: more threads only wait for each other

# A task whose scores depend on text and row, differ from each other, and pay often.
TASK = '''
def prompt(row, instruction=None):
    return row["question"] + " Answer:"


def score(text, row):
    n = row["n"]
    return {"even": float((len(text) + n) % 2 == 0),
            "third": float((len(text) + n) % 3 == 0),
            "vowel": float(text[-1:] in ("a", "e", "o", "s", "7"))}
'''
SCORES = ("even", "third", "vowel")
# 5 problems, 4 a step: 3 epochs are 3 steps, and an epoch ends in the middle of each
BASE = {"prompts": 4, "group": 3, "minibatches": 2, "lr": 0.05, "warmup": 0.05, "temperature": 1.0,
        "clip_low": 0.2, "clip_high": 0.4, "kl": 0.0, "grad_clip": 1.0, "reward": "even", "seed": 0,
        "max_new_tokens": 12, "v_dtype": "fp32", "eval_every": 0}
SETTINGS = {
    # from an adapter; ratios leave both bounds, and every gradient is clipped
    "kl": {"kl": 0.5, "temperature": 0.7, "clip_low": 0.02, "clip_high": 0.2, "warmup": 0.5,
           "reward": "third", "seed": 7, "lr": 0.1, "grad_clip": 0.02, "eval_every": 1},
    "bf16": {"minibatches": 1, "seed": 3, "lr": 0.1, "clip_low": 0.1, "v_dtype": "bf16"},
}
ADAPTER_SEED = 5  # of P, which --adapter brings; --seed is another


def write_adapter(path, seed):
    """An adapter with random numbers; returns them."""
    model = transformer.load(TOY)
    v = tinylora.adapt(model, 13, seed=ADAPTER_SEED)
    with torch.no_grad():
        v.copy_(torch.from_numpy(np.random.RandomState(seed).standard_normal(v.shape)) * 0.1)
    tinylora.save(path, v, model)
    return v.detach()


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(data, toy, out, **flags):
    """The command line of a run on the data folder."""
    argv = ["--model", str(toy), "--data", str(data), "--task", str(data / "task.py"),
            "--out", str(out)]
    return argv + [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]


class Recipe:
    """A run, computed the slow way. p: the flags; v0: what --adapter brings."""

    def __init__(self, data, toy, flags, v0=None):
        self.p = BASE | flags
        self.train = rows(data / "train.jsonl")
        self.test = rows(data / "test.jsonl")
        self.task = {}
        exec(TASK, self.task)
        self.chat = Chat(toy)
        self.model = transformer.load(toy)
        P_seed = self.p["seed"] if v0 is None else ADAPTER_SEED
        self.v = tinylora.adapt(self.model, 13, seed=P_seed)
        self.v0 = torch.zeros(13, 1) if v0 is None else v0.view(13, 1)
        self.set(self.v0)
        self.clipped = {True: 0, False: 0}  # tokens: above, where the advantage is positive; below

    def set(self, value):
        with torch.no_grad():
            self.v.copy_(torch.as_tensor(value))

    def ids(self, row):
        return self.chat.prompt(self.task["prompt"](row))

    def logp(self, prompt, response, temperature):
        """Log-probs of a response's tokens, (T,), from one forward over the whole text."""
        logits = self.model(torch.tensor([prompt + response]))[0, len(prompt) - 1:-1]
        logp = torch.log_softmax(logits[:, :self.chat.vocab] / temperature, -1)
        return logp[torch.arange(len(response)), torch.tensor(response)]

    @torch.no_grad()
    def respond(self, prompt, temperature, key=None):
        """Token ids up to and including a stop token; no key: greedy."""
        noise = None if key is None else np.random.RandomState(key).random_sample(1000)
        response = []
        while len(response) < self.p["max_new_tokens"]:
            logits = self.model(torch.tensor([prompt + response]))[0, -1, :self.chat.vocab]
            p = torch.softmax(logits / temperature, -1).double().numpy()
            if key is None:
                token = int(p.argmax())
            else:
                cdf = np.cumsum(p) / p.sum()
                token = int(np.searchsorted(cdf, noise[len(response)], "right"))
            response.append(token)
            if token in self.chat.stop_ids:
                break
        return response

    def text(self, response):
        return self.chat.decode(torch.tensor(response), torch.ones(len(response), dtype=bool))

    def score(self, response, row):
        return self.task["score"](self.text(response), row)

    def evaluate(self, problems=None):
        """Greedy, then at temperature 1 with fixed noise: (mean scores, texts) of each."""
        results = []
        for sampled in (False, True):
            scores = []
            texts = []
            for i, row in enumerate(problems or self.test):
                key = [4, 0, i, 0] if sampled else None
                ids = self.respond(self.ids(row), 1.0, key)
                scores.append(self.score(ids, row))
                texts.append(self.text(ids))
            means = {name: np.mean([s[name] for s in scores]) for name in SCORES}
            results.append((means, texts))
        return results

    def problem(self, position):
        """The training problem at a position of an endless series of shuffled epochs."""
        epoch, place = divmod(position, len(self.train))
        order = np.random.RandomState([2, self.p["seed"], epoch, 0]).permutation(len(self.train))
        return self.train[order[place]]

    def sample(self, position):
        """The group of responses to the problem at a position, with scores and advantages."""
        row = self.problem(position)
        prompt = self.ids(row)
        group = []
        for g in range(self.p["group"]):
            ids = self.respond(prompt, self.p["temperature"], [3, self.p["seed"], position, g])
            with torch.no_grad():
                old = self.logp(prompt, ids, self.p["temperature"])
            group.append({"prompt": prompt, "ids": ids, "old": old, "scores": self.score(ids, row)})
        rewards = [r["scores"][self.p["reward"]] for r in group]
        std = np.std(rewards, ddof=1)
        for r, reward in zip(group, rewards):
            r["advantage"] = 0.0 if std == 0 else (reward - np.mean(rewards)) / (std + 1e-6)
        return group

    def gradient(self, batch):
        """(dL/dv, tokens seen, clipped ones, sum of k3) of a mini-batch."""
        p = self.p
        if p["kl"]:
            now = self.v.detach().clone()
            self.set(self.v0)
            for r in batch:
                with torch.no_grad():
                    r["base"] = self.logp(r["prompt"], r["ids"], p["temperature"])
            self.set(now)
        count = sum(len(r["ids"]) for r in batch)
        gradient = np.zeros((13, 1))
        seen = 0
        clipped = 0
        kl = 0.0
        for r in batch:
            if r["advantage"] == 0 and not p["kl"]:
                continue
            logp = self.logp(r["prompt"], r["ids"], p["temperature"])
            ratio = (logp - r["old"]).exp()
            low = 1 - p["clip_low"]
            high = 1 + p["clip_high"]
            A = float(r["advantage"])
            loss = -torch.minimum(ratio * A, ratio.clamp(low, high) * A).sum()
            if p["kl"]:
                k3 = (r["base"] - logp).exp() - (r["base"] - logp) - 1
                loss = loss + p["kl"] * k3.sum()
                kl += k3.sum().item()
            seen += len(r["ids"])
            if A != 0:  # only then is there something to clip
                outside = ratio > high if A > 0 else ratio < low
                clipped += int(outside.sum())
                self.clipped[A > 0] += int(outside.sum())
            gradient += torch.autograd.grad(loss / count, self.v)[0].double().numpy()
        return gradient, seen, clipped, kl

    def train_steps(self, steps):
        """A log row per step; self.v moves."""
        p = self.p
        K = p["minibatches"]
        part = p["prompts"] // K
        rising = max(1, round(p["warmup"] * steps * K))  # updates until the full learning rate
        m = np.zeros((13, 1))
        s = np.zeros((13, 1))
        update = 0
        log = []
        for step in range(steps):
            first = step * p["prompts"]
            groups = [self.sample(first + i) for i in range(p["prompts"])]
            flat = [r for group in groups for r in group]
            tokens = sum(len(r["ids"]) for r in flat)
            norms = []
            sums = np.zeros(3)
            for k in range(K):
                batch = [r for group in groups[k * part:(k + 1) * part] for r in group]
                g, *counts = self.gradient(batch)
                sums += counts
                norms.append(np.linalg.norm(g))
                g = g * min(1.0, p["grad_clip"] / (norms[-1] + 1e-6))
                update += 1
                lr = p["lr"] * min(1.0, update / rising)
                m = 0.9 * m + 0.1 * g
                s = 0.999 * s + 0.001 * g * g
                change = m / (1 - 0.9**update) / (np.sqrt(s / (1 - 0.999**update)) + 1e-8)
                value = self.v.detach().double() - lr * torch.from_numpy(change)
                self.set(value.float().to(tinylora.DTYPES[p["v_dtype"]]))
            row = {name: np.mean([r["scores"][name] for r in flat]) for name in SCORES}
            row["signal"] = np.mean([any(r["advantage"] for r in group) for group in groups])
            row |= {"step": step + 1, "lr": lr, "tokens": tokens, "length": tokens / len(flat)}
            row["grad_norm"] = np.mean(norms)
            row["clip_fraction"] = sums[1] / max(sums[0], 1)
            row["kl"] = sums[2] / max(sums[0], 1)
            row["entropy"] = -sum(r["old"].double().sum().item() for r in flat) / tokens
            row["v_norm"] = self.v.detach().double().norm().item()
            if p["eval_every"] and step + 1 < steps and (step + 1) % p["eval_every"] == 0:
                row |= {f"eval_{name}": x for name, x in self.evaluate()[0][0].items()}
            log.append(row)
        return log
