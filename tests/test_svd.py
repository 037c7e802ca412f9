"""The truncated SVD of both engines: its signs, and weights of any size."""
import numpy as np
import pytest
import torch

import helpers  # noqa: F401 (it finds the project)

import tinylora
from fast import lanczos


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


SOLVERS = {"plain": tinylora.truncated_svd, "fast": lanczos.truncated_svd}


@pytest.mark.parametrize("shape", [(50, 30), (150, 300)])  # the fast one's full SVD, and Lanczos
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale,dtype", [
    (2.0**-100, torch.float32), (1e-20, torch.float32), (1e18, torch.float32),
    (1e35, torch.float32), (2.0**-60, torch.bfloat16), (2.0**100, torch.bfloat16),
    (2.0**-8, torch.float16), (2.0**12, torch.float16)])
def test_svd_at_absurd_scales(scale, dtype, solver, shape):
    """Solvers fail near fp32's limits: wrong factors with a residual of 0, an error, or "NaN"."""
    W = torch.from_numpy(np.random.RandomState(0).standard_normal(shape)).to(dtype)
    W[3] *= 2  # a direction that stands out
    W[5] *= 1.5
    U, S, V, _ = SOLVERS[solver](W, 2)
    U2, S2, V2, residual = SOLVERS[solver](W * scale, 2)
    exact = torch.linalg.svdvals(W.double())[:2]
    torch.testing.assert_close(S2.double() / scale, exact, atol=0, rtol=1e-4)
    torch.testing.assert_close(S.double(), exact, atol=0, rtol=1e-4)
    for x, y in ((U2, U), (V2, V)):
        torch.testing.assert_close(x, y, atol=1e-2, rtol=0)
        torch.testing.assert_close(x.T @ x, torch.eye(2), atol=1e-4, rtol=0)
    assert residual < 2e-4


@pytest.mark.parametrize("solver", SOLVERS)
def test_svd_of_subnormal_numbers(solver):
    """2**-149 is fp32's smallest: of such weights few digits are left, but the SVD is theirs."""
    W = torch.from_numpy(np.random.RandomState(0).standard_normal((150, 300))) * 2.0**-140
    W = W.float()
    U, S, V, _ = SOLVERS[solver](W, 2)
    exact = torch.linalg.svdvals(W.double() * 2.0**140)[:2]
    torch.testing.assert_close(S.double() * 2.0**140, exact, atol=0.01, rtol=1e-3)
    torch.testing.assert_close(V.T @ V, torch.eye(2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(30, 20), (150, 300)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_svd_of_zeros(solver, shape):
    """No NaN from a division by a norm of 0; neither where a single number is not 0."""
    W = torch.zeros(shape)
    for value in (0.0, 3.0):
        W[4, 5] = value
        U, S, V, _ = SOLVERS[solver](W, 2)
        torch.testing.assert_close(U * S @ V.T, W, atol=1e-6, rtol=0)
