"""tinylora.py beyond the spec's tests: bf16 models, LoRA-XS, the base model, moved files."""
import math
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers import ROOT, TOY, random_v, tiny

import model as transformer
import tinylora
from methods import lora
from support.checkpoint import same_base
from support.errors import InputError


def layers(model):
    return [m for m in model.modules() if isinstance(m, tinylora.TinyLoRALinear)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_damaged_weight_is_named(value):
    """NaN in a checkpoint must not become NaN factors without a word."""
    model = tiny()
    model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(InputError, match="layer 1, mlp.up_proj: .*NaN"):
        tinylora.adapt(model, 13)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="--rank 17"):  # k_proj is 16 x 32
        tinylora.adapt(tiny(), 13, rank=17)
    model = tiny()
    tinylora.adapt(model, 13)
    with pytest.raises(ValueError, match="already"):  # a second adapter on the first one's layers
        tinylora.adapt(model, 13)


@torch.no_grad()
def test_R_is_not_rounded_on_a_bf16_model():
    """Bug 14, in the forward pass: R must stay fp32, or a step of v that bf16 cannot express
    (1e-4 of 1) would not change the output."""
    model = tiny(dtype=torch.bfloat16)
    v = tinylora.adapt(model, 1)
    layer = model.layers[0].mlp.up_proj
    layer.base.weight.zero_()  # only U S R V^T x is left
    x = torch.from_numpy(np.random.RandomState(0).standard_normal((500, 32))).bfloat16()
    outputs = []
    rounded = []
    for value in (1.0, 1.0001):
        v.fill_(value)
        outputs.append(layer(x))
        rounded.append(layer.R().bfloat16())
    assert torch.equal(*rounded)
    assert 0.001 < (outputs[0] != outputs[1]).float().mean() < 0.5


def test_lora_xs_is_tinylora_with_R_free():
    """One R for each module, of r^2 numbers, and v is R itself: y = W x + U S R V^T x."""
    model = tiny()
    v = random_v(tinylora.adapt(model, rank=3, method="lora-xs"))
    assert v.shape == (14, 9)
    for i, layer in enumerate(layers(model)):
        U, S, V, _ = tinylora.truncated_svd(layer.base.weight, 3)
        x = torch.randn(4, len(V))
        change = U @ torch.diag(S) @ v[i].view(3, 3) @ V.T
        torch.testing.assert_close(layer(x), layer.base(x) + x @ change.T, atol=1e-4, rtol=1e-4)


def test_lora_xs_travels(tmp_path):
    """The file says which method made it; R's numbers come back in their places."""
    model = tiny()
    random_v(tinylora.adapt(model, rank=2, method="lora-xs"))
    tinylora.save(tmp_path / "a", layers(model)[0].v, model)
    other = tiny()
    tinylora.load(tmp_path / "a", other)
    assert other.adapter["method"] == "lora-xs"
    assert torch.equal(model(torch.arange(20)[None]), other(torch.arange(20)[None]))


def test_an_adapter_on_another_base_or_with_other_settings(tmp_path):
    """The error says what differs. A base model loaded in bf16 is still the same base model."""
    model = tiny()
    path = tmp_path / "a.safetensors"
    v = random_v(tinylora.adapt(model, 13))
    tinylora.save(path, v, model, name="owner/base")
    for settings, words in ((dict(rank=3), "rank is 2 in the file and 3 here"),
                            (dict(seed=1), "seed is 0 in the file and 1 here"),
                            (dict(params=14), "groups is 13 in the file and 14 here"),
                            (dict(tying="structured", params=7), "tie is tiled in the file")):
        other = tiny()
        tinylora.adapt(other, **{"params": 13} | settings)
        with pytest.raises(InputError, match=words):
            tinylora.load(path, other)
    for other in (tiny(seed=1), tiny(theta=1e6)):
        with pytest.raises(InputError, match="another base model.*owner/base"):
            tinylora.load(path, other)
    adapted = tiny()
    tinylora.adapt(adapted, 13)
    for other in (tiny(dtype=torch.bfloat16), adapted):
        assert torch.equal(tinylora.load(path, other), v)


def change_one(model, rng):
    """One bit pattern of one weight, in one place out of all, becomes another."""
    weights = dict(model.named_parameters())
    weight = weights[rng.choice(sorted(weights))].view(-1)
    at = rng.randint(len(weight))
    weight[at] = weight[at].nextafter(torch.tensor(9.0, dtype=weight.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_changed_weight_is_another_base(dtype, tmp_path):
    """The fingerprint looked at 64 values of each tensor. The error names the model."""
    v = tinylora.adapt(tiny(dtype=dtype), 13)
    model = tiny(dtype=dtype)
    tinylora.adapt(model, 13)
    tinylora.save(tmp_path / "a", v, model, name="owner/base")
    rng = np.random.RandomState(0)
    for _ in range(60):
        other = tiny(dtype=dtype)
        change_one(other, rng)
        with pytest.raises(InputError, match="another base model .owner/base.") as error:
            tinylora.load(tmp_path / "a", other)
        assert not {*tinylora.fingerprint(other).split(":")} & {*str(error.value).split()}


def test_old_fingerprints_are_compared_as_far_as_they_go(tmp_path):
    """A file that says no more than the first ones did loads, whatever its 64 values miss."""
    model = tiny()
    v = random_v(tinylora.adapt(model, 13))
    new = model.adapter["base"]
    assert [len(part) for part in new.split(":")] == [64, 64, 64]
    bf16 = tinylora.fingerprint(tiny(dtype=torch.bfloat16))
    assert bf16 == ":".join(new.split(":")[:2]) and same_base(bf16, new)
    assert not same_base(new, tinylora.fingerprint(tiny(seed=1)))
    model.adapter["base"] = new.split(":")[0]
    tinylora.save(tmp_path / "old", v, model)
    assert torch.equal(tinylora.load(tmp_path / "old", tiny()), v)
    model.adapter["base"] = "0" * 64
    tinylora.save(tmp_path / "old", v, model)
    with pytest.raises(InputError, match="another base model"):
        tinylora.load(tmp_path / "old", tiny())


def test_a_lora_knows_its_base_too(tmp_path):
    """It was put on any model of the right shape. One that PEFT made says nothing of its base."""
    model = tiny()
    lora.adapt(model, 2)
    lora.save(tmp_path / "lora", model, base="owner/base")
    lora.load(tmp_path / "lora", tiny())
    with pytest.raises(InputError, match="another base model .owner/base."):
        lora.load(tmp_path / "lora", tiny(seed=1))
    path = tmp_path / "lora" / "adapter_model.safetensors"
    save_file(load_file(path), path)
    lora.load(tmp_path / "lora", tiny(seed=1))


@pytest.mark.parametrize("words", [
    {"tying": "tile"}, {"method": "lora_xs"}, {"directions": "sideways"}])
def test_words_that_no_file_may_have(words):
    """Else they were trained and saved, and could not be loaded."""
    [said] = words.values()
    with pytest.raises(InputError, match=said):
        tinylora.adapt(tiny(), 14, **words)


@pytest.mark.parametrize("rank,u", [(16, 200_000), (2, 2**24)])
def test_a_file_that_asks_for_gigabytes(rank, u, tmp_path):
    """P has u x rank x rank numbers a module: 800 kB of zeros asked for 6.5 GB."""
    model = tiny()
    model.adapter = {"method": "tinylora", "rank": rank, "u": u, "tie": "tiled", "n_tie": 0,
                     "groups": 1, "seed": 0, "targets": ",".join(tinylora.TARGETS),
                     "base": tinylora.fingerprint(model)}
    tinylora.save(tmp_path / "a", torch.zeros(u), model, "bf16")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="random numbers"):
        tinylora.load(tmp_path / "a", tiny())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
    model = tiny()
    with pytest.raises(InputError, match="random numbers"):
        tinylora.adapt(model, 2**24, u=2**24)


def test_damaged_files_are_refused(tmp_path):
    model = tiny()
    path = tmp_path / "a.safetensors"
    tinylora.save(path, random_v(tinylora.adapt(model, 13)), model)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(InputError, match="cannot be read"):
        tinylora.load(path, tiny())
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="not a TinyLoRA adapter"):
        tinylora.load(path, tiny())
    with pytest.raises(InputError, match="no such file"):
        tinylora.load(tmp_path / "b", tiny())


def test_equal_adapters_are_equal_files(tmp_path):
    """safetensors writes the header in an order that changes from process to process."""
    code = ("import sys, model, tinylora; m = model.load('toy');"
            "tinylora.save(sys.argv[1], tinylora.adapt(m, 13), m, 'bf16', 'owner/base')")
    for seed in ("1", "2"):
        subprocess.run([sys.executable, "-c", code, tmp_path / seed], check=True, cwd=ROOT,
                       env=os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_adapter_travels_between_thread_counts(tmp_path):
    """Another thread count sums in another order: the same policy up to rounding. That is 2e-5 of
    the largest logit in fp32; in bf16, at most what bf16 itself is away from fp32."""
    model = transformer.load(TOY)
    v = random_v(tinylora.adapt(model, 13, seed=3), 0.5)
    tinylora.save(tmp_path / "a", v, model)
    code = ("import sys, torch, model, tinylora; from safetensors.torch import save_file\n"
            "logits = {}\n"
            "for name in ('float32', 'bfloat16'):\n"
            "    m = model.load('toy', getattr(torch, name)); tinylora.load(sys.argv[1], m)\n"
            "    logits[name] = m(torch.arange(40).view(2, 20)).float()\n"
            "save_file(logits, sys.argv[2])")
    found = []
    for threads in ("1", "2"):
        subprocess.run([sys.executable, "-c", code, tmp_path / "a", tmp_path / threads],
                       check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": threads})
        found.append(load_file(tmp_path / threads))
    one, two = found
    want = model(torch.arange(40).view(2, 20))
    bounds = {"float32": 2e-5 * want, "bfloat16": one["bfloat16"] - want}
    for name, bound in bounds.items():
        torch.testing.assert_close(one[name], two[name], atol=bound.abs().max().item(), rtol=0)


OTHER_PYTHON = os.environ.get("TINYLORA_OTHER_PYTHON")
REBUILD = """
import sys
import torch
from safetensors.torch import save_file
import model
import tinylora
sys.path.insert(0, "tests")
from helpers import random_v

phase, folder, me, other = sys.argv[1:]
for base in ("float32", "bfloat16"):
    for kept in ("fp32", "bf16"):
        for maker in (me,) if phase == "save" else (me, other):
            m = model.load("toy", getattr(torch, base))
            path = f"{folder}/{maker}-{base}-{kept}"
            if phase == "save":
                tinylora.save(path, random_v(tinylora.adapt(m, 13, seed=3), 0.5), m, kept)
                continue
            v = tinylora.load(path, m).detach().clone()
            layers = [x for x in m.modules() if isinstance(x, tinylora.TinyLoRALinear)]
            y = m(torch.arange(40).view(2, 20)).float().detach()
            tensors = {"v": v, "P": torch.stack([x.P for x in layers]), "logits": y,
                       "US": torch.cat([x.US.flatten() for x in layers]),
                       "logp": y.log_softmax(-1)}
            base_of = tinylora.read(path)[1]["base"]
            save_file(tensors, f"{path}.{me}", {"base": base_of, "torch": torch.__version__})
"""


@pytest.mark.skipif(not OTHER_PYTHON, reason="needs TINYLORA_OTHER_PYTHON, the python of an "
                                             "environment with another torch version")
def test_adapter_travels_between_torch_versions(tmp_path):
    """Saved under one torch, rebuilt under another, both ways: fingerprint, v and P to the bit,
    logits up to rounding (the bounds are those of the test above)."""
    for phase in ("save", "load"):
        for python, me, other in ((sys.executable, "here", "there"),
                                  (OTHER_PYTHON, "there", "here")):
            words = [python, "-c", REBUILD, phase, tmp_path, me, other]
            subprocess.run(words, check=True, cwd=ROOT)

    def rebuilt(maker, base, kept, by):
        path = tmp_path / f"{maker}-{base}-{kept}.{by}"
        with safe_open(path, "pt") as file:
            return load_file(path), file.metadata()
    bases = []
    for maker in ("here", "there"):
        for kept in ("fp32", "bf16"):
            exact, _ = rebuilt(maker, "float32", kept, "here")
            for base in ("float32", "bfloat16"):
                a, facts = rebuilt(maker, base, kept, "here")
                b, others = rebuilt(maker, base, kept, "there")
                assert facts["torch"] != others["torch"]  # or nothing was tested
                bases.append(facts["base"])
                bases.append(others["base"])
                assert torch.equal(a["P"], b["P"]) and torch.equal(a["v"], b["v"]) and a["v"].any()
                close = base == "float32"
                factors = 1e-4 if close else 0.01 * a["US"].abs().max().item()
                torch.testing.assert_close(a["US"], b["US"], atol=factors, rtol=0)
                for name in ("logits", "logp"):
                    bound = 1e-4 if close else (a[name] - exact[name]).abs().max().item()
                    torch.testing.assert_close(a[name], b[name], atol=bound, rtol=0)
    assert all(same_base(bases[0], base) for base in bases)


def test_an_adapter_does_not_go_onto_a_lora(tmp_path):
    """One line, though a LoRA has a setting, alpha, that the file lacks."""
    path = tmp_path / "adapter.safetensors"
    adapted = tiny()
    tinylora.save(path, tinylora.adapt(adapted), adapted)
    other = tiny()
    lora.adapt(other)
    with pytest.raises(InputError, match="does not fit this model.*alpha is None in the file"):
        tinylora.load(path, other)
