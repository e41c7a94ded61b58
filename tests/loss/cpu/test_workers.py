"""The workers of the CPU path: every row once, any number gives the same loss, the caller's threads are untouched."""

import os
import signal
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from loss import nt_xent
from loss.cpu.workers import Workers


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 40])
@pytest.mark.parametrize("rows", [2, 63, 129, 1000, 4096])
def test_every_row_goes_to_one_worker_in_equal_triangles(count, rows):
    workers = Workers(count)
    shares = workers.share_out(lambda bands: torch.cat([torch.arange(rows)[band] for band in bands]), rows, 384)
    assert torch.equal(torch.cat(shares).sort().values, torch.arange(rows))
    if rows == 4096 and workers.count <= 5:
        pairs = torch.stack([(rows - share).sum() for share in shares]).double()
        assert pairs.max() < 1.1 * pairs.mean()


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_workers_gives_the_float64_truth(threads, count):
    threads(count)
    z = torch.randn(1030, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (truth,) = torch.autograd.grad(nt_xent(z, 0.1, impl="reference"), z)
    (actual,) = torch.autograd.grad(nt_xent(z, 0.1, impl="blockwise"), z)
    torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-14)
    assert torch.get_num_threads() == count


def test_callers_at_the_same_time_do_not_disturb_each_other(threads):
    threads(2)
    batches = [torch.randn(600, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    expected = [nt_xent(z, 0.1) for z in batches]
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(2,)) as callers:
        assert all(map(torch.equal, callers.map(lambda z: nt_xent(z, 0.1), batches), expected))


def test_threads_that_start_later_keep_the_callers_number(threads):
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
        signal.alarm(60)  # a child that hangs fails the test
        os.write(write, struct.pack("d", nt_xent(z, 0.1).item()))
        os._exit(0)
    os.close(write)
    assert struct.unpack("d", os.read(read, 8)) == (expected,)
    assert os.waitpid(child, 0)[1] == 0


def test_a_thread_that_outlives_the_main_thread_goes_on(threads, monkeypatch):
    threads(3)
    z = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    expected = nt_xent(z, 0.1)
    monkeypatch.setattr(
        "concurrent.futures.thread._shutdown", True
    )  # as the interpreter does when the main thread ends
    assert torch.equal(nt_xent(z, 0.1), expected)


def test_where_no_thread_can_be_started_none_is_left_waiting(monkeypatch):
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
        Workers(2).run(lambda workers: workers.share_out(fail, 1000, 384))
