import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

import minilora as lora
from minilora.training.loraplus import parameter_groups


def rates(optimizer, model) -> dict[str, float]:
    """The learning rate of each trained parameter."""
    of = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    return {name: of[id(parameter)] for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_B_learns_faster_by_the_ratio_and_nothing_else_does():
    model = lora.inject(nn.Sequential(nn.Linear(4, 4)), lora.LoraConfig(r=2, bias="lora_only"))
    lora.mark_only_lora_as_trainable(model)
    groups = parameter_groups(model, 0.01, 16)
    assert rates(torch.optim.AdamW(groups), model) == {"0.lora_A": 0.01, "0.lora_B": 0.16, "0.bias": 0.01}


def test_the_rates_of_the_factors_are_pefts():
    ours = lora.inject(nn.Sequential(nn.Linear(4, 4)), lora.LoraConfig(r=2))
    lora.mark_only_lora_as_trainable(ours)
    found = rates(torch.optim.AdamW(parameter_groups(ours, 0.01, 16)), ours)
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(r=2, target_modules=["0"]))
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16)
    expected = rates(optimizer, theirs)
    for factor in ("lora_A", "lora_B"):
        assert found[f"0.{factor}"] == pytest.approx(next(rate for name, rate in expected.items() if factor in name))
