"""methods/: LoRA, full finetuning, worked solutions and the search without gradients."""
import json
import math
import os
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import TINY_RUN, TOY, one_error, random_v, read_rows, tiny, write_folder

import fast
import grpo
import gsm8k
import model as transformer
import tinylora
import train
from methods import es, lora, sft
from support.chat_format import Chat
from support.errors import InputError

# flags, method, numbers that they train on the toy
METHODS = [("--method lora-xs --rank 3 --reward lenient", "lora-xs", 28 * 9),
           ("--method lora --rank 2 --alpha 8 --kl 0.01 --reward lenient", "lora", 2 * 9728),
           ("--method full --lr 1e-4 --kl 0.01 --reward lenient", "full", 862336),
           ("--algo sft --minibatches 2 --lr 0.05", "tinylora", 13),
           ("--algo sft --method lora --lr 1e-3 --v-dtype bf16", "lora", 9728),
           ("--reward format --lr 0.05", "tinylora", 13),
           ("--algo es --reward lenient --lr 0.05", "tinylora", 13)]


@pytest.mark.parametrize("flags,method,numbers", METHODS)
def test_every_method_trains_saves_and_evaluates(flags, method, numbers, tmp_path, capsys):
    """Each changes the policy, and what it saves evaluates to the run's last scores."""
    out = tmp_path / "a"
    run = [*TINY_RUN, "--prompts", "8"]
    if "sft" in flags:  # --group means nothing to it, and is refused
        at = run.index("--group")
        del run[at:at + 2]
    assert train.main([*flags.split(), *run, "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["method"] == method and summary["params"] == numbers
    rows = read_rows(out / "log.jsonl")
    assert any(row["grad_norm"] > 0 for row in rows)
    for row in rows:
        assert "loss" in row if "sft" in flags else {"strict", "lenient", "format"} <= set(row)
    command = shlex.split(capsys.readouterr().out.split("next: python train.py ")[1])
    assert train.main([*command, "--out", str(tmp_path / "b")]) == 0
    again = json.loads((tmp_path / "b" / "summary.json").read_text())
    for name in ("strict", "lenient", "format", "sampled"):
        assert again[name] == summary[f"final_{name}"]
    base = transformer.load(TOY)
    trained = transformer.load(out / "model" if method == "full" else TOY)
    if method == "lora":
        lora.load(out / "adapter", trained)
    elif method != "full":
        tinylora.load(out / "adapter.safetensors", trained)
    ids = torch.arange(20)[None]
    assert not torch.equal(base(ids), trained(ids))


# ------------------------------------------------------------------------------------------- LoRA

@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_starts_at_the_base_and_learns_in_fp32(dtype):
    """Bit for bit the base at first; alpha / r is the scale; A is uniform within 1 / sqrt(d_in),
    another one for every module; fp32 also on a bf16 model (bug 14)."""
    base = tiny(dtype=dtype)
    model = tiny(dtype=dtype)
    params = lora.adapt(model, rank=2, alpha=6.0, seed=3)
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(base(ids), model(ids))
    assert {p.dtype for p in params} == {torch.float32} and len(params) == 28
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in params}
    A, B = params[:2]
    assert 0.8 < A.abs().max() * math.sqrt(32) <= 1
    assert not torch.equal(A[:, :8], params[2][:, :8])
    random_v(B, 1.0)
    q = model.layers[0].self_attn.q_proj
    exact = dtype == torch.float32
    for shape in ((5, 32), (2, 5, 32), (32,)):  # both engines' inputs, and a single state
        x = torch.from_numpy(np.random.RandomState(1).standard_normal(shape)).to(dtype)
        want = base.layers[0].self_attn.q_proj(x).float() + 3.0 * x.float() @ (B @ A).T
        torch.testing.assert_close(q(x).float(), want, atol=1e-5 if exact else 0.1,
                                   rtol=1e-5 if exact else 0.02)


def test_start_takes_the_flags_and_their_defaults():
    """--rank, --alpha and --seed; LoRA's own defaults where they are not given."""
    args = SimpleNamespace(method="lora", adapter=None, rank=None, alpha=None, seed=4)
    model = tiny()
    params = lora.start(model, args)
    assert model.adapter | {"base": 0} == {"method": "lora", "rank": 1, "alpha": 32.0, "seed": 4,
                                           "base": 0}
    want = lora.adapt(tiny(), 1, 32.0, 4)
    assert all(torch.equal(p, q) for p, q in zip(params, want))
    args = SimpleNamespace(method="full")
    model = tiny()
    params = lora.start(model, args)
    assert {id(p) for p in params} == {id(p) for p in model.parameters()}
    assert all(p.requires_grad for p in params) and model.adapter["method"] == "full"


def test_what_a_lora_run_saves_names_its_base_and_reads_as_any_file(tmp_path):
    """A relative base would be looked for in every reader's working directory; and weights of
    mode 0600 beside configs of 0644 could be read by their writer only."""
    folder = write_folder(tmp_path / "base", tiny())
    model = transformer.load(folder)
    lora.adapt(model)
    args = SimpleNamespace(method="lora", out=tmp_path, v_dtype="fp32",
                           model=os.path.relpath(folder))
    path = lora.save_run(model, args, folder)
    assert path == tmp_path / "adapter"
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder.resolve())
    assert lora.portable_name("owner/name") == "owner/name"
    (tmp_path / "plain").touch()
    mode = (tmp_path / "plain").stat().st_mode
    names = {file.name for file in path.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
                     "tokenizer_config.json"}
    assert {(path / name).stat().st_mode for name in names} == {mode}


LORA_DAMAGE = {  # how adapter_config.json is changed, and words of the message
    "another kind": (dict(peft_type="IA3"), ["peft_type"]),
    "dora": (dict(use_dora=True), ["use_dora"]),
    "no rank": (dict(r=None), ["r is None"]),
    "a rank that is no number": (dict(r=True), ["r is True"]),
    "rank 3": (dict(r=3), ["shape"]),
    "rank too large": (dict(r=99), ["--rank 99"]),
    "modules_to_save": (dict(modules_to_save=["lm_head"]), ["modules_to_save"])}


@pytest.fixture(scope="module")
def toy_lora(tmp_path_factory):
    """A LoRA for the toy: {file name: bytes}."""
    model = transformer.load(TOY)
    lora.adapt(model, rank=2)
    folder = tmp_path_factory.mktemp("lora")
    lora.save(folder, model)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", [*LORA_DAMAGE, "truncated", "no weights", "a pipe", "no config",
                                  "tensor missing", "not a number"])
def test_damaged_lora_folders_are_refused(name, toy_lora, tmp_path, capsys):
    folder = tmp_path / "lora"
    folder.mkdir()
    for file, data in toy_lora.items():
        (folder / file).write_bytes(data)
    config = folder / "adapter_config.json"
    weights = folder / "adapter_model.safetensors"
    words = [str(folder)]
    if name in LORA_DAMAGE:
        changes, words = LORA_DAMAGE[name]
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    elif name == "truncated":
        os.truncate(weights, 1000)
    elif name in ("tensor missing", "not a number"):
        state = load_file(weights)
        first = sorted(state)[0]
        if name == "tensor missing":
            state.pop(first)
        else:
            state[first][0, 0] = math.nan
        save_file(state, weights)
        words.append(first)
    elif name == "no config":
        config.unlink()
    else:
        weights.unlink()
        if name == "a pipe":  # opening it would wait for a writer forever
            os.mkfifo(weights)
    flags = ["--eval-only", "--eval-count", "1", "--adapter", str(folder)]
    assert train.main([*flags, "--out", str(tmp_path / "out")]) == 2
    one_error(capsys, *words)


# ------------------------------------------------------------------------------------------ full

def test_a_fully_trained_model_is_a_model_folder(tmp_path):
    """Its weights, the text side of its base, and neither the base's index of shards nor its
    tinylora.json; the same logits as in memory."""
    base = write_folder(tmp_path / "base", tiny(tied=False), shards=3)
    (base / "tinylora.json").write_text('{"steps": 1}')
    model = transformer.load(base)
    params = lora.full(model)
    with torch.no_grad():
        for p in params:
            p += 0.01
    args = SimpleNamespace(method="full", out=tmp_path, v_dtype="fp32", model=str(base))
    path = lora.save_run(model, args, base)
    assert {file.name for file in path.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    ids = torch.arange(20)[None]
    assert torch.equal(transformer.load(path)(ids), model(ids))


# ------------------------------------------------------------------------------------------- SFT

def sft_run(**flags):
    args = SimpleNamespace(instruction=None, system=None, max_new_tokens=96, device="cpu")
    vars(args).update(flags)
    return train.Run(args, None, Chat(TOY), gsm8k, [], None)


def test_solutions_are_a_rollout():
    """The ids of the prompt and of the worked solution, stop token last, cut at --max-new-tokens;
    every row has an advantage, so that none is left out of the update."""
    rows = gsm8k.load(str(TOY))[0][:3]
    run = sft_run()
    data = sft.solutions(run, rows)
    for i, row in enumerate(rows):
        text = gsm8k.prompt(row)
        assert data.prompts[i] == run.chat.prompt(text)
        response = data.ids[i][data.mask[i]].tolist()
        assert response == run.chat.response(text, row["solution"])
        assert response[-1] in run.chat.stop_ids
        assert "<<" not in run.chat.decode(data.ids[i], data.mask[i])
    assert (data.advantage == 1).all() and data.temperature == 1.0
    cut = sft.solutions(sft_run(max_new_tokens=7), rows)
    assert torch.equal(cut.ids, data.ids[:, :7]) and cut.mask.all()
    other = sft.solutions(sft_run(instruction=" Go!", system="Be brief."), rows)
    assert other.prompts[0] == run.chat.prompt(rows[0]["question"] + " Go!", "Be brief.")


def test_an_sft_step_takes_the_mini_batches_in_turn_each_at_its_rate(monkeypatch):
    rows = gsm8k.load(str(TOY))[0][:4]
    run = sft_run(minibatches=2)
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}])
    seen = []

    def update(model, optimizer, batch, args, engine, loss):
        seen.append((optimizer.param_groups[0]["lr"], batch.prompts))
        assert loss is sft.sft_loss
        return {"loss": len(seen)}

    monkeypatch.setattr(grpo, "update", update)
    rollout, scores, updates = sft.step(run, optimizer, rows, [0.1, 0.2])
    assert seen == [(0.1, rollout.prompts[:2]), (0.2, rollout.prompts[2:])]
    assert scores == {} and updates == [{"loss": 1}, {"loss": 2}]


def test_kl_of_a_model_folder_is_not_sfts(tmp_path):
    """Typed, it is refused; a folder's tinylora.json may mean it for GRPO. It was a TypeError."""
    folder = tmp_path / "model"
    shutil.copytree(TOY, folder)
    settings = json.loads((folder / "tinylora.json").read_text())
    (folder / "tinylora.json").write_text(json.dumps(settings | {"kl": 0.1}))
    small = "--params 13 --steps 1 --prompts 2 --max-new-tokens 8 --eval-count 1"
    words = ["--model", str(folder), *small.split()]
    for algo in ("sft", "es", "grpo"):
        out = tmp_path / algo
        assert train.main([*words, "--algo", algo, "--out", str(out)]) == 0
        config = json.loads((out / "config.json").read_text())
        assert config["kl"] == (0.1 if algo == "grpo" else 0.0)


def test_sft_learns_the_solutions(tmp_path):
    """The likelihood of what it learns from goes up."""
    out = tmp_path / "run"
    flags = "--algo sft --method lora --rank 4 --lr 1e-3 --steps 12 --prompts 16 --warmup 0"
    assert train.main([*flags.split(), "--eval-count", "1", "--out", str(out)]) == 0
    losses = [row["loss"] for row in read_rows(out / "log.jsonl")]
    assert min(losses) > 0 and sum(losses[-3:]) < 0.8 * sum(losses[:3])


# -------------------------------------------------------------------------------------------- ES

def es_run(model, seed=0, group=64, engine=fast):
    args = SimpleNamespace(seed=seed, group=group, sigma=0.1, max_new_tokens=4, temperature=1.0,
                           reward="strict", grad_clip=1e9, v_dtype="fp32", prompts=64)
    return SimpleNamespace(args=args, model=model, engine=engine)


def test_es_climbs_a_known_hill():
    """A reward that is a smooth function of each row's v: the gradient is its slope, Adam goes
    uphill, and pairs of equal reward contribute exactly 0."""
    model = tiny()
    v = random_v(tinylora.adapt(model, 5), 0.3)
    goal = torch.linspace(-1, 1, 5)[:, None]
    seen = {}

    def roll_out(run, rows, group, noise, temperature, label, values):
        seen.update(values=values, label=label)
        assert group == 1 and len(rows) == len(noise) == len(values)
        assert np.array_equal(noise[0], noise[1])  # a pair shares its noise
        assert not np.array_equal(noise[0], noise[2])
        mask = torch.ones(len(rows), 1, dtype=torch.bool)
        return SimpleNamespace(mask=mask)

    def hill(run, rollout, rows):
        return None, {"strict": -(seen["values"] - goal).square().sum((1, 2))}

    def flat(run, rollout, rows):
        return None, {"strict": torch.ones(len(rows))}

    run = es_run(model)
    optimizer = torch.optim.AdamW([v], lr=1.0, weight_decay=0.0)
    start = v.detach().clone()
    _, scores, updates = es.step(run, optimizer, [{}] * 64, list(range(64)), [0.05], roll_out, hill)
    assert optimizer.param_groups[0]["lr"] == 0.05
    plus = seen["values"][0::2]
    minus = seen["values"][1::2]
    torch.testing.assert_close((plus + minus) / 2, start.expand_as(plus), atol=1e-6, rtol=0)
    slope = 2 * (start - goal)  # of the loss, -reward
    cosine = torch.nn.functional.cosine_similarity(v.grad.flatten(), slope.flatten(), dim=0)
    assert cosine > 0.98 and 0.8 < v.grad.norm() / slope.norm() < 1.2
    assert updates[0]["signal"] == 1.0 and len(scores["strict"]) == 64 * 64
    assert updates[0]["grad_norm"] == pytest.approx(v.grad.norm().item())
    assert seen["label"] == "step 1"
    run.args.group = 16
    for i in range(60):
        positions = list(range(64 * (i + 1), 64 * (i + 1) + 8))
        es.step(run, optimizer, [{}] * 8, positions, [0.05], roll_out, hill)
    assert (v - goal).norm() < 0.2 * (start - goal).norm()
    assert seen["label"] == "step 61"
    _, _, updates = es.step(run, optimizer, [{}] * 2, [0, 1], [0.05], roll_out, flat)
    assert (v.grad == 0).all() and updates[0] == {"grad_norm": 0.0, "signal": 0.0}


def test_values_reach_the_engine():
    """Every row is sampled with its own v: against runs with one v each."""
    model = tiny()
    v = random_v(tinylora.adapt(model, 5), 0.3)
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    values = torch.stack([v.detach() + 0.2 * k for k in range(3)])
    noise = np.random.RandomState(0).random_sample((3, 8))
    together = fast.generate(model, prompts, 1, 8, {0}, 1.0, noise, values=values)
    for k in range(3):
        with torch.no_grad():
            v.copy_(values[k])
        alone = grpo.generate(model, prompts[k:k + 1], 1, 8, {0}, 1.0, noise[k:k + 1])
        assert alone.ids[0][alone.mask[0]].tolist() == together.ids[k][together.mask[k]].tolist()


def test_lora_of_a_wrong_rank_leaves_one_line():
    with pytest.raises(InputError, match="--rank 17 does not fit"):
        lora.adapt(tiny(), rank=17)
