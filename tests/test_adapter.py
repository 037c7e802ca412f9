"""tinylora.py beyond the spec's tests: bf16 models, LoRA-XS, the SVD's limits, moved files."""
import math
import os
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
from support.errors import InputError


def layers(model):
    return [m for m in model.modules() if isinstance(m, tinylora.TinyLoRALinear)]


def test_svd_signs_do_not_depend_on_the_solver():
    """An SVD leaves the sign of each pair (u, v) open: the entries of u must sum to a positive
    number. The weight is given in three ways that lead a solver to other signs."""
    W = torch.from_numpy(np.random.RandomState(0).standard_normal((50, 30))).float()
    U, S, V, _ = tinylora.truncated_svd(W, 3)
    assert (U.sum(0) > 0).all()
    torch.testing.assert_close(W @ V, U * S, atol=1e-4, rtol=0)
    for other, back in ((-W, -1), (W.flip(1), None)):
        U2, _, V2, _ = tinylora.truncated_svd(other, 3)
        torch.testing.assert_close(U2, U, atol=1e-4, rtol=0)
        torch.testing.assert_close(-V2 if back else V2.flip(0), V, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e18, 1e36])
def test_svd_at_absurd_scales(scale):
    """LAPACK's own scaling fails near fp32's limits: wrong factors, an error, or "NaN"."""
    W = torch.from_numpy(np.random.RandomState(0).standard_normal((50, 30))).float()
    _, S, V, _ = tinylora.truncated_svd(W, 2)
    _, S2, V2, _ = tinylora.truncated_svd(W * scale, 2)
    torch.testing.assert_close(S2 / scale, S, atol=0, rtol=1e-4)
    torch.testing.assert_close(V2, V, atol=1e-4, rtol=0)


def test_svd_of_zeros():
    """No NaN from a division by a norm of 0."""
    for x in tinylora.truncated_svd(torch.zeros(30, 20), 2):
        assert torch.as_tensor(x).isfinite().all()


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
    bases = set()
    for maker in ("here", "there"):
        for kept in ("fp32", "bf16"):
            exact, _ = rebuilt(maker, "float32", kept, "here")
            for base in ("float32", "bfloat16"):
                a, facts = rebuilt(maker, base, kept, "here")
                b, others = rebuilt(maker, base, kept, "there")
                assert facts["torch"] != others["torch"]  # or nothing was tested
                bases |= {facts["base"], others["base"]}
                assert torch.equal(a["P"], b["P"]) and torch.equal(a["v"], b["v"]) and a["v"].any()
                close = base == "float32"
                factors = 1e-4 if close else 0.01 * a["US"].abs().max().item()
                torch.testing.assert_close(a["US"], b["US"], atol=factors, rtol=0)
                for name in ("logits", "logp"):
                    bound = 1e-4 if close else (a[name] - exact[name]).abs().max().item()
                    torch.testing.assert_close(a[name], b[name], atol=bound, rtol=0)
    assert len(bases) == 1
