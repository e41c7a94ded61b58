"""Workers of the CPU path: every row once, equal results for any number, the caller's threads unchanged."""

import os
import signal
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from loss import nt_xent
from loss.cpu.workers import Workers


@pytest.fixture(autouse=True)
def not_in_one_pass(monkeypatch):
    monkeypatch.setattr("loss.cpu.one_pass.MAX_ROWS", 0)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 40])
@pytest.mark.parametrize("rows", [2, 63, 129, 1000, 4096])
def test_every_row_goes_to_one_worker_and_triangles_are_balanced(count, rows):
    workers = Workers(count)
    shares = workers.map_bands(lambda bands: torch.cat([torch.arange(rows)[band] for band in bands]), rows, 384)
    assert torch.equal(torch.cat(shares).sort().values, torch.arange(rows))
    if rows == 4096 and workers.count <= 5:
        pairs = torch.stack([(rows - share).sum() for share in shares]).double()
        assert pairs.max() < 1.1 * pairs.mean()


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_workers_matches_the_reference(threads, count):
    threads(count)
    z = torch.randn(1030, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (truth,) = torch.autograd.grad(nt_xent(z, 0.1, impl="reference"), z)
    (actual,) = torch.autograd.grad(nt_xent(z, 0.1, impl="blockwise"), z)
    torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-14)
    assert torch.get_num_threads() == count


def test_concurrent_callers_do_not_interfere(threads):
    threads(2)
    batches = [torch.randn(600, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    expected = [nt_xent(z, 0.1) for z in batches]
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(2,)) as callers:
        assert all(map(torch.equal, callers.map(lambda z: nt_xent(z, 0.1), batches), expected))


def test_threads_started_later_inherit_the_callers_number(threads):
    threads(3)
    nt_xent(torch.randn(300, 8), 0.1)
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == 3
    assert torch.get_num_threads() == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_its_own_workers(threads):
    threads(2)
    z = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    expected = nt_xent(z, 0.1).item()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends a child that hangs, which fails the test
        os.write(write, struct.pack("d", nt_xent(z, 0.1).item()))
        os._exit(0)
    os.close(write)
    assert struct.unpack("d", os.read(read, 8)) == (expected,)
    assert os.waitpid(child, 0)[1] == 0


def test_a_thread_that_outlives_the_main_thread_keeps_working(threads, monkeypatch):
    threads(3)
    z = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    expected = nt_xent(z, 0.1)
    monkeypatch.setattr("concurrent.futures.thread._shutdown", True)  # set by Python when the main thread ends
    assert torch.equal(nt_xent(z, 0.1), expected)


def test_a_failed_thread_start_leaves_no_thread_waiting(monkeypatch):
    start, started = threading.Thread.start, []

    def start_two(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_two)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        Workers(4)
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_an_error_in_a_band_reaches_the_caller():
    def fail(bands):
        raise RuntimeError("no such band")

    with pytest.raises(RuntimeError, match="no such band"):
        Workers(2).run(lambda workers: workers.map_bands(fail, 1000, 384))
