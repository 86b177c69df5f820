import math

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_config, tiny_model
from torch import nn

import minilora as lora
from minilora.data.encoding import Example


@pytest.fixture
def model():
    return tiny_model(tiny_config())


def unequal_examples() -> list[Example]:
    """Of unlike lengths and with unlike numbers of targets, so that a mean over batches is not the mean over tokens."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for length, targets in [(5, 1), (20, 19), (9, 2), (14, 1), (7, 6), (31, 3), (11, 10)]:
        ids = torch.randint(260, (length,), generator=generator).tolist()
        examples.append(Example(ids, [False] * (length - targets) + [True] * targets))
    return examples


def test_the_loss_is_the_mean_over_all_target_tokens(model):
    examples = unequal_examples()
    losses = []
    for example in examples:
        ids = torch.tensor(example.ids)
        each = F.cross_entropy(model(ids[None])[0, :-1], ids[1:], reduction="none")
        losses.append(each[torch.tensor(example.mask)[1:]])
    expected = torch.cat(losses)
    found = lora.evaluate(model, examples, batch_size=3, progress=False)
    assert found.loss == pytest.approx(expected.mean().item(), rel=1e-6)
    assert found.tokens == len(expected) == 42


def test_the_size_of_a_batch_does_not_change_the_loss(model):
    examples = unequal_examples()
    found = [lora.evaluate(model, examples, batch_size, progress=False) for batch_size in (1, 2, 3, 7, 100)]
    for other in found[1:]:
        assert other.loss == pytest.approx(found[0].loss, rel=1e-6)
        assert other.tokens == found[0].tokens


def test_the_order_of_the_examples_does_not_change_the_loss(model):
    examples = unequal_examples()
    forward, backward = (lora.evaluate(model, order, 2, progress=False) for order in (examples, examples[::-1]))
    assert forward.loss == pytest.approx(backward.loss, rel=1e-6)


def test_the_first_token_of_a_conversation_is_no_target(model):
    example = Example([1, 2, 3], [True, True, True])
    assert lora.evaluate(model, [example], progress=False).tokens == 2


def test_perplexity_is_the_exponential_of_the_loss(model):
    found = lora.evaluate(model, unequal_examples(), progress=False)
    assert found.perplexity == pytest.approx(math.exp(found.loss), rel=1e-12)
    assert found.perplexity > 1


class Hopeless(nn.Module):
    """A model whose loss is beyond what exp can take."""

    def __init__(self):
        super().__init__()
        self.loss = nn.Parameter(torch.tensor(1e6))

    def forward(self, input_ids, labels):
        return self.loss * 1


def test_the_perplexity_of_a_huge_loss_is_finite():
    found = lora.evaluate(Hopeless(), [Example([1, 2], [False, True])], progress=False)
    assert found.loss == 1e6
    assert math.isfinite(found.perplexity)


def test_evaluation_is_without_dropout_and_gradients(model):
    lora.inject(model, lora.LoraConfig(r=2, lora_dropout=0.5))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    differentiable = []
    model.register_forward_hook(lambda _model, _input, loss: differentiable.append(loss.requires_grad))
    examples = unequal_examples()
    found = [lora.evaluate(model.train(training), examples, progress=False) for training in (False, True, True)]
    assert found[0] == found[1] == found[2]
    assert differentiable == [False] * 3


@pytest.mark.parametrize("training", [True, False])
def test_the_model_comes_back_in_its_mode(model, training):
    lora.evaluate(model.train(training), unequal_examples(), progress=False)
    assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize("training", [True, False])
def test_the_model_comes_back_in_its_mode_when_evaluation_fails(model, training):
    nothing_to_learn = Example([1, 2, 3], [False, False, False])
    with pytest.raises(ValueError, match="a loss needs at least one target token"):
        lora.evaluate(model.train(training), [nothing_to_learn], progress=False)
    assert {module.training for module in model.modules()} == {training}


def test_no_example_is_refused(model):
    with pytest.raises(ValueError, match="evaluation needs at least one conversation"):
        lora.evaluate(model, [])
