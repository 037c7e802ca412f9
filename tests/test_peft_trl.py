"""The layer, the exports and the loss against PEFT and TRL; what is not installed is skipped."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers import TOY, needs, random_v, rollout, tiny, write_folder

import fast
import grpo
import model as transformer
import tinylora
from methods import lora
from tools import export

IDS = torch.arange(40).view(2, 20)


def close(got, want):
    """fp32 rounding: within 1e-5 of the largest number."""
    torch.testing.assert_close(got, want, atol=1e-5 * want.abs().max().item(), rtol=0)


def reference_model(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


# ------------------------------------------------------------------------------------------- PEFT

def peft_layer(u):
    """PEFT's TinyLoRA on one linear layer (32 x 48)."""
    from peft import TinyLoraConfig, get_peft_model
    base = torch.nn.Sequential(torch.nn.Linear(48, 32))
    weight = np.random.RandomState(0).standard_normal((32, 48))
    base[0].weight.data.copy_(torch.from_numpy(weight))
    return get_peft_model(base, TinyLoraConfig(r=2, u=u, target_modules=["0"])).base_model.model[0]


@needs("peft", "transformers")
@torch.no_grad()
def test_the_documented_translation_of_P():
    """tinylora.py's table: with P = sqrt(u) S^-1/2 P_peft S^1/2 our layer has the delta W of PEFT's
    layer, from the same v."""
    layer = peft_layer(u=3)
    U, S, V, _ = tinylora.truncated_svd(layer.base_layer.weight, 2)
    root = torch.diag(S.sqrt())
    layer.tinylora_A["default"].copy_(root @ V.T)
    layer.tinylora_B["default"].copy_(U @ root)
    values = torch.tensor([0.7, -1.3, 0.4])
    layer.tinylora_v["default"][layer._tinylora_v_key["default"]].copy_(values)
    P = math.sqrt(3) * root.inverse() @ layer.tinylora_P["default"] @ root  # (u, r, r)
    v = torch.nn.Parameter(values[None].clone())
    # a layer's P carries the 1 / sqrt(u) already, as random_P's does
    ours = tinylora.TinyLoRALinear(layer.base_layer, v, 0, P / math.sqrt(3), (U, S, V, 0.0))
    (A, B), = export.factors(torch.nn.ModuleDict({"x": ours})).values()
    close(B @ A, layer.get_delta_weight("default"))
    x = torch.from_numpy(np.random.RandomState(1).standard_normal((4, 48))).float()
    torch.testing.assert_close(ours(x), layer(x), atol=1e-4, rtol=1e-4)


@needs("peft", "transformers")
def test_the_documented_sizes_of_P():
    """The table's last columns: per unit of v, the standard deviation of R's entries is 1 / sqrt(u)
    here and 1 / sqrt(r) in PEFT (r = 2). A P from N(0, 1) there would be off by 40%."""
    theirs = peft_layer(u=5000).tinylora_P["default"]
    assert theirs.std().item() == pytest.approx(2**-0.5, rel=0.03)
    ours = tinylora.random_P(5000, 2, 0, 0)
    assert ours.std().item() == pytest.approx(5000**-0.5, rel=0.03)


def save_adapter(tmp_path, model, **settings):
    random_v(tinylora.adapt(model, **settings, svd=fast.svd), 0.2)  # export's SVD too
    path = tmp_path / "adapter.safetensors"
    tinylora.save(path, model.layers[0].self_attn.q_proj.v, model, name=str(tmp_path / "base"))
    return str(path)


SETTINGS = [dict(params=13), dict(params=26, u=2, rank=3), dict(rank=4, method="lora-xs")]


@needs("peft", "transformers")
@torch.no_grad()
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_peft_export_is_an_ordinary_lora_with_our_logits(settings, tmp_path):
    """--to peft: PEFT on the transformers model gives our logits, and so does our own reader."""
    from peft import PeftModel
    model = tiny()
    write_folder(tmp_path / "base", model)
    path = save_adapter(tmp_path, model, **settings)
    out = tmp_path / "lora"
    assert export.main(["export", path, "--to", "peft", "--out", str(out)]) == 0
    want = model(IDS)
    plain = transformer.load(tmp_path / "base")
    assert (plain(IDS) - want).abs().max() > 0.1
    reference = PeftModel.from_pretrained(reference_model(tmp_path / "base"), out).eval()
    close(reference(IDS).logits, want)
    lora.load(out, plain)
    close(plain(IDS), want)


@needs("transformers")
@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_export_loads_in_transformers(tied, tmp_path, capsys):
    """--to merged: our logits in fp32; in bf16 the two figures of the report are those of plain
    arithmetic on the files."""
    write_folder(tmp_path / "base", tiny(tied=tied).bfloat16())  # as checkpoints are
    model = transformer.load(tmp_path / "base")
    path = save_adapter(tmp_path, model, params=13)
    for dtype in ("fp32", "bf16"):
        flags = ["--to", "merged", "--dtype", dtype, "--out", str(tmp_path / dtype)]
        assert export.main(["export", path, *flags]) == 0
    report = capsys.readouterr().out
    want = model(IDS)
    close(reference_model(tmp_path / "fp32")(IDS).logits, want)
    close(transformer.load(tmp_path / "fp32")(IDS), want)
    assert reference_model(tmp_path / "bf16", torch.bfloat16)(IDS).logits.isfinite().all()

    base, exact, rounded = (load_file(tmp_path / name / "model.safetensors")
                            for name in ("base", "fp32", "bf16"))
    assert set(base) == set(exact) == set(rounded)
    assert {x.dtype for x in rounded.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    changed = [name for name in base if not torch.equal(base[name].float(), exact[name])]
    assert len(changed) == 14

    def difference(state):
        changes = [state[name].float() - base[name].float() for name in changed]
        return torch.cat([change.flatten() for change in changes]).double()
    wish = difference(exact)
    got = difference(rounded)
    lost = ((got - wish).norm() / wish.norm()).item()
    left = ((got == 0) & (wish != 0)).double().mean().item()
    assert f"{lost:.1%}" in report and f"{left:.1%}" in report


@needs("peft", "transformers")
@torch.no_grad()
def test_a_lora_folder_is_pefts(tmp_path):
    """PEFT loads what --method lora saves, to the same logits; we load what PEFT saves."""
    from peft import LoraConfig, PeftModel, get_peft_model
    model = tiny()
    write_folder(tmp_path / "base", model)
    base = model(IDS)
    for i, B in enumerate(lora.adapt(model, rank=3, alpha=7.0, seed=1)[1::2]):
        random_v(B, 0.1, seed=i)
    want = model(IDS)
    assert (base - want).abs().max() > 0.1
    lora.save(tmp_path / "lora", model, base=str(tmp_path / "base"))
    reference = PeftModel.from_pretrained(reference_model(tmp_path / "base"), tmp_path / "lora")
    close(reference.eval()(IDS).logits, want)

    modules = [target.split(".")[1] for target in tinylora.TARGETS]
    config = LoraConfig(r=2, lora_alpha=16, target_modules=modules, init_lora_weights=False,
                        task_type="CAUSAL_LM")
    made = get_peft_model(reference_model(tmp_path / "base"), config).eval()
    made.save_pretrained(tmp_path / "made")
    again = transformer.load(tmp_path / "base")
    lora.load(tmp_path / "made", again)
    close(again(IDS), made(IDS).logits)


# -------------------------------------------------------------------------------------------- TRL

def trl_trainer(model, kl, out):
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer
    config = GRPOConfig(
        output_dir=str(out), use_cpu=True, loss_type="dapo", epsilon=0.2, epsilon_high=0.4,
        beta=kl, use_bias_correction_kl=False, temperature=0.8, num_generations=4,
        per_device_train_batch_size=12, gradient_accumulation_steps=1, report_to=[], bf16=False,
        gradient_checkpointing=False)
    trainer = GRPOTrainer(
        model, lambda completions, **kw: [0.0] * len(completions), args=config,
        train_dataset=Dataset.from_list([{"prompt": "x"}] * 12),
        processing_class=AutoTokenizer.from_pretrained(TOY))
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def trl_inputs(data):
    """A rollout as TRL has it: prompts padded on the left."""
    width = max(map(len, data.prompts))
    pads = [width - len(prompt) for prompt in data.prompts]
    ids = [[0] * n + prompt for n, prompt in zip(pads, data.prompts)]
    mask = [[0] * n + [1] * (width - n) for n in pads]
    return {"prompt_ids": torch.tensor(ids), "prompt_mask": torch.tensor(mask),
            "completion_ids": data.ids, "completion_mask": data.mask.long(),
            "advantages": data.advantage, "old_per_token_logps": data.logp,
            "ref_per_token_logps": data.ref_logp, "num_items_in_batch": data.mask.sum()}


@needs("trl", "transformers", "datasets")
@pytest.mark.parametrize("seed,kl", [(0, 0.0), (2, 0.05)])
def test_grpo_loss_and_gradient_equal_trls(seed, kl, tmp_path):
    """The same batch, old log-probs, advantages and clip range in TRL's GRPOTrainer (dapo) and
    here: the same loss, and the same gradient of every weight, from both engines. Responses are
    ragged, one group has equal rewards, and ratios are clipped on both sides."""
    write_folder(tmp_path / "m", tiny(seed=seed, vocab=50, tied=False))
    reference = reference_model(tmp_path / "m")
    trainer = trl_trainer(reference, kl, tmp_path / "out")
    model = transformer.load(tmp_path / "m")
    params = lora.full(model)
    data = rollout(model, temperature=0.8, seed=seed)
    rng = np.random.RandomState(seed)
    reward = torch.from_numpy(rng.randint(0, 2, (3, 4))).float()
    data.advantage = grpo.advantages(reward * torch.tensor([[1.0], [0.0], [1.0]])).flatten()
    noise = torch.from_numpy(rng.standard_normal((2, *data.logp.shape)) * 0.4).float()
    data.ref_logp = data.logp + noise[0] * data.mask
    data.logp = data.logp + noise[1] * data.mask  # as if other policies had sampled
    assert (data.advantage == 0).sum() >= 4 and data.advantage.any() and not data.mask.all()

    reference.train()
    want = trainer._compute_loss(reference, trl_inputs(data))
    want.backward()
    ratio = (grpo.logprobs(model, data) - data.logp).exp()[data.mask]
    assert (ratio > 1.4).any() and (ratio < 0.8).any()
    args = SimpleNamespace(kl=kl, clip_low=0.2, clip_high=0.4, grad_clip=1e30, v_dtype="fp32",
                           tokens_per_micro_batch=100, recompute=False)
    optimizer = torch.optim.AdamW(params, lr=0.0, weight_decay=0.0)
    for engine in (grpo, fast):
        result = grpo.update(model, optimizer, data, args, engine)
        assert result["loss"] == pytest.approx(want.item(), rel=1e-5, abs=1e-7)
        for name, p in model.named_parameters():
            full_name = name if name.startswith("lm_head") else f"model.{name}"
            grad = reference.get_parameter(full_name).grad
            bound = 2e-5 * grad.abs().max().item() + 1e-8
            torch.testing.assert_close(p.grad, grad, atol=bound, rtol=0)
