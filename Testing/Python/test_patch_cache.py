import torch

from NMSWSegment.engine.patch_cache import PatchCache

PATCH_BYTES = 2 * 8 * 4


def patch(value: float) -> torch.Tensor:
    return torch.full((2, 2, 2, 2), float(value))


def filled(*indices: int, max_patches: int = 3) -> PatchCache:
    cache = PatchCache(max_bytes=max_patches * PATCH_BYTES)
    for index in indices:
        cache.put(index, patch(index), wanted=())
    return cache


def held(cache: PatchCache) -> list[int]:
    return [index for index in range(20) if index in cache]


def test_what_was_put_comes_back():
    cache = filled(4, 7)
    assert torch.equal(cache.get(7), patch(7)) and torch.equal(cache.get(4), patch(4))
    assert cache.get(5) is None and 5 not in cache


def test_full_cache_drops_what_was_not_used_for_the_longest_time():
    cache = filled(1, 2, 3)
    cache.get(1)
    cache.put(4, patch(4), wanted=())
    assert held(cache) == [1, 3, 4]
    assert cache.num_bytes == 3 * PATCH_BYTES


def test_wanted_patches_are_not_dropped_for_each_other():
    cache = filled(1, 2, 3)
    for index in (4, 5, 6):
        cache.put(index, patch(index), wanted=(2, 4, 5, 6))
    assert held(cache) == [2, 4, 5]


def test_patch_larger_than_the_cache_is_not_kept():
    cache = filled(1, max_patches=0)
    assert held(cache) == [] and cache.num_bytes == 0


def test_row_of_a_batch_does_not_keep_the_batch():
    cache = PatchCache(max_bytes=1000)
    cache.put(0, torch.zeros(4, 2, 2, 2, 2)[1], wanted=())
    assert cache.get(0).untyped_storage().nbytes() == PATCH_BYTES


def test_clear_forgets_everything():
    cache = filled(1, 2)
    cache.clear()
    assert held(cache) == [] and cache.num_bytes == 0
