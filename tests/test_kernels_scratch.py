"""Memory that a thread uses again: whose it is, and that it grows and changes its dtype freely."""

import threading

import torch

from minilora.kernels.scratch import scratch

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
