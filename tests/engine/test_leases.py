"""Cores that processes lease: never more in use than there are, nobody is forgotten, and the dead give theirs back."""

import queue
import threading
import time

import pytest

from llmserve.engine.channel import Acquire, Return
from llmserve.engine.child import LeasedBudget
from llmserve.engine.compute import ComputeBudget

TIMEOUT = 10.0


class Process:
    """A `LeasedBudget` and the lease that it stands on; messages between them take a moment, as over a socket."""

    def __init__(self, budget):
        self.lease = budget.lease(
            lambda threads: self._post(self.budget.grant, threads), lambda: self._post(self.budget.recall)
        )
        self.budget = LeasedBudget(budget.cores, self)
        self.num_asked = 0
        self._messages = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def send(self, message):
        """The process's side of the channel."""
        self.num_asked += message == Acquire()
        self._post({Acquire: self.lease.request, Return: self.lease.give_back}[type(message)])

    def _post(self, action, *arguments):
        self._messages.put((action, arguments))

    def _run(self):
        while True:
            action, arguments = self._messages.get()
            action(*arguments)

    def settle(self):
        done = threading.Event()
        self._post(done.set)
        assert done.wait(TIMEOUT)


class Meter:
    """How many cores are in use at one moment, at most."""

    def __init__(self):
        self.lock, self.now, self.most = threading.Lock(), 0, 0

    def use(self, threads):
        with self.lock:
            self.now += threads
            self.most = max(self.most, self.now)

    def end(self, threads):
        with self.lock:
            self.now -= threads


def make_passes(budget, meter, count, seconds=0.0):
    for _ in range(count):
        threads = budget.acquire(budget.cores)
        meter.use(threads)
        time.sleep(seconds)
        meter.end(threads)
        budget.release(threads)


def run(*calls):
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive(), "somebody was forgotten"


def wait_until(condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_process_that_works_alone_asks_once_and_has_every_core():
    budget, meter = ComputeBudget(4), Meter()
    process = Process(budget)
    process.lease.share(active=True)
    make_passes(process.budget, meter, 50)
    assert (process.num_asked, meter.most) == (1, 4)


def test_an_idle_process_leaves_its_cores_to_whoever_comes():
    budget = ComputeBudget(2)
    process = Process(budget)
    process.lease.share(active=True)
    make_passes(process.budget, Meter(), 1)
    process.lease.share(active=False)
    with budget.share():
        threads = budget.acquire(2)
    assert threads == 2
    budget.release(threads)


def test_two_have_half_each_and_the_one_that_stays_has_all_again():
    budget, meter = ComputeBudget(4), Meter()
    processes = [Process(budget), Process(budget)]
    for process in processes:
        process.lease.share(active=True)
    run(*[lambda p=p: make_passes(p.budget, meter, 30, 0.001) for p in processes])
    assert meter.most <= 4
    processes[1].lease.share(active=False)
    for _ in range(3):
        make_passes(processes[0].budget, Meter(), 1)
        for process in (*processes, *processes):
            process.settle()
    alone = Meter()
    make_passes(processes[0].budget, alone, 1)
    assert alone.most == 4


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_more_workers_than_cores_use_one_more_at_most_and_all_come_to_their_end(cores):
    budget, meter = ComputeBudget(cores), Meter()
    processes = [Process(budget) for _ in range(3)]
    for process in processes:
        process.lease.share(active=True)

    def thread_of_the_server():
        with budget.share():
            make_passes(budget, meter, 40)

    workers = [lambda p=p: make_passes(p.budget, meter, 40) for p in processes for _ in range(2)]
    run(*workers, thread_of_the_server, thread_of_the_server)
    assert 1 <= meter.most <= (cores + 1 if cores > 1 else 1)  # one pass more, while none spins
    for process in processes:
        process.lease.close()
    assert (budget._free, budget._num_sharers, budget._num_leases) == (cores, 0, 0)


@pytest.mark.parametrize("state", ["in a pass", "waiting", "idle"])
def test_what_a_dead_process_had_comes_back(state):
    budget = ComputeBudget(2)
    process = Process(budget)
    process.lease.share(active=True)
    if state == "waiting":
        budget.acquire(2)
        threading.Thread(target=process.budget.acquire, args=(2,), daemon=True).start()
        wait_until(lambda: budget._waiting)
    else:
        threads = process.budget.acquire(2)
        if state == "idle":
            process.budget.release(threads)
    process.lease.close()
    if state == "waiting":
        budget.release(2)
    assert (budget._free, budget._num_sharers, list(budget._waiting), budget._leased) == (2, 0, [], [])
    process.lease.request()  # a message that was under way
    assert budget._free == 2
