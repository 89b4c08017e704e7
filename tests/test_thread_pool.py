"""The thread pool: phases meet, every chunk is claimed once, failures come out."""

from __future__ import annotations

import threading

import pytest

from coreinfer._core import testing


@pytest.mark.parametrize("n_threads", [1, 2, 3, 8])
@pytest.mark.parametrize("n, chunk", [(0, 1), (1, 1), (1000, 7), (1000, 1000), (5, 64)])
def test_every_chunk_is_claimed_once_in_each_phase(n_threads, n, chunk):
    expected = sum(i * i for i in range(n))
    assert testing.pool_sums(n_threads, 50, n, chunk) == [expected] * 50


@pytest.mark.parametrize("n_threads", [1, 2, 3, 8])
@pytest.mark.parametrize("n, chunk", [(0, 1), (1, 1), (1000, 7), (100_000, 1)])
def test_shared_work_is_done_once_whoever_comes(n_threads, n, chunk):
    expected = sum(i * i for i in range(n))
    results = testing.pool_shared_sums(n_threads, 50, n, chunk)
    assert [total for total, _ in results] == [expected] * 50
    assert all(1 <= came <= n_threads for _, came in results)


def test_a_thread_that_is_not_there_is_not_waited_for():
    # More threads than any machine wakes for so little.
    assert any(came < 200 for _, came in testing.pool_shared_sums(200, 20, 1, 1))


@pytest.mark.parametrize("n_threads, thread", [(1, 0), (2, 0), (2, 1), (8, 5)])
def test_an_exception_comes_out_and_leaves_the_pool_usable(n_threads, thread):
    assert testing.pool_after_throw(n_threads, thread) == n_threads


def test_pools_work_side_by_side():
    results: list[list[int]] = []
    callers = [
        threading.Thread(target=lambda: results.append(testing.pool_sums(2, 200, 100, 3)))
        for _ in range(3)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert results == [[sum(i * i for i in range(100))] * 200] * 3


@pytest.mark.parametrize("n_threads", [0, -1, 100_000])
def test_senseless_thread_counts_are_refused(n_threads):
    with pytest.raises(ValueError, match="n_threads is"):
        testing.pool_sums(n_threads, 1, 1, 1)


def test_default_threads_fit_the_machine():
    import os

    assert 1 <= testing.default_threads() <= (os.cpu_count() or 1)
