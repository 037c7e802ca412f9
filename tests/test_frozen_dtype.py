"""python -m pytest -q tests/test_frozen_dtype.py

bf16 where it is faster: a laptop without bf16 units took 7 times fp32's time for the README's run.
"""
import pytest
import torch

from helpers import TOY, tiny, write_folder

import train
from support import frozen_dtype, ranks


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    write_folder(folder, tiny(hidden=512, mid=512))
    return str(folder)


def chosen(folder, *words):
    return train.flags(["--device=cpu", f"--model={folder}", *words]).dtype


def test_the_faster_one_is_taken(large, monkeypatch):
    for share, dtype in ((0.4, "bf16"), (0.79, "bf16"), (0.9, "fp32"), (7.0, "fp32")):
        monkeypatch.setattr(frozen_dtype, "share_of_fp32", lambda *_, share=share: share)
        assert chosen(large) == dtype
        assert chosen(large, "--eval-only") == dtype
        assert chosen(large, "--method=full") == "fp32"
        assert chosen(TOY) == "fp32"  # small
        for said in ("fp32", "bf16"):
            assert chosen(large, f"--dtype={said}") == said


def test_ranks_do_not_choose_apart(large, monkeypatch):
    monkeypatch.setattr(frozen_dtype, "share_of_fp32", lambda *_: 0.4)
    monkeypatch.setattr(ranks, "LAUNCHED", True)
    assert chosen(large) == "fp32"


def test_products_are_timed():
    """bf16 products made slower by hand, and faster: the share says which."""
    real = torch.nn.functional.linear
    for slow, bounds in ((torch.bfloat16, (2, 1e9)), (torch.float32, (0, 0.5))):
        def linear(x, W, slow=slow):
            for _ in range(40 if W.dtype == slow else 1):
                real(x, W)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(frozen_dtype.F, "linear", linear)
            frozen_dtype.share_of_fp32.cache_clear()
            low, high = bounds
            assert low < frozen_dtype.share_of_fp32(512, 512) < high
    frozen_dtype.share_of_fp32.cache_clear()
