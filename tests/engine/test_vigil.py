"""What hangs is told from what waits: by the time that it could have used, not by the clock."""

import time
from contextlib import closing

import pytest

from benchmarks.harness import cpu_times, steal
from llmserve.engine.channel import Open
from llmserve.engine.process import EngineProcess
from llmserve.engine.tokenizer import Place
from llmserve.engine.vigil import LONG_SILENCE, SILENCE, Vigil, Waits
from llmserve.errors import EngineDied
from tests.hanging_process import HANGS

pytestmark = pytest.mark.slow

HANGS_SAYS = "its process does not answer"


class Watched:
    """A process that takes up time as it is told to, looked at ten times a second."""

    def __init__(self, *, tells=True):
        self.now, self.waited, self.stolen, self.disk, self.stopped, self.tells = 0.0, 0.0, 0.0, False, False, tells
        self.vigil = Vigil(self._waits, lambda pid: self.stopped, lambda: self.now)
        self.vigil.expect(SILENCE)

    def _waits(self, pid):
        return Waits({1: self.waited, 2: 0.0}, self.stolen, self.disk) if self.tells else None

    def pass_time(self, seconds, *, waiting=0.0, stolen=0.0, turn=0.1, alive=False):
        """Seconds of which the process waits a share for a core, and the host takes a share; what the last look said."""
        for _ in range(round(seconds / turn)):
            self.now += turn
            self.waited += waiting * turn
            self.stolen += stolen * turn
            if alive:
                self.vigil.note_life()
            if said := self.vigil.look(1):
                return said
        return ""


def test_a_silent_process_hangs_within_a_second():
    watched = Watched()
    assert watched.pass_time(10) == HANGS_SAYS
    assert SILENCE <= watched.now < 1.0


def test_one_that_lives_never_does():
    assert Watched().pass_time(100, alive=True) == ""


def test_life_between_begins_the_silence_anew():
    watched = Watched()
    for _ in range(5):
        assert watched.pass_time(SILENCE - 0.1) == ""
        watched.vigil.note_life()


@pytest.mark.parametrize("share", [{"waiting": 1.0}, {"stolen": 1.0}, {"waiting": 0.5, "stolen": 0.5}])
def test_one_that_gets_no_core_is_not_blamed(share):
    assert Watched().pass_time(100, **share) == ""


def test_one_that_waits_for_a_disk_is_not_blamed():
    watched = Watched()
    watched.disk = True
    assert watched.pass_time(100) == ""
    watched.disk = False
    assert watched.pass_time(1) == HANGS_SAYS


@pytest.mark.parametrize("share", [{"waiting": 0.5}, {"stolen": 0.5}])
def test_one_that_gets_a_core_half_the_time_is_given_twice_as_long(share):
    watched = Watched()
    assert watched.pass_time(10, **share) == HANGS_SAYS
    assert 1.5 * SILENCE <= watched.now <= 2 * SILENCE


def test_a_thread_that_is_new_counts_with_all_that_it_has_waited():
    assert Waits({1: 1.0, 2: 0.5}, 0.0).since(Waits({1: 0.9}, 0.0)) == 0.5


def test_a_watcher_that_gets_no_core_blames_nobody():
    watched = Watched()
    watched.now += 30.0
    assert watched.vigil.look(1) == ""
    assert watched.pass_time(0.3) == ""


def test_before_it_is_expected_to_speak_it_may_be_silent():
    watched = Watched()
    watched.vigil = Vigil(watched._waits, lambda pid: watched.stopped, lambda: watched.now)
    assert watched.pass_time(1000) == ""


def test_one_that_has_said_so_may_be_silent_for_longer():
    watched = Watched()
    watched.vigil.expect(LONG_SILENCE)
    assert watched.pass_time(LONG_SILENCE - 0.2) == ""
    assert watched.pass_time(1) == HANGS_SAYS


def test_where_nothing_tells_who_waits_it_may_be_silent_for_longer():
    watched = Watched(tells=False)
    assert watched.pass_time(LONG_SILENCE - 0.2) == ""
    assert watched.pass_time(1) == HANGS_SAYS


def test_one_that_is_stopped_is_given_up_after_some_looks():
    watched = Watched()
    watched.stopped = True
    assert watched.pass_time(10, alive=True) == "its process was stopped"
    assert watched.now < 0.5


@pytest.mark.parametrize("how", HANGS)
def test_a_process_that_never_lets_go_of_the_gil_is_killed(how):
    arguments = ["-m", "tests.hanging_process", how]
    with closing(EngineProcess("hangs", arguments, Open(None, 1, 30))) as process:
        process.opened()
        before, begun = cpu_times(), time.monotonic()
        with pytest.raises(EngineDied, match=HANGS_SAYS):
            process.tokenize([b"text"], Place.FIRST)
        seconds = time.monotonic() - begun
    assert seconds > SILENCE - 0.1  # the time of one look
    if steal(before, cpu_times()) < 0.05:
        assert seconds < 5.0  # a second of its own, on a machine that others use too
