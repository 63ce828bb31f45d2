"""The rolling cache beside a plain list of all frames: same keys, whatever was evicted, rewritten or kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmzoo.attention import allowed
from mmzoo.errors import InputError
from mmzoo.masks import rule
from mmzoo.rolling_cache import RollingKVCache, frames_layout


def content(frame: int, version: int, tokens: int) -> torch.Tensor:
    """[1, N, 1, 2]: what a frame's keys are in one pass."""
    return torch.tensor([[[[1000.0 * frame + 10 * version + n, 1.0]] for n in range(tokens)]])


def written(frames: range, version: int, tokens: int) -> torch.Tensor:
    return torch.cat([content(frame, version, tokens) for frame in frames], 1)


def held(cache: RollingKVCache, keys: torch.Tensor) -> dict[int, list[float]]:
    parts = keys[0, :, 0, 0].reshape(len(cache.frames), -1).tolist()
    return dict(zip(cache.frames, parts, strict=True))


@given(st.integers(0, 3), st.integers(1, 4), st.integers(0, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9))
def test_a_block_meets_the_keys_that_the_rule_names(
    sink_blocks: int, block: int, more: int, tokens: int, passes: int, blocks: int
) -> None:
    sink = sink_blocks * block
    window = sink + (1 + more) * block
    cache = RollingKVCache(1, window, sink=sink, tokens_per_frame=tokens)
    words = rule("sink-window", window=window, sink_frames=sink, frames_per_block=block)
    for number in range(blocks):
        frames = range(number * block, (number + 1) * block)
        for version in range(passes):
            cache.begin(frames)
            new = written(frames, version, tokens)
            keys, values = cache.update(0, new, -new)
        end = frames.stop
        seen = [f for f in range(end) if f < sink or f >= end - (window - sink)]
        assert sorted(cache.frames) == seen
        last = {f: content(f, passes - 1, tokens)[0, :, 0, 0].tolist() for f in seen}
        assert held(cache, keys) == last and torch.equal(values, -keys)
        assert cache.mask(words) is None, "a full block sees all that the cache still holds"
        whole = allowed(words, frames_layout(range(end)))[0, frames.start :]
        assert torch.equal(whole.any(0).nonzero()[:, 0], torch.tensor(seen))
    assert cache.nbytes == 2 * window * tokens * 2 * 4


def test_a_causal_block_has_a_mask_over_its_slots() -> None:
    cache = RollingKVCache(1, 5)
    for frames in (range(0, 3), range(3, 5), range(5, 7)):
        cache.begin(frames)
        cache.update(0, written(frames, 0, 1), written(frames, 0, 1))
    assert sorted(cache.frames) == [2, 3, 4, 5, 6]
    mask = cache.mask(rule("causal-temporal"))
    assert mask is not None
    assert mask.tolist() == [[frame <= own for frame in cache.frames] for own in (5, 6)]


def test_a_kept_sink_is_seen_in_place_of_the_blocks_own() -> None:
    cache = RollingKVCache(1, 6, sink=2, tokens_per_frame=2)
    for first in range(0, 10, 2):
        frames = range(first, first + 2)
        cache.begin(frames)
        cache.update(0, written(frames, 0, 2), written(frames, 0, 2))
    assert sorted(cache.frames) == [0, 1, 6, 7, 8, 9]
    again = range(4, 10)
    cache.begin(again, keep_sink=True)
    keys, _ = cache.update(0, written(again, 1, 2), written(again, 1, 2))
    found = held(cache, keys)
    assert {frame: values[0] % 1000 for frame, values in found.items()} == {0: 0, 1: 0, 6: 10, 7: 10, 8: 10, 9: 10}
    assert cache.ranks() == ([0, 1, *[sorted(cache.frames).index(f) for f in cache.frames[2:]]], [2, 2, 2, 3, 4, 5])
    cache.begin(range(0, 2), keep_sink=True)
    keys, _ = cache.update(0, written(range(0, 2), 2, 2), written(range(0, 2), 2, 2))
    assert held(cache, keys)[0][0] == 0


def test_after_a_reset_the_sink_begins_elsewhere() -> None:
    cache = RollingKVCache(1, 4, sink=1)
    for frame in range(6):
        cache.begin([frame])
        cache.update(0, content(frame, 0, 1), content(frame, 0, 1))
    cache.reset(first_frame=2)
    cache.begin(range(2, 6))
    cache.update(0, written(range(2, 6), 1, 1), written(range(2, 6), 1, 1))
    assert cache.layout.frame.tolist() == [[0, 1, 2, 3]]
    cache.begin([6])
    keys, _ = cache.update(0, content(6, 0, 1), content(6, 0, 1))
    assert sorted(cache.frames) == [2, 4, 5, 6] and held(cache, keys)[2] == [2010.0]


def test_of_a_block_larger_than_the_window_the_latest_are_held() -> None:
    cache = RollingKVCache(1, 3)
    cache.begin(range(5))
    keys, _ = cache.update(0, written(range(5), 0, 1), written(range(5), 0, 1))
    assert held(cache, keys) == {frame: [1000.0 * frame] for frame in (2, 3, 4)}


def test_a_state_is_of_a_cache_of_the_same_sizes() -> None:
    cache = RollingKVCache(1, 3)
    cache.begin(range(2))
    cache.update(0, *[torch.ones(1, 2, 1, 1)] * 2)
    RollingKVCache(1, 3).load_state_dict(cache.state_dict())
    for other in (
        RollingKVCache(1, 5),
        RollingKVCache(1, 3, sink=1),
        RollingKVCache(2, 3),
        RollingKVCache(1, 3, tokens_per_frame=2),
    ):
        with pytest.raises(InputError, match="of a cache with"):
            other.load_state_dict(cache.state_dict())


def test_what_is_held_is_not_dropped_for_another_batch_or_type() -> None:
    cache = RollingKVCache(1, 3)
    cache.begin(range(2))
    cache.update(0, *[torch.ones(1, 2, 1, 1)] * 2)
    cache.begin(range(2, 3))
    for other in (torch.ones(2, 1, 1, 1), torch.ones(1, 1, 1, 1).double()):
        with pytest.raises(InputError, match="reset"):
            cache.update(0, other, other)
    cache.reset()
    cache.begin(range(1))
    assert cache.update(0, *[torch.ones(2, 1, 1, 1)] * 2)[0].shape == (2, 1, 1, 1)


def test_a_window_needs_room_beside_its_sink() -> None:
    with pytest.raises(InputError, match="larger than its sink"):
        RollingKVCache(1, 3, sink=3)
