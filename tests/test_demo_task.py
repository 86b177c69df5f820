"""The demo's sentences: three sets that never overlap, as honest as the page says."""

import json

from minilora.demo.task import ACTIONS, NEW_VALUES, VALUES, Task, command, make_task, ordinary

TASK = make_task()


def phrasing_of(sentence: str, values: dict, phrasings: tuple[str, ...]) -> bool:
    return sentence in {phrasing.format(**values) for phrasing in phrasings}


def parts(pair: tuple[str, str]):
    sentence, answer = pair
    values = json.loads(answer)
    name = values.pop("action")
    action = next(action for action in ACTIONS if action.name == name)
    return sentence, values, action


def test_the_sets_have_the_sizes_asked_for_and_no_sentence_twice():
    task = make_task(train=60, unseen=20, new_phrasings=10)
    sentences = [sentence for pairs in (task.train, task.unseen, task.new_phrasings) for sentence, _ in pairs]
    assert [len(task.train), len(task.unseen), len(task.new_phrasings)] == [60, 20, 10]
    assert len(set(sentences)) == len(sentences)


def test_every_answer_is_json_with_the_slots_of_its_action():
    for pair in TASK.train + TASK.unseen + TASK.new_phrasings:
        _, values, action = parts(pair)
        assert tuple(values) == action.slots


def test_new_phrasings_are_in_no_other_set():
    for pair in TASK.train + TASK.unseen:
        sentence, values, action = parts(pair)
        assert phrasing_of(sentence, values, action.phrasings)
        assert not phrasing_of(sentence, values, action.new_phrasings)
    for pair in TASK.new_phrasings:
        sentence, values, action = parts(pair)
        assert phrasing_of(sentence, values, action.new_phrasings)
        assert not phrasing_of(sentence, values, action.phrasings)


def test_new_values_are_never_trained_on_and_stand_in_a_good_part_of_the_unseen_sentences():
    def has_new(pair) -> bool:
        _, values, _ = parts(pair)
        return any(value in NEW_VALUES[slot] and value not in VALUES[slot] for slot, value in values.items())

    assert not any(map(has_new, TASK.train))
    assert sum(map(has_new, TASK.unseen)) >= len(TASK.unseen) / 3


def test_every_action_is_asked_equally_often():
    for pairs in (TASK.train, TASK.unseen, TASK.new_phrasings):
        counts = {action.name: sum(json.loads(answer)["action"] == action.name for _, answer in pairs) for action in ACTIONS}
        assert max(counts.values()) - min(counts.values()) <= 1


def test_the_same_seed_draws_the_same_task_and_another_seed_another():
    assert make_task(seed=1) == make_task(seed=1)
    assert isinstance(TASK, Task)
    assert make_task(seed=1) != TASK


def test_commands_carry_the_system_prompt_and_ordinary_questions_do_not():
    assert [turn["role"] for turn in command("a", "b")["messages"]] == ["system", "user", "assistant"]
    assert [turn["role"] for turn in ordinary("a", "b")["messages"]] == ["user", "assistant"]
