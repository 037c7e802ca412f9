"""The sides of a comparison (bench/speed.py): this project, transformers, TRL with PEFT."""
import os
import warnings

os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false",
               "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
warnings.filterwarnings("ignore")

import common  # noqa: F401 (first: it finds the project)

import numpy as np
import torch

import fast
import gsm8k
import model as transformer
import tinylora
from support.chat_format import Chat
from support.hub import find_model

QUESTIONS = ["There are {} shells in the box of Omar. Then he loses {}. He gets {} more from Eva. "
             "How many shells does Omar have left?",
             "Mia has {} nuts. Then she gives {} to Jack. She picks up {} more. "
             "How many nuts does Mia have in the end?"]
NAMES = [target.split(".")[1] for target in tinylora.TARGETS]  # as PEFT wants them


class Setup:
    """One model for all sides, with the same prompts: P problems x G responses of T tokens."""

    def __init__(self, args):
        self.folder = find_model(args.model)
        self.P = args.problems
        self.G = args.group
        self.T = args.tokens
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.chat = Chat(self.folder)
        self.questions = [QUESTIONS[i % 2].format(5 + i % 13, 1 + i % 4, 2 + i % 7)
                          + gsm8k.INSTRUCTION for i in range(self.P)]
        self.prompts = [self.chat.prompt(question) for question in self.questions]
        self.rows = [prompt for prompt in self.prompts for _ in range(self.G)]
        self.rng = np.random.RandomState(0)

    def bare(self):
        model = transformer.load(self.folder, self.dtype, self.device)
        model.vocab = self.chat.vocab
        return model

    def ours(self):
        """(model, v)"""
        model = self.bare()
        v = tinylora.adapt(model, 13, svd=fast.svd)
        with torch.no_grad():
            v.copy_(torch.from_numpy(self.rng.standard_normal(v.shape) * 1e-3))
        return model, v

    def theirs(self):
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype)
        return model.to(self.device).eval()

    def sample(self, engine, model, stop_ids):
        noise = self.rng.random_sample((self.P * self.G, self.T))
        return engine.generate(model, self.prompts, self.G, self.T, stop_ids, 1.0, noise)


def padded_left(prompts, device):
    """(ids, attention mask), as transformers and TRL want them."""
    width = max(map(len, prompts))
    ids = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def trl_trainer(s, out, **kw):
    """TRL's GRPOTrainer over PEFT's TinyLoRA, a step of P x G responses; rewards are a coin's."""
    from datasets import Dataset
    from peft import TinyLoraConfig, get_peft_model
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer
    rng = np.random.RandomState(0)

    def reward(completions, **kw):
        return rng.randint(0, 2, len(completions)).astype(float).tolist()

    rows = [{"prompt": [{"role": "user", "content": q}]} for q in s.questions] * 50
    config = GRPOConfig(
        output_dir=out, use_cpu=s.device == "cpu", bf16=s.device == "cuda",
        per_device_train_batch_size=s.P * s.G, gradient_accumulation_steps=1, num_generations=s.G,
        max_completion_length=s.T, temperature=1.0, top_k=0, beta=0.0, loss_type="dapo",
        learning_rate=1e-4, report_to=[], logging_strategy="no", save_strategy="no",
        disable_tqdm=True, **kw)
    peft = TinyLoraConfig(r=2, u=1, weight_tying=1.0, target_modules=NAMES)
    return GRPOTrainer(get_peft_model(s.theirs(), peft), reward, args=config,
                       train_dataset=Dataset.from_list(rows),
                       processing_class=AutoTokenizer.from_pretrained(s.folder))
