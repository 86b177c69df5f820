from functools import partial

import pytest
from helpers import tiny_config, tiny_model

import minilora as lora
from minilora import phi3
from minilora.data.conversations import Conversation
from minilora.training.questions import Sample, measure, told


def conversation(*texts: str) -> Conversation:
    roles = ["user", "assistant"] * len(texts)
    return Conversation([{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)], "here")


CONVERSATIONS = [conversation("one", "1"), conversation("two", "2", "and three?", "3"), conversation("four", "4", "thanks")]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_last_turn_of_the_assistant_is_asked_for_with_all_before_it(tiny_tokenizer, batch_size):
    model, tokenizer = tiny_model(tiny_config()), phi3.load_tokenizer(tiny_tokenizer)
    prompts = [conversation.messages[:turn] for conversation, turn in zip(CONVERSATIONS, (1, 3, 1), strict=True)]
    expected = [phi3.generate(model, tokenizer, prompt, max_new_tokens=6) for prompt in prompts]
    questions = lora.Questions(CONVERSATIONS, partial(phi3.generate_batch, tokenizer=tokenizer))
    samples = questions.ask(model, 6, batch_size, progress=False)
    assert [sample.answer for sample in samples] == expected
    assert any(expected)
    assert [(sample.question, sample.wanted) for sample in samples] == [("one", "1"), ("and three?", "3"), ("four", "4")]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_model_answers_in_eval_mode_and_comes_back_in_its_own(training, fails):
    model, modes = tiny_model(tiny_config()).train(training), []

    def generate(model, conversations, max_new_tokens):
        modes.append(model.training)
        if fails:
            raise ValueError("too long")
        return ["?"] * len(conversations)

    questions = lora.Questions(CONVERSATIONS, generate)
    if fails:
        with pytest.raises(ValueError, match="too long"):
            questions.ask(model, 6, progress=False)
    else:
        questions.ask(model, 6, progress=False)
    assert modes == [False]
    assert {module.training for module in model.modules()} == {training}


def test_metrics_are_of_the_answers_beside_those_wanted():
    samples = [Sample("one", "1", "1"), Sample("two", "2", "1")]
    assert measure(samples, ["exact_match"]) == {"eval_exact_match": 0.5}
    assert measure(samples, []) == {}
    assert told(samples)[1] == {"question": "two", "wanted": "2", "answer": "1"}
