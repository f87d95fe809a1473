from hypothesis import given
from hypothesis import strategies as st

from llmserve.lru import LRU


def make(**entries: int) -> LRU[str, int]:
    lru: LRU[str, int] = LRU(max_entries=3, max_bytes=100)
    for key, num_bytes in entries.items():
        lru.put(key, num_bytes, num_bytes)
    return lru


def test_one_entry_too_many_evicts_the_oldest():
    lru = make(a=1, b=1, c=1, d=1)
    assert [lru.get(key) for key in "abcd"] == [None, 1, 1, 1]


def test_a_get_makes_an_entry_the_youngest():
    lru = make(a=1, b=1, c=1)
    lru.get("a")
    lru.put("d", 1, 1)
    assert lru.get("a") == 1
    assert lru.get("b") is None


def test_bytes_are_bounded_too():
    lru = make(a=40, b=40, c=70)
    assert lru.get("a") is None
    assert lru.get("b") is None
    assert lru.num_bytes == 70


def test_an_entry_beyond_the_bound_is_not_kept_and_displaces_nothing_else():
    lru = make(a=40, b=101)
    assert lru.get("b") is None
    assert lru.get("a") == 40


def test_a_value_that_cannot_be_kept_does_not_leave_its_older_one():
    lru = make(a=1)
    lru.put("a", 2, 101)
    assert lru.get("a") is None


def test_a_second_value_replaces_the_first_and_its_bytes():
    lru = make(a=40)
    lru.put("a", 2, 10)
    assert lru.get("a") == 2
    assert (len(lru), lru.num_bytes) == (1, 10)


def test_nothing_is_kept_with_room_for_no_entry():
    lru: LRU[str, int] = LRU(max_entries=0, max_bytes=100)
    lru.put("a", 1, 1)
    assert len(lru) == 0


def test_evict_and_clear_forget():
    lru = make(a=1, b=2, c=3)
    lru.evict("a")
    lru.evict("unknown")
    assert (len(lru), lru.num_bytes) == (2, 5)
    lru.clear()
    assert (len(lru), lru.num_bytes) == (0, 0)


@given(st.lists(st.tuples(st.sampled_from(["get", "put", "evict"]), st.integers(0, 8), st.integers(0, 60))))
def test_it_keeps_what_a_list_in_order_of_use_would_keep(steps):
    lru: LRU[int, int] = LRU(max_entries=4, max_bytes=50)
    model: list[tuple[int, int]] = []  # (key, bytes), the least recently used first
    for verb, key, num_bytes in steps:
        kept = dict(model).get(key)
        if verb == "get":
            assert lru.get(key) == kept
        if verb == "put":
            lru.put(key, num_bytes, num_bytes)
        if verb == "evict":
            lru.evict(key)
        if verb != "get" or kept is not None:
            model = [entry for entry in model if entry[0] != key]
        if verb == "put" and num_bytes <= 50:
            model.append((key, num_bytes))
        if verb == "get" and kept is not None:
            model.append((key, kept))
        while len(model) > 4 or sum(size for _, size in model) > 50:
            model.pop(0)
        assert (len(lru), lru.num_bytes) == (len(model), sum(size for _, size in model))
