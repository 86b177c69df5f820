"""Memory for what is forgotten soon: whose it is, that it grows and changes its dtype freely, and who can have it next."""

import platform
import subprocess
import sys
import threading

import pytest
import torch

from minilora.kernels.scratch import scratch, with_slack

CPU = torch.device("cpu")


def test_the_same_use_in_the_same_thread_gets_the_same_memory():
    first = scratch("test", 100, torch.float32, CPU)
    assert first.shape == (100,)
    again = scratch("test", 90, torch.bfloat16, CPU)
    assert (again.shape, again.dtype) == ((90,), torch.bfloat16)
    assert again.data_ptr() == first.data_ptr()
    assert scratch("another", 100, torch.float32, CPU).data_ptr() != first.data_ptr()


def test_it_grows_to_the_largest_that_was_asked_for():
    scratch("test", 10, torch.float64, CPU)
    large = scratch("test", 10**6, torch.float64, CPU)
    assert large.fill_(1.5).sum() == 1.5e6
    assert scratch("test", 10, torch.uint8, CPU).data_ptr() == large.data_ptr()


def test_every_thread_has_its_own():
    mine, theirs = scratch("test", 8, torch.int64, CPU).fill_(1), []
    thread = threading.Thread(target=lambda: theirs.append(scratch("test", 8, torch.int64, CPU).fill_(2)))
    thread.start()
    thread.join()
    assert mine.tolist() == [1] * 8
    assert theirs[0].tolist() == [2] * 8


def test_what_inference_mode_made_can_be_written_outside_of_it():
    with torch.inference_mode():
        scratch("inference", 4, torch.float32, CPU).zero_()
    assert not scratch("inference", 4, torch.float32, CPU).fill_(1).is_inference()


def test_other_devices_get_memory_of_the_moment():
    assert scratch("test", 3, torch.float32, torch.device("meta")).device.type == "meta"


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 700)])
def test_a_tensor_with_slack_is_one_like_any_other(shape):
    tensor = with_slack(torch.empty(shape, dtype=torch.float64))
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, torch.float64, True)
    assert tensor.untyped_storage().nbytes() <= 8 * (tensor.numel() * 257 / 256 + 64)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the law is of glibc's malloc")
@pytest.mark.parametrize("n", [7_000, 20_000, 25_001])
def test_what_stays_lies_where_a_tensor_with_slack_was(n):
    code = f"""
import torch
from minilora.kernels.scratch import with_slack

like, addresses, stay = torch.empty({n}), [], []
for _ in range(50):
    soon_freed = with_slack(like)
    stay.append(torch.empty({n}))
    addresses.append(stay[-1].data_ptr())
    del soon_freed
print((max(addresses) - min(addresses)) / (49 * {n} * 4))
"""
    taken = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert taken < 1.05  # with torch.empty for with_slack it was from 1.10 to 2.00
