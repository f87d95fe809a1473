import threading

import pytest

from llmserve.engine.compute import ComputeBudget


def start(budget, granted, number):
    thread = threading.Thread(target=lambda: granted.append((number, budget.acquire())), daemon=True)
    thread.start()
    return thread


def wait_until(condition, timeout=5.0):
    event = threading.Event()
    for _ in range(int(timeout / 0.005)):
        if condition():
            return
        event.wait(0.005)
    raise AssertionError("it did not happen")


def test_a_lone_pass_gets_every_core():
    budget = ComputeBudget(8)
    with budget.share():
        assert budget.acquire() == 8
        assert not budget.contended


@pytest.mark.parametrize(("cores", "expected"), [(2, [1, 1]), (3, [1, 2]), (4, [2, 2]), (8, [4, 4])])
def test_two_passes_divide_all_cores(cores, expected):
    budget = ComputeBudget(cores)
    with budget.share(), budget.share():
        assert budget.contended
        assert [budget.acquire(), budget.acquire()] == expected


def test_more_passes_than_cores_wait_and_are_served_in_order():
    budget, granted = ComputeBudget(2), []
    with budget.share(), budget.share(), budget.share(), budget.share():
        first, second = budget.acquire(), budget.acquire()
        assert (first, second) == (1, 1)
        for number in range(3):
            start(budget, granted, number)
            wait_until(lambda n=number: len(budget._waiting) == n + 1)
        budget.release(1)
        wait_until(lambda: granted == [(0, 1)])
        budget.release(1)
        wait_until(lambda: granted == [(0, 1), (1, 1)])
        budget.release(1)
        wait_until(lambda: granted == [(0, 1), (1, 1), (2, 1)])


def test_a_newcomer_does_not_overtake_those_who_wait():
    budget, granted = ComputeBudget(1), []
    budget.acquire()
    threads = [start(budget, granted, 0)]
    wait_until(lambda: len(budget._waiting) == 1)
    threads.append(start(budget, granted, 1))
    wait_until(lambda: len(budget._waiting) == 2)
    for _ in range(2):
        budget.release(1)
        wait_until(lambda: len(granted) == 2 or len(budget._waiting) == 1)
    wait_until(lambda: [number for number, _ in granted] == [0, 1])


def test_never_more_threads_than_cores_under_load():
    budget, lock, running, most = ComputeBudget(3), threading.Lock(), 0, 0

    def passes():
        nonlocal running, most
        with budget.share():
            for _ in range(300):
                threads = budget.acquire()
                with lock:
                    running += threads
                    most = max(most, running)
                with lock:
                    running -= threads
                budget.release(threads)

    threads = [threading.Thread(target=passes) for _ in range(7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert 0 < most <= 3
    assert (running, budget._free, budget._num_sharers, budget._num_leases) == (0, 3, 0, 0)
