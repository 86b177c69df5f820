"""The cache gives back what was put into it, column by column, and refuses more than it has room for."""

import pytest
import torch
from helpers import tiny_config

from minilora.phi3.cache import KVCache

CONFIG = tiny_config()  # 2 layers, 2 key heads of 8


def make_cache(capacity=5, batch=3, dtype=torch.float32):
    return KVCache(CONFIG, batch, capacity, dtype, torch.device("cpu"))


def keys_and_values(T, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, 3, 2, T, 8, generator=generator)  # (key or value, layer, B, Hkv, T, D)


def test_the_cache_gives_back_all_keys_and_values_in_order():
    cache, given = make_cache(), []
    for T in (2, 1, 2):
        given.append(keys_and_values(T, seed=len(given)))
        cache.extend(torch.ones(3, T, dtype=torch.long))
        for layer in range(2):
            keys, values = cache.update(layer, *given[-1][:, layer])
            so_far = torch.cat(given, dim=-2)[:, layer]
            assert torch.equal(keys, so_far[0])
            assert torch.equal(values, so_far[1])


def test_the_record_of_padding_and_documents_grows_with_the_columns():
    cache = make_cache()
    first, second = torch.tensor([[0, 1], [1, 2], [0, 0]]), torch.tensor([[1], [2], [0]])
    assert torch.equal(cache.extend(first), first)
    assert torch.equal(cache.extend(second), torch.cat([first, second], dim=1))
    assert cache.length == 3


def test_a_full_cache_refuses_one_more_token_and_stays_as_it_was():
    cache, k_and_v = make_cache(capacity=3), keys_and_values(3, seed=0)
    cache.extend(torch.ones(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"^the cache holds 3 tokens a sequence, and 4 were given$"):
        cache.extend(torch.ones(3, 2, dtype=torch.long))
    assert cache.length == 2
    assert cache.extend(torch.ones(3, 1, dtype=torch.long)).shape == (3, 3)
    assert torch.equal(cache.update(0, *k_and_v[:, 0])[0], k_and_v[0, 0])


def test_all_memory_is_taken_at_once_in_the_dtype_asked_for():
    cache = make_cache(capacity=7, dtype=torch.bfloat16)
    elements = 2 * 2 * 3 * 2 * 7 * 8  # 2 · layers · B · Hkv · T_max · D
    assert cache.keys.nbytes + cache.values.nbytes == 2 * elements


def test_a_cleared_cache_is_filled_anew():
    cache, k_and_v = make_cache(capacity=3), keys_and_values(3, seed=0)
    cache.extend(torch.full((3, 3), 2))
    cache.clear()
    assert torch.equal(cache.extend(torch.ones(3, 3, dtype=torch.long)), torch.ones(3, 3, dtype=torch.long))
    assert torch.equal(cache.update(1, *k_and_v[:, 1])[1], k_and_v[1, 1])
