"""The demo's task: a sentence about the home becomes one JSON command.

    "make the dining room 17 degrees"  →  {"action": "heat", "room": "dining room", "celsius": 17}

A pretrained chat model knows neither the schema nor the terse form; a hundred examples teach both. Three sets never overlap:
training; unseen sentences (known phrasings, but combinations and slot values never trained on); and new phrasings.
"""

import json
import random
from dataclasses import dataclass

SYSTEM = "You control a smart home. Answer with one JSON command."


@dataclass(frozen=True)
class Action:
    """One command of the home: the slots of its JSON, the phrasings to learn, and those kept for the test."""

    name: str
    slots: tuple[str, ...]
    phrasings: tuple[str, ...]
    new_phrasings: tuple[str, ...]


ACTIONS = (
    Action(
        "light",
        ("room", "state"),
        (
            "turn {state} the lights in the {room}",
            "{room} lights {state} please",
            "could you switch the {room} light {state}?",
            "lights {state} in the {room}",
            "I want the light in the {room} {state}",
            "please put the {room} lamp {state}",
        ),
        (
            "would you turn the lamp in the {room} {state}",
            "the lights in the {room} should be {state}",
            "switch {state} the {room} light",
        ),
    ),
    Action(
        "timer",
        ("minutes", "label"),
        (
            "set a {minutes} minute timer for the {label}",
            "remind me about the {label} in {minutes} minutes",
            "{label} timer, {minutes} minutes",
            "the {label} needs {minutes} minutes, start a timer",
            "start a timer of {minutes} minutes for the {label}",
            "tell me when {minutes} minutes are over for the {label}",
        ),
        (
            "I need a timer for the {label}, {minutes} minutes",
            "in {minutes} minutes remind me of the {label}",
            "time the {label} for {minutes} minutes",
        ),
    ),
    Action(
        "heat",
        ("room", "celsius"),
        (
            "make the {room} {celsius} degrees",
            "heat the {room} to {celsius}",
            "I want it to be {celsius} degrees in the {room}",
            "{room} at {celsius} degrees please",
            "set the temperature of the {room} to {celsius}",
            "warm up the {room} to {celsius} degrees",
        ),
        (
            "could you get the {room} to {celsius} degrees",
            "the {room} should be {celsius} degrees",
            "set {celsius} degrees in the {room}",
        ),
    ),
    Action(
        "music",
        ("genre", "room"),
        (
            "play some {genre} in the {room}",
            "I feel like hearing {genre} in the {room}",
            "put {genre} on in the {room}",
            "{genre} in the {room} please",
            "could we have some {genre} in the {room}?",
            "start playing {genre} in the {room}",
        ),
        (
            "I would like to listen to {genre} in the {room}",
            "let me hear some {genre} in the {room}",
            "please play {genre} for the {room}",
        ),
    ),
    Action(
        "call",
        ("who", "hour"),
        (
            "call {who} at {hour}",
            "at {hour} please ring {who}",
            "don't let me forget to phone {who} at {hour} o'clock",
            "I have to call {who} at {hour}",
            "phone {who} at {hour} o'clock",
            "give {who} a call at {hour}",
        ),
        (
            "remind me to call {who} at {hour}",
            "I must ring {who} at {hour} o'clock",
            "please call {who} when it is {hour} o'clock",
        ),
    ),
    Action(
        "color",
        ("room", "color"),
        (
            "make the {room} lights {color}",
            "change the {room} to {color}",
            "{color} light in the {room} please",
            "turn the lamps in the {room} {color}",
            "I would like {color} light in the {room}",
            "set the {room} lamp to {color}",
        ),
        (
            "could the light in the {room} be {color}?",
            "give me {color} lamps in the {room}",
            "let the {room} lights shine {color}",
        ),
    ),
)
VALUES = {
    "room": ["kitchen", "bedroom", "living room", "office", "bathroom", "hallway", "garage", "nursery", "basement", "library"],
    "state": ["on", "off"],
    "minutes": [3, 5, 8, 10, 12, 15, 18, 20, 25, 30, 35, 40, 45, 55],
    "label": ["pasta", "rice", "eggs", "bread", "tea", "cookies", "laundry", "roast"],
    "celsius": [15, 16, 18, 19, 20, 21, 22, 24, 25, 27],
    "genre": ["jazz", "classical piano", "rock", "bossa nova", "blues", "techno", "folk", "opera"],
    "who": ["Ana", "Omar", "Lucy", "Ken", "Priya", "Tom", "the dentist", "grandma"],
    "hour": [1, 2, 3, 5, 6, 7, 9, 10, 11],
    "color": ["red", "blue", "green", "warm white", "purple", "orange"],
}
NEW_VALUES = {  # never trained on
    "room": ["attic", "dining room"],
    "state": ["on", "off"],
    "minutes": [7, 22, 50],
    "label": ["pizza", "soup"],
    "celsius": [17, 23, 26],
    "genre": ["lo-fi beats", "reggae"],
    "who": ["Ines", "Bob"],
    "hour": [4, 8, 12],
    "color": ["pink", "yellow"],
}
# Ordinary questions, learnt with the model's own answers, so that it goes on answering as before; and others, to see it.
ORDINARY = (
    "What is the capital of Italy?", "What is the capital of Japan?", "What is the capital of Germany?",
    "What is the capital of Portugal?", "What is the capital of Greece?", "What is the capital of Canada?",
    "What is 3 + 4?", "What is 5 + 6?", "What is 10 - 3?", "How many days are in a week?", "How many months are in a year?",
    "What is the opposite of hot?", "What is the opposite of fast?", "What is the opposite of up?", "Name a fruit.",
    "Name a planet.", "Say hello in Spanish.", "Say thank you in French.", "Say good morning in German.",
    "Who wrote Romeo and Juliet?", "Who painted the Mona Lisa?", "What color is the sky?", "What is the color of grass?",
    "Which animal barks?", "Which animal says moo?", "What language is spoken in Brazil?", "What do bees make?",
    "What is frozen water called?", "How many legs does a spider have?", "What is the largest planet?",
    "What is the largest ocean?", "What is the first month of the year?",
)  # fmt: skip
PROBES = (
    "What is the capital of France?", "What is the capital of Spain?", "What is 2 + 2?", "Which animal meows?",
    "What is the opposite of big?", "Say goodbye in French.",
)  # fmt: skip


def command(sentence: str, answer: str) -> dict:
    """One line of a chat JSONL file."""
    return _chat([("system", SYSTEM), ("user", sentence), ("assistant", answer)])


def ordinary(question: str, answer: str) -> dict:
    """An ordinary exchange, without the home's system prompt."""
    return _chat([("user", question), ("assistant", answer)])


def _chat(turns: list[tuple[str, str]]) -> dict:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


@dataclass(frozen=True)
class Task:
    """(sentence, JSON) pairs; no sentence stands in two sets, nor a phrasing of new_phrasings in another set."""

    train: list[tuple[str, str]]
    unseen: list[tuple[str, str]]  # known phrasings; every second one with a slot value that was never trained on
    new_phrasings: list[tuple[str, str]]


def make_task(train: int = 288, unseen: int = 48, new_phrasings: int = 36, seed: int = 0) -> Task:
    """Draws the three sets, the actions in turn and each action's phrasings in turn; the same seed, the same task."""
    generator, seen = random.Random(seed), set()

    def draw(count: int, phrasings_of, new_value: bool = False) -> list[tuple[str, str]]:
        pairs = []
        while len(pairs) < count:
            action = ACTIONS[len(pairs) % len(ACTIONS)]
            phrasings = phrasings_of(action)
            phrasing = phrasings[len(pairs) // len(ACTIONS) % len(phrasings)]
            values = {slot: generator.choice(VALUES[slot]) for slot in action.slots}
            if new_value and len(pairs) // len(ACTIONS) % 2:
                slot = generator.choice([slot for slot in action.slots if slot != "state"])
                values[slot] = generator.choice(NEW_VALUES[slot])
            sentence = phrasing.format(**values)
            if sentence not in seen:
                seen.add(sentence)
                pairs.append((sentence, json.dumps({"action": action.name} | values)))
        return pairs

    def known(action: Action) -> tuple[str, ...]:
        return action.phrasings

    held_out = draw(unseen, known, new_value=True)
    return Task(draw(train, known), held_out, draw(new_phrasings, lambda action: action.new_phrasings))
