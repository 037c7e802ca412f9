"""fast/head.py beside grpo.sample and autograd: the same draws, log-probs and gradients."""
import math

import numpy as np
import pytest
import torch

import grpo
from fast import head
from model import log_softmax


class Model:
    """What head.py reads of a model: a frozen table."""

    class config:
        tie_word_embeddings = True

    def __init__(self, W, vocab):
        self.embed_tokens = torch.nn.Embedding.from_pretrained(W)
        self.vocab = vocab


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    """Draws by blocks from short vocabularies, too."""
    monkeypatch.setattr(head, "LONG", 0)


def draws(rng, B, vocab, dtype, scale=3.0):
    logits = torch.tensor(rng.standard_normal((B, vocab)) * scale).to(dtype)
    return logits, torch.tensor(rng.random_sample(B))


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 1000, 5 * 256])
@pytest.mark.parametrize("temperature", [0, 0.3, 1.0, 1.7])
def test_draws_are_the_plain_ones(vocab, temperature):
    rng = np.random.RandomState(vocab)
    logits, uniform = draws(rng, 300, vocab, torch.float64)
    token, logp = head.sample(logits, temperature, uniform)
    want, want_logp = grpo.sample(logits, temperature, uniform)
    assert torch.equal(token, want)
    torch.testing.assert_close(logp, want_logp, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_in_low_precision(dtype):
    rng = np.random.RandomState(0)
    logits, uniform = draws(rng, 500, 3000, dtype)
    token, logp = head.sample(logits, 0.9, uniform)
    want, want_logp = grpo.sample(logits, 0.9, uniform)
    assert (token != want).sum() <= 1  # rounding moves the border between two tokens by 1e-7
    exact = log_softmax(logits, 0.9).gather(1, token[:, None])[:, 0]
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp, exact, rtol=0, atol=2e-5)


def test_tokens_without_probability_are_never_drawn():
    logits = torch.full((4000, 600), -math.inf, dtype=torch.float64)
    possible = torch.tensor([3, 255, 256, 599])
    logits[:, possible] = torch.tensor([0.0, -1.0, 1.0, 0.5], dtype=torch.float64)
    rng = np.random.RandomState(1)
    uniform = torch.tensor(rng.random_sample(4000))
    uniform[0] = 0.0
    uniform[1] = 1 - 2**-53
    token, logp = head.sample(logits, 1.0, uniform)
    assert set(token.tolist()) == set(possible.tolist())
    assert (token[0], token[1]) == (3, 599)
    assert logp.isfinite().all()
    share = (token[:, None] == possible).double().mean(0)
    want = logits[0, possible].softmax(0)
    assert (share - want).abs().max() < 0.03  # 4,000 draws: a standard error of 0.008 at most


def test_nan_and_infinity_stay_in_range_and_are_seen():
    for bad in (math.nan, math.inf):
        logits = torch.zeros(2, 300)
        logits[1, 7] = bad
        for temperature in (0, 1.0):
            token, logp = head.sample(logits, temperature, torch.tensor([0.5, 0.5]).double())
            assert ((0 <= token) & (token < 300)).all()
            assert logp[0].isfinite() and not logp[1].isfinite()


def test_no_rows():
    token, logp = head.sample(torch.zeros(0, 300), 1.0, torch.zeros(0).double())
    assert token.shape == logp.shape == (0,)


def test_pieces_change_nothing(monkeypatch):
    rng = np.random.RandomState(2)
    logits, uniform = draws(rng, 100, 700, torch.float32)
    whole = head.sample(logits, 1.0, uniform)
    monkeypatch.setattr(head, "SAMPLED", 7 * 4 * 700)
    for one, other in zip(whole, head.sample(logits, 1.0, uniform)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("vocab", [500, 512])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_gradient_is_autograds(vocab, temperature, monkeypatch):
    monkeypatch.setattr(head, "TRAINED", 9 * 4 * vocab)  # 9 rows a piece, the last of 5
    torch.manual_seed(0)
    model = Model(torch.randn(512, 24, dtype=torch.float64), vocab)
    hidden = torch.randn(50, 24, dtype=torch.float64)
    target = torch.randint(vocab, (50,))
    weight = torch.randn(50, dtype=torch.float64)

    ours = hidden.clone().requires_grad_()
    logp = head.token_logps(model, ours, target, temperature)
    (logp * weight).sum().backward()

    theirs = hidden.clone().requires_grad_()
    table = log_softmax(theirs @ model.embed_tokens.weight[:vocab].T, temperature)
    want = table.gather(1, target[:, None])[:, 0]
    (want * weight).sum().backward()
    torch.testing.assert_close(logp, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


def test_changed_mathematics_have_their_own_gradient(monkeypatch):
    """Nothing here knows the softmax's derivative: log_softmax may be changed in model.py."""
    def capped(logits, temperature):
        return (5 * (logits / temperature / 5).tanh()).log_softmax(-1)

    monkeypatch.setattr(head, "log_softmax", capped)
    torch.manual_seed(0)
    W = torch.randn(40, 8, dtype=torch.float64)
    hidden = torch.randn(6, 8, dtype=torch.float64)
    target = torch.randint(40, (6,))
    slopes = []
    for trained in (False, True):  # autograd's own, where the table is trained
        model = Model(W.clone(), 40)
        model.embed_tokens.weight.requires_grad_(trained)
        x = hidden.clone().requires_grad_()
        head.token_logps(model, x, target, 1.0).sum().backward()
        slopes.append(x.grad)
    torch.testing.assert_close(*slopes)


def test_a_token_that_is_almost_certain_keeps_its_gradient():
    """p - 1 is rounded to bf16, not p: what is left of 1 - p would be lost."""
    torch.manual_seed(0)
    W = torch.randn(300, 16)
    W[5] = 2.5
    model = Model(W.bfloat16(), 300)
    target = torch.tensor([5])
    slopes = []
    for trained in (False, True):  # autograd, where the table is trained
        model.embed_tokens.weight.requires_grad_(trained)
        x = torch.full((1, 16), 0.3).bfloat16().requires_grad_()
        logp = head.token_logps(model, x, target, 1.0)
        logp.sum().backward()
        assert 1e-4 < -logp.item() < 1e-2  # almost certain
        slopes.append(x.grad.double())
    ours, autograds = slopes
    assert (ours - autograds).norm() < 0.02 * autograds.norm()


def test_a_trained_table_gets_its_gradient_too():
    torch.manual_seed(0)
    model = Model(torch.randn(64, 8, dtype=torch.float64), 60)
    model.embed_tokens.weight.requires_grad_(True)
    hidden = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    target = torch.randint(60, (5,))
    head.token_logps(model, hidden, target, 1.0).sum().backward()
    got = model.embed_tokens.weight.grad.clone(), hidden.grad.clone()

    model.embed_tokens.weight.grad = None
    hidden.grad = None
    table = log_softmax(hidden @ model.embed_tokens.weight[:60].T, 1.0)
    table.gather(1, target[:, None]).sum().backward()
    torch.testing.assert_close(got[0], model.embed_tokens.weight.grad)
    torch.testing.assert_close(got[1], hidden.grad)
