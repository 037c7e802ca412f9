"""support/threads.py: what is computed side by side on a CPU, and with how many threads."""
import threading

import pytest
import torch

from helpers import random_v, rollout, tiny
from test_fast_run import batch, gradient

import fast
import grpo
import tinylora
from fast import sampling, training
from support import ranks, threads
from support.errors import InputError


def test_map_keeps_order_and_starts_no_more_than_it_may():
    running = []
    most = []
    lock = threading.Lock()
    pause = threading.Event()

    def work(i):
        with lock:
            running.append(i)
            most.append(len(running))
        assert torch.is_grad_enabled() and torch.get_num_threads() == 1
        pause.wait(0.02 if i % 2 else 0.001)
        with lock:
            running.remove(i)
        return i * i
    assert list(threads.side_by_side(work, list(range(9)), 2)) == [i * i for i in range(9)]
    assert max(most) == 2


def test_an_error_ends_the_map():
    begun = []

    def work(i):
        begun.append(i)
        if i == 1:
            raise InputError("no")
        threading.Event().wait(0.01)
    with pytest.raises(InputError, match="no"):
        list(threads.side_by_side(work, list(range(50)), 2))
    assert len(begun) < 50


def test_the_rule_for_threads(monkeypatch):
    """Small models on a CPU: one thread inside torch, a worker a core; larger ones in two parts,
    on whatever machine; the largest whole. OMP_NUM_THREADS, which torch has read, counts for the
    cores: when it only set torch's threads, 2 of them were slower than none said."""
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)
    model = tiny()
    small, middle, large = ((10**9, 10**9), (10, 10**9), (10, 10))
    for given, device, size, cores, want in (
            (None, "cpu", small, 3, (1, 1, 3)), (None, "cpu", middle, 3, (4, 2, 2)),
            (None, "cpu", middle, 1, (4, 2, 1)), (None, "cpu", large, 3, (4, 1, 1)),
            (None, "cuda:0", small, 3, (4, 1, 1)), (None, "cuda:0", middle, 3, (4, 1, 1)),
            ("4", "cpu", small, 3, (1, 1, 4)), ("4", "cpu", middle, 1, (4, 2, 2)),
            ("1", "cpu", small, 3, (1, 1, 1)), ("1", "cpu", middle, 3, (1, 2, 1))):
        monkeypatch.setattr(threads, "SMALL", size[0])
        monkeypatch.setattr(threads, "LARGE", size[1])
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        torch.set_num_threads(int(given or 4))
        threads.choose_threads(model, device)
        assert (torch.get_num_threads(), threads.parts, threads.workers) == want
    monkeypatch.setattr(ranks, "sharded", True)  # their sums must come in one order
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads.choose_threads(model, "cpu")
    assert threads.workers == 1


def test_side_by_side_shares_out_torchs_threads():
    torch.set_num_threads(4)
    count = list(threads.side_by_side(lambda _: torch.get_num_threads(), [0, 1, 2, 3], 2))
    assert count == [2] * 4 and torch.get_num_threads() == 4


def test_a_rollout_in_parts_is_the_whole_one():
    """Other rows beside it change no row's text."""
    model = tiny(dtype=torch.float64)
    prompts = [[i + 1, i + 2][:1 + i % 2] for i in range(7)]
    want = rollout(model, prompts, group=3, engine=fast)
    for threads.parts, threads.workers in ((2, 1), (2, 2), (3, 2)):
        got = rollout(model, prompts, group=3, engine=fast)
        assert torch.equal(got.ids, want.ids) and torch.equal(got.mask, want.mask)
        assert got.prompts == want.prompts
        torch.testing.assert_close(got.logp, want.logp, rtol=1e-10, atol=1e-10)


def test_progress_tells_of_the_rows_of_all_parts():
    told = []
    report = sampling.added_up(lambda *what: told.append(what), 2)
    for part, tokens, ended in ((0, 8, 2), (1, 4, 1), (0, 16, 3)):
        report(part)(tokens, ended)
    assert told == [(0, 2), (4, 3), (4, 4)]
    assert sampling.added_up(None, 2)(0) is None


def test_parts_with_a_v_for_every_prompt():
    """R was computed by writing to the one v of the model, in two threads at once."""
    model = tiny(dtype=torch.float64)
    v = tinylora.adapt(model, 5)
    random_v(v, 0.05)
    kept = v.detach().clone()
    values = torch.randn(8, *v.shape, generator=torch.Generator().manual_seed(0)).to(v)
    prompts = [[i + 1, i + 2] for i in range(8)]
    want = rollout(model, prompts, group=1, engine=fast, values=values)
    for threads.parts, threads.workers in ((2, 1), (2, 2), (4, 4)):
        for _ in range(5):
            got = rollout(model, prompts, group=1, engine=fast, values=values)
            assert torch.equal(got.ids, want.ids) and torch.equal(v, kept)
            torch.testing.assert_close(got.logp, want.logp, rtol=1e-10, atol=1e-10)


def test_an_update_is_cut_into_parts(monkeypatch):
    model, v, data, args = batch()
    whole = gradient(model, v, data, args)
    sizes = []
    real = fast.logprobs

    def seen(model, part, recompute=False):
        sizes.append(len(part.prompts))
        return real(model, part, recompute)
    monkeypatch.setattr(fast, "logprobs", seen)
    monkeypatch.setattr(training, "FEW", 8)
    for threads.parts, count in ((1, 1), (2, 2)):
        sizes.clear()
        got = gradient(model, v, data, args)
        assert len(sizes) == count and sum(sizes) == 8  # the rows of groups that are not all equal
        torch.testing.assert_close(got, whole, rtol=1e-10, atol=0)


def test_sampling_that_is_not_waited_for_ends_early(monkeypatch):
    """After Ctrl-C the other part would go on to its last token before the program can stop."""
    model = tiny(dtype=torch.float64)
    threads.parts = 2
    threads.workers = 2
    real = sampling.sample_rows
    lengths = []
    begun = threading.Event()

    def part(model, held, prompts, *rest):
        if prompts == [[1]]:
            assert begun.wait(10)
            raise KeyboardInterrupt
        begun.set()
        found = real(model, held, prompts, *rest)
        lengths.append(found.ids.shape[1])
        return found
    monkeypatch.setattr(sampling, "sample_rows", part)
    with pytest.raises(KeyboardInterrupt):
        fast.generate(model, [[1], [2]], 1, 2000, [-1], 1.0,
                      grpo.uniforms([[0, i] for i in range(2)], 2000))
    assert len(lengths) == 1 and lengths[0] < 2000
    assert not threads.unwanted()
