import signal
import threading

import pytest
import torch
from helpers import examples, tiny_config, tiny_model

import minilora as lora
from minilora.training.checkpoint import find_checkpoints
from minilora.training.interruption import Interrupted, deferred_signals

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@BOTH
def test_the_first_signal_is_noted_and_the_handlers_are_as_before_it(number, capsys):
    before = handlers()
    with deferred_signals() as received:
        assert not received
        signal.raise_signal(number)
        assert received == [number]
        assert handlers() == before
    assert handlers() == before
    assert f"{signal.Signals(number).name}: the step ends and is saved first" in capsys.readouterr().err


def test_a_second_ctrl_c_ends_at_once():
    with deferred_signals() as received:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert received == [signal.SIGTERM]


def test_an_error_gives_the_handlers_back():
    before = handlers()
    with pytest.raises(ValueError, match="x"), deferred_signals():
        raise ValueError("x")
    assert handlers() == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with deferred_signals() as received:
            signal.raise_signal(signal.SIGINT)
        assert not received
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_than_the_main_one_leaves_signals_alone():
    found = []

    def look():
        with deferred_signals() as received:
            found.extend([handlers(), received])

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [handlers(), []]


def adapted(hook=None):
    torch.manual_seed(0)
    model = lora.inject(tiny_model(tiny_config()), lora.LoraConfig(r=2, lora_dropout=0.2))
    lora.mark_only_lora_as_trainable(model)
    if hook:
        model.register_forward_pre_hook(hook)
    return model


def on_forward(number: int, *signals):
    """A hook that raises signals in the given forward pass."""
    passes = []

    def hook(*_):
        passes.append(None)
        if len(passes) == number:
            for each in signals:
                signal.raise_signal(each)

    return hook


def train(model, folder, resume=False):
    config = lora.TrainConfig(learning_rate=1e-2, per_device_train_batch_size=2)
    return lora.train(model, examples(8), config, output_dir=folder, progress=False, resume=resume)


@BOTH
def test_an_interrupted_run_saves_its_step_and_goes_on_to_the_same_bits(tmp_path, number):
    whole, model = adapted(), adapted()
    train(whole, tmp_path / "whole")
    with pytest.raises(Interrupted, match=r"after step 3; .*checkpoint-3 holds .* --resume") as told:
        train(adapted(on_forward(3, number)), tmp_path / "run")
    assert told.value.signal == number
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    train(model, tmp_path / "run", resume=True)
    assert all(torch.equal(tensor, lora.lora_state_dict(whole)[name]) for name, tensor in lora.lora_state_dict(model).items())


def test_a_run_interrupted_twice_ends_in_the_middle_of_its_step(tmp_path):
    with pytest.raises(KeyboardInterrupt) as told:
        train(adapted(on_forward(3, signal.SIGINT, signal.SIGINT)), tmp_path)
    assert not isinstance(told.value, Interrupted)
    assert not find_checkpoints(tmp_path)


def test_a_run_that_writes_nothing_is_interrupted_as_any_program():
    with pytest.raises(KeyboardInterrupt) as told:
        train(adapted(on_forward(3, signal.SIGINT)), None)
    assert not isinstance(told.value, Interrupted)


def test_a_run_interrupted_in_its_last_step_is_done(tmp_path):
    assert train(adapted(on_forward(4, signal.SIGTERM)), tmp_path).steps == 4
    assert (tmp_path / "adapter").exists()
