"""methods/agreement.py: its formula beside numpy's in fp64; what it does with noise and signal."""
import numpy as np
import pytest
import torch

import train
from methods import agreement
from support import resume
from support.errors import InputError

LR = 0.01


def policy(*shapes, agreeing=True):
    params = [torch.zeros(shape, requires_grad=True) for shape in shapes]
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=0.0)
    if agreeing:
        agreement.start(optimizer)
    return params, optimizer


def update(params, optimizer, gradients):
    """One update; returns its rate."""
    optimizer.param_groups[0]["lr"] = LR
    for p, gradient in zip(params, gradients):
        p.grad = torch.as_tensor(gradient, dtype=torch.float32)
    optimizer.step()
    return optimizer.param_groups[0]["lr"]


def expected(gradients):
    """The rates of the docstring's formula, in fp64. gradients: (updates, numbers)."""
    m = np.zeros(gradients.shape[1])
    q = np.zeros(gradients.shape[1])
    dots = []
    squares = []
    variances = []
    rates = []
    for i, g in enumerate(gradients):
        q = 0.999 * q + 0.001 * g**2
        scale = np.sqrt(q / (1 - 0.999 ** (i + 1))) + 1e-8
        if i:
            dots.append((1 - 0.9**i) * (g / scale) @ (m / scale))
            squares.append((m / scale) @ (m / scale))
            variances.append(((1 - 0.9**i) ** 2) * (g / scale) ** 2 @ (m / scale) ** 2)
            weights = 0.95 ** np.arange(i)[::-1]
            chance = 2 * np.sqrt(weights**2 @ variances)
            rates.append(LR * np.clip((weights @ dots - chance) / (weights @ squares), 0, 1))
        m = 0.9 * m + 0.1 * g
    return rates


@pytest.mark.parametrize("seed", range(3))
def test_rates_are_those_of_the_formula(seed):
    """Moments after the update in place of those before; means of one tensor alone."""
    rng = np.random.RandomState(seed)
    gradients = 1e-3 * (rng.standard_normal((40, 11)) + 0.5 * rng.standard_normal(11))
    params, optimizer = policy((2, 3), (5,))
    rates = [update(params, optimizer, (g[:6].reshape(2, 3), g[6:])) for g in gradients]
    assert rates[0] == 0
    np.testing.assert_allclose(rates[1:], expected(gradients), rtol=1e-4, atol=1e-9)
    assert 0 < max(rates[1:]) < LR


def test_equal_gradients_agree_wholly():
    """The steps are Adam's own, but for what may be chance: less with more numbers."""
    for count, least in ((4, 0.7), (10_000, 0.99)):
        params, optimizer = policy(count)
        gradient = [torch.tensor([1.0, -2.0, 1e-3, 50.0]).repeat(count // 4)]
        rates = [update(params, optimizer, gradient) for _ in range(40)]
        assert rates[0] == 0 and least * LR < rates[-1] < LR
        torch.testing.assert_close(params[0].detach(), -sum(rates) * gradient[0].sign())


def walk(agreeing, signal, seed):
    """How far v comes in 200 updates of noise with a mean of `signal`."""
    rng = np.random.RandomState(seed)
    (v,), optimizer = policy(800, agreeing=agreeing)
    for _ in range(200):
        update([v], optimizer, [rng.standard_normal(800) + signal])
    return v.detach().norm().item()


@pytest.mark.parametrize("seed", range(3))
def test_noise_moves_v_little_and_a_signal_moves_it(seed):
    assert walk(True, 0.0, seed) < 0.02 * walk(False, 0.0, seed)
    assert walk(True, 1.0, seed) > 0.8 * walk(False, 1.0, seed)
    assert walk(True, 0.15, seed) > 20 * walk(True, 0.0, seed)


def test_without_any_gradient_nothing_moves():
    """No signal in a whole step: 0 / 0."""
    params, optimizer = policy(3)
    assert [update(params, optimizer, [np.zeros(3)]) for _ in range(3)] == [0, 0, 0]
    assert not params[0].any()


def test_its_means_are_part_of_the_state(tmp_path):
    """The rate after --resume is the one that an undisturbed run has."""
    rng = np.random.RandomState(0)
    gradients = rng.standard_normal((6, 1, 50)) + 1.0
    here = policy(50)
    for gradient in gradients[:5]:
        update(*here, gradient)
    done = {"step": 5, "tokens": 0, "seconds": 0.0, "base": []}
    resume.save(tmp_path, done, *here, None)
    there = policy(50)
    assert resume.load(tmp_path, *there, None)["step"] == 5
    assert update(*there, gradients[5]) == update(*here, gradients[5]) > 0
    assert torch.equal(there[0][0], here[0][0])

    del here[1].state[here[0][0]]["square"]
    resume.save(tmp_path, done, *here, None)
    resume.save(tmp_path, done, *here, None)
    with pytest.raises(InputError, match="does not hold the trained numbers"):
        resume.load(tmp_path, *policy(50), None)


def test_on_the_command_line(capsys):
    assert train.flags([]).agreement is False
    assert train.flags(["--agreement", "--algo", "sft"]).agreement is True
    assert train.main(["--agreement", "--eval-only"]) == 2
    assert "--agreement means nothing to --eval-only" in capsys.readouterr().err
