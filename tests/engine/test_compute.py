import os
import threading

import pytest

from llmserve.engine.compute import ComputeBudget, Passes, StallGuard, count_free_cores


def start(budget, granted, number):
    thread = threading.Thread(target=lambda: granted.append((number, budget.acquire(budget.cores))), daemon=True)
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
        assert budget.acquire(budget.cores) == 8
        assert not budget.contended


@pytest.mark.parametrize(("cores", "expected"), [(2, [1, 1]), (3, [1, 2]), (4, [2, 2]), (8, [4, 4])])
def test_two_passes_divide_all_cores(cores, expected):
    budget = ComputeBudget(cores)
    with budget.share(), budget.share():
        assert budget.contended
        assert [budget.acquire(budget.cores), budget.acquire(budget.cores)] == expected


def test_more_passes_than_cores_wait_and_are_served_in_order():
    budget, granted = ComputeBudget(2), []
    with budget.share(), budget.share(), budget.share(), budget.share():
        first, second = budget.acquire(budget.cores), budget.acquire(budget.cores)
        assert (first, second) == (1, 1)
        assert budget.acquire(budget.cores) == 1  # one more than there are cores
        for number in range(3):
            start(budget, granted, number)
            wait_until(lambda n=number: len(budget._waiting) == n + 1)
        budget.release(1)
        wait_until(lambda: granted == [(0, 1)])
        budget.release(1)
        wait_until(lambda: granted == [(0, 1), (1, 1)])
        budget.release(1)
        wait_until(lambda: granted == [(0, 1), (1, 1), (2, 1)])


def test_threads_outnumber_the_cores_only_by_one_pass_of_one_thread_and_while_none_spins():
    budget, lock, running, seen = ComputeBudget(3), threading.Lock(), [], set()

    def passes():
        with budget.share():
            for _ in range(300):
                threads = budget.acquire(budget.cores)
                with lock:
                    running.append(threads)
                    seen.add(tuple(sorted(running)))
                with lock:
                    running.remove(threads)
                budget.release(threads)

    threads = [threading.Thread(target=passes) for _ in range(7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert all(sum(each) <= 3 or each == (1, 1, 1, 1) for each in seen)
    assert (running, budget._free, budget._num_sharers, budget._num_leases) == ([], 3, 0, 0)


def test_nothing_begins_beside_threads_that_spin():
    budget, granted = ComputeBudget(4), []
    with budget.share(), budget.share():
        assert [budget.acquire(4), budget.acquire(4)] == [2, 2]
        start(budget, granted, 0)
        wait_until(lambda: len(budget._waiting) == 1)
        budget.release(2)
        wait_until(lambda: granted == [(0, 2)])


def test_a_pass_that_wants_fewer_threads_leaves_the_cores_to_others():
    budget = ComputeBudget(4)
    with budget.share():
        assert [budget.acquire(1), budget.acquire(4)] == [1, 3]


def passes(guard, seconds, count, num_tokens=1):
    """Run passes that take `seconds(threads)`; the threads of each."""
    used = []
    for _ in range(count):
        used.append(guard.limit(num_tokens))
        guard.observe(num_tokens, used[-1], seconds(used[-1]), free_cores=guard._cores)
    return used


def test_a_new_model_is_measured_with_one_thread_and_then_gets_all():
    assert passes(StallGuard(4), lambda threads: 1 / threads, 6) == [1, 1, 1, 4, 4, 4]


def test_threads_that_stall_are_used_less_and_less():
    used = passes(StallGuard(2), lambda threads: 1.0 if threads == 1 else 10.0, 2000)
    assert used.count(2) <= 16
    assert used[3:6] == [2, 1, 1]


def test_all_threads_come_back_when_the_stall_is_over():
    guard = StallGuard(2)
    passes(guard, lambda threads: 1.0 if threads == 1 else 10.0, 1000)
    assert passes(guard, lambda threads: 1 / threads, 600)[-100:] == [2] * 100


def test_one_hiccup_costs_two_passes():
    guard = StallGuard(2)
    passes(guard, lambda threads: 1 / threads, 100)
    guard.observe(1, 2, 5.0, free_cores=2)
    assert passes(guard, lambda threads: 1 / threads, 4) == [1, 1, 2, 2]


def test_a_pass_that_grows_longer_with_the_context_is_no_stall():
    guard = StallGuard(2)
    length = iter(range(10_000))
    used = passes(guard, lambda threads: (1 + next(length) / 500) / threads, 5000)
    assert used.count(1) < 250


def test_many_cores_are_halved_until_it_helps():
    used = passes(StallGuard(8), lambda threads: 10.0 if threads > 2 else 1 / threads, 2000)
    assert used[3:6] == [8, 4, 2]
    assert used.count(2) > 1800


def test_cores_that_other_programs_keep_busy_are_left_to_them():
    guard = StallGuard(4)
    passes(guard, lambda threads: 1 / threads, 10)
    limits = []
    for free_cores in (4, 3, 4, 3, 3, 2, 2, -5, -5, 4):
        threads = guard.limit(1)
        guard.observe(1, threads, 1 / threads, free_cores)
        limits.append(guard.limit(1))
    assert limits == [4, 4, 4, 4, 3, 3, 2, 2, 1, 4]


def test_a_long_pass_is_judged_by_what_its_tokens_take_one_by_one_until_its_own_time_is_known():
    guard = StallGuard(2)
    assert passes(guard, lambda threads: 20.0, 1, num_tokens=32) == [2]  # nothing is known yet
    passes(guard, lambda threads: 1 / threads, 3)
    assert passes(guard, lambda threads: 20.0, 2, num_tokens=32) == [2, 2]
    assert passes(guard, lambda threads: 50.0, 1, num_tokens=32) == [2]
    assert passes(guard, lambda threads: 10.0, 2, num_tokens=32) == [1, 1]
    guard.observe(32, 1, 10.0, free_cores=2)
    assert passes(guard, lambda threads: 20.0 if threads == 2 else 10.0, 3, num_tokens=32) == [2, 1, 1]


def test_a_pass_that_fails_gives_its_cores_back_and_teaches_nothing():
    budget = ComputeBudget(2)
    leases = Passes(budget)
    with pytest.raises(RuntimeError), leases.lease(1):
        raise RuntimeError("no")
    assert budget.acquire(2) == 2
    budget.release(2)
    for _ in range(3):  # calibration has all its passes to go
        with budget.share(), leases.lease(1) as granted:
            assert granted == 1


def test_free_cores_are_those_of_the_machine_less_what_runs():
    assert count_free_cores(2) <= os.cpu_count()
