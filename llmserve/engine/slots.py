"""A model's slots: KV caches, what each holds and how it came there, and which one a prompt should take."""

from __future__ import annotations

from collections.abc import Sequence

from llmserve.engine.backend import Backend, Logits


class Slot:
    """One KV cache and the right to use it. Not thread-safe: the engine gives it to one thread at a time.

    It remembers the token ids it holds and how far they are on the grid. Scores depend, in their last bits, on whether
    a position was evaluated in a chunk that reached the next multiple of the backend's grid; `num_on_grid` leading
    positions were.
    """

    def __init__(self, backend: Backend, prefix_cache: bool = True) -> None:
        self.backend = backend
        self.token_ids: list[int] = []
        self.num_on_grid = 0
        self.last_used = 0.0
        self._prefix_cache = prefix_cache

    def num_reusable(self, prompt_ids: Sequence[int]) -> int:
        """How many leading tokens of the prompt need no prefill here; always less than all, for the last one gives the logits.

        Reuse gives the bits a fresh prefill would, so that greedy answers do not depend on what ran before. The one
        exception is a prompt that goes on where an answer ended (the next turn of a conversation): decoded positions
        are off the grid, and a grid's worth of them or more is not evaluated again.
        """
        if not self._prefix_cache:
            return 0
        num_common = min(common_prefix_length(self.token_ids, prompt_ids), len(prompt_ids) - 1)
        return num_reusable(num_common, self.num_on_grid, len(prompt_ids), self.backend.grid)

    def truncate(self, num_tokens: int) -> None:
        """Forget what is behind the first `num_tokens` positions."""
        del self.token_ids[num_tokens:]
        self.num_on_grid = min(self.num_on_grid, num_tokens)

    def forward(self, token_ids: Sequence[int], threads: int) -> Logits:
        """Evaluate `token_ids` behind what the slot holds; next-token scores as of `Backend.logits`.

        On an error of the library the slot forgets everything: nobody knows what its cache holds then.
        """
        position = len(self.token_ids)
        try:
            self.backend.forward(token_ids, position, threads)
        except Exception:
            self.truncate(0)
            raise
        self.token_ids.extend(token_ids)
        self.num_on_grid = advance_grid(self.num_on_grid, position, len(self.token_ids), self.backend.grid)
        return self.backend.logits()


def num_reusable(num_common: int, num_on_grid: int, num_prompt_tokens: int, grid: int) -> int:
    """How many of the `num_common` tokens that a prompt begins with need no prefill where a cache holds them, as `Slot` says."""
    num_full = num_prompt_tokens // grid * grid  # a fresh prefill has this many positions on the grid, the tail off it
    if num_common <= num_on_grid or num_full < num_on_grid:
        return min(num_common, num_full)
    if num_full == num_on_grid or num_common - num_on_grid >= grid:
        return num_common
    return num_on_grid


def round_up_to_grid(num_tokens: int, grid: int) -> int:
    return -(-num_tokens // grid) * grid


def advance_grid(num_on_grid: int, position: int, end: int, grid: int) -> int:
    """How many leading positions are on the grid when those from `position` to `end` were evaluated in one go."""
    return max(position, end // grid * grid) if num_on_grid == position else num_on_grid


def choose(idle: Sequence[Slot], prompt_ids: Sequence[int]) -> Slot:
    """The idle slot of which the prompt has most to gain, else the least recently used one."""
    return max(idle, key=lambda slot: (gain(slot.num_reusable(prompt_ids), len(slot.token_ids)), -slot.last_used))


def gain(num_reusable: int, num_held: int) -> int:
    """What it is worth to take a cache that holds `num_held` tokens, for a prompt that would reuse some of them.

    One of which less than half would be reused is left to whoever may come back for the rest: all chats of a model begin
    alike, with its template's first words.
    """
    return num_reusable if 2 * num_reusable >= num_held else 0


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """By bisection on slices, which compare at C speed. Both of one type or lists and tuples."""
    a, b = list(a), list(b)
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
