"""The demo data set: clients in families of related tasks, written by code from small grammars.

Every row is generated; no text of others is used. A family is a mapping that its tasks share
(symptom -> department, message -> desk, goods -> customs group), and each task words it in its own
way, so a party with 16 rows of its own can learn the rest of the mapping from its relatives.
`records`, which is learned alone, and `code-words`, like no other task, show whether those who have
nothing to gain are harmed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from fedmira.config import DataSettings
from fedmira.data.examples import Example, RawTask, Reading
from fedmira.data.sources.demo_words import (
    CITIES,
    DAYS,
    DEEDS,
    DEPARTMENTS,
    DESKS,
    GOODS,
    GROUP_OF,
    MONTHS,
    NAMES,
    OFFICES,
    PACKS,
    SHELVES,
    THINGS,
)
from fedmira.data.sources.grouping import sampled

__all__ = [
    "DEMO_TEST_ROWS",
    "DEMO_VALIDATION_ROWS",
    "Task",
    "demo_tasks",
    "pretraining_rows",
    "read",
]

DEMO_TEST_ROWS = 32
DEMO_VALIDATION_ROWS = 32
"""At most, beside the training rows, where data.validation_fraction says that they are wanted; two
small grammars (`clinic-south`, `bank-app`) have 4 and 2 inputs left."""

_MOST_REPEATED = 2000  # draws in a row that bring nothing new: the grammar has no more

Row = tuple[str, str]  # input, output


@dataclass(frozen=True, slots=True)
class Task:
    """A named task: its instruction, how a row is drawn, and its client's training rows.

    Attributes:
        name: the name of the task.
        instruction: what all rows of the task ask.
        draw: makes one row.
        rows: how many training rows its client has.
    """

    name: str
    instruction: str
    draw: Callable[[random.Random], Row]
    rows: int


def _label(
    table: dict[str, list[str]], wordings: Sequence[str], answer: str = "{}"
) -> Callable[[random.Random], Row]:
    def draw(rng: random.Random) -> Row:
        label = rng.choice(list(table))
        text = rng.choice(wordings).format(
            rng.choice(table[label]),
            name=rng.choice(NAMES),
            day=rng.choice(DAYS),
            city=rng.choice(CITIES),
        )
        return text, answer.format(label)

    return draw


def _shipment(answer: str, wording: str) -> Callable[[random.Random], Row]:
    def draw(rng: random.Random) -> Row:
        slots = {
            "number": str(rng.randint(2, 60)),
            "pack": rng.choice(PACKS),
            "goods": rng.choice(GOODS),
            "city": rng.choice(CITIES),
            "day": rng.choice(DAYS),
            "order": str(rng.randint(100, 999)),
            "name": rng.choice(NAMES),
        }
        slots["group"] = GROUP_OF[slots["goods"]]
        return wording.format(**slots), answer.format(**slots)

    return draw


def _person(answer: str, wording: str) -> Callable[[random.Random], Row]:
    def draw(rng: random.Random) -> Row:
        slots = {
            "name": rng.choice(NAMES),
            "age": str(rng.randint(18, 90)),
            "city": rng.choice(CITIES),
            "month": rng.choice(MONTHS),
            "day": rng.choice(DAYS),
        }
        return wording.format(**slots), answer.format(**slots)

    return draw


def _reply(answer: str, wording: str) -> Callable[[random.Random], Row]:
    def draw(rng: random.Random) -> Row:
        slots = {
            "deed": rng.choice(DEEDS),
            "thing": rng.choice(THINGS),
            "day": rng.choice(DAYS),
            "name": rng.choice(NAMES),
        }
        return wording.format(**slots), answer.format(**slots)

    return draw


def _code_words(rng: random.Random) -> Row:
    words = rng.sample(GOODS, 3)
    return " ".join(words), "-".join(word[0].upper() + str(len(word)) for word in words)


FAMILIES: dict[str, list[Task]] = {
    "triage": [
        Task(
            "clinic-north",
            "Read the patient note and name the department that should see the patient.",
            _label(
                DEPARTMENTS, ["Since {day} the patient has {}.", "{name} reports {} since {day}."]
            ),
            16,
        ),
        Task(
            "clinic-south",
            "Which hospital department is responsible for this complaint?",
            _label(DEPARTMENTS, ["Complaint: {}.", "The main complaint is {}."]),
            24,
        ),
        Task(
            "clinic-east",
            "Route the call to a department.",
            _label(DEPARTMENTS, ["Hello, this is {name} from {city}. I have had {} since {day}."]),
            48,
        ),
        Task(
            "clinic-west",
            "Choose the department for the referral letter.",
            _label(DEPARTMENTS, ["Dear colleague, {name} came to us with {}. Please advise."]),
            96,
        ),
    ],
    "banking": [
        Task(
            "bank-app",
            "Decide which desk of the bank answers the message.",
            _label(DESKS, ["Hi, {}.", "{}, please help."], "desk: {}"),
            16,
        ),
        Task(
            "bank-mail",
            "Sort the e-mail to a desk.",
            _label(DESKS, ["Dear bank, {}. Regards, {name}"], "desk: {}"),
            24,
        ),
        Task(
            "bank-phone",
            "Name the desk for this phone note.",
            _label(DESKS, ["Caller {name} from {city} says: {}."], "desk: {}"),
            48,
        ),
        Task(
            "bank-branch",
            "The branch noted a request. Which desk is it for?",
            _label(DESKS, ["Visit on {day}. Customer: {}."], "desk: {}"),
            96,
        ),
    ],
    "logistics": [
        Task(
            "depot-north",
            "Name the customs group of the goods and write how many pieces there are.",
            _shipment(
                "group={group}; pieces={number}",
                "Order {order}: {number} {pack} of {goods} for {city} on {day}.",
            ),
            16,
        ),
        Task(
            "depot-south",
            "Which customs group is it, and where does it go?",
            _shipment(
                "group={group}; city={city}",
                "On {day} {number} {pack} of {goods} leave for {city}.",
            ),
            24,
        ),
        Task(
            "depot-east",
            "Write the customs group of the shipment.",
            _shipment("group={group}", "{name} sends {number} {pack} of {goods} to {city}."),
            48,
        ),
        Task(
            "depot-west",
            "Write the customs group and the day.",
            _shipment(
                "group={group}; day={day}",
                "Please deliver {number} {pack} of {goods} to {city} by {day}.",
            ),
            96,
        ),
    ],
    "records": [
        Task(
            "registry-birth",
            "Turn the record into a sentence.",
            _person(
                "{name} was born in {month} and lives in {city}.",
                "name: {name} | born: {month} | city: {city}",
            ),
            16,
        ),
        Task(
            "registry-move",
            "Turn the record into a sentence.",
            _person(
                "{name} is {age} years old and lives in {city}.",
                "name: {name} | age: {age} | city: {city}",
            ),
            24,
        ),
        Task(
            "registry-visit",
            "Write the record as a sentence.",
            _person(
                "{name} from {city} visits on {day}.", "name: {name} | city: {city} | visit: {day}"
            ),
            48,
        ),
        Task(
            "registry-full",
            "Write one sentence for the record.",
            _person(
                "{name} is {age} years old, was born in {month} and lives in {city}.",
                "name: {name} | age: {age} | born: {month} | city: {city}",
            ),
            96,
        ),
    ],
    "requests": [
        Task(
            "office-mail",
            "Which office of the company takes care of the request?",
            _label(
                OFFICES, ["Could you look after {} by {day}?", "{name} asks about {}."], "office {}"
            ),
            16,
        ),
        Task(
            "office-desk",
            "Name the office that the visitor needs.",
            _label(
                OFFICES,
                ["A visitor from {city} comes because of {}.", "{name} is here about {}."],
                "office {}",
            ),
            24,
        ),
        Task(
            "office-phone",
            "Forward the call.",
            _label(
                OFFICES, ["Caller {name} from {city} on {day}: a question about {}."], "office {}"
            ),
            48,
        ),
        Task(
            "office-chat",
            "Tag the chat message with the office.",
            _label(
                OFFICES,
                [
                    "hi, {name} here, who can help me with {}?",
                    "is anybody working on {} this {day}?",
                ],
                "office {}",
            ),
            96,
        ),
    ],
    "outlier": [Task("code-words", "Write the code of the three words.", _code_words, 32)],
}

# Families that only the bundled base is trained on: like work with other tables and wordings.
PRETRAINING: list[Task] = [
    Task(
        "shop-shelf",
        "Name the part of the shop where the customer finds it.",
        _label(SHELVES, ["Where do I find {}?", "{name} is looking for {}."]),
        0,
    ),
    Task(
        "shop-note",
        "Sort the wish to a part of the shop.",
        _label(
            SHELVES, ["Customer from {city}: do you have {}?", "On {day} we need {}."], "shelf: {}"
        ),
        0,
    ),
    Task(
        "parcel-city",
        "Write the city of the parcel.",
        _shipment("{city}", "Parcel {order} with {goods} travels to {city}."),
        0,
    ),
    Task(
        "parcel-count",
        "How many are there?",
        _shipment("{number} {pack}", "{name} has {number} {pack} of {goods} in {city}."),
        0,
    ),
    Task(
        "parcel-day",
        "Write the day and the order.",
        _shipment("order={order}; day={day}", "Order {order} must arrive in {city} on {day}."),
        0,
    ),
    Task(
        "form-short",
        "Shorten the form.",
        _person("{name}, {city}", "name: {name} | age: {age} | city: {city}"),
        0,
    ),
    Task(
        "form-long",
        "Write the form for the person.",
        _person(
            "name: {name} | city: {city} | month: {month}",
            "{name} comes from {city} and arrives in {month}.",
        ),
        0,
    ),
    Task(
        "chat-thanks",
        "Thank the person.",
        _reply(
            "Thank you, {name}, for offering to {deed} {thing}.",
            "{name} offers to {deed} {thing} on {day}.",
        ),
        0,
    ),
    Task(
        "chat-when",
        "Say when it happens.",
        _reply("On {day}.", "We will {deed} {thing} on {day}."),
        0,
    ),
]


def demo_tasks(seed: int = 0, *, validation: bool = False) -> list[RawTask]:
    """The demo's tasks, with training rows and `DEMO_TEST_ROWS` test rows; no input stands in both.

    Args:
        seed: draws other rows of the same tasks.
        validation: whether `DEMO_VALIDATION_ROWS` further rows are set aside; the others stay.
    """
    more = DEMO_VALIDATION_ROWS if validation else 0
    return [
        RawTask(
            task.name,
            family,
            examples[: task.rows],
            examples[task.rows : task.rows + DEMO_TEST_ROWS],
            examples[task.rows + DEMO_TEST_ROWS :] if validation else None,
        )
        for family, tasks in FAMILIES.items()
        for task in tasks
        for examples in [list(_distinct(task, task.rows + DEMO_TEST_ROWS + more, seed))]
    ]


def read(settings: DataSettings, seed: int) -> Reading:
    """The demo's tasks as a source; `settings.path` plays no part.

    Args:
        settings: the [data] section.
        seed: the seed of the run.
    """
    tasks = demo_tasks(seed, validation=settings.validation_fraction > 0)
    return Reading(
        tuple(
            replace(task, examples=sampled(list(task.examples), task.name, settings, seed))
            for task in tasks
        )
    )


def _distinct(task: Task, count: int, seed: int) -> Iterator[Example]:
    """Rows of different inputs, so many or as many as the task's grammar has."""
    rng = random.Random(f"demo {seed} {task.name}")
    seen: set[str] = set()
    repeated = 0
    while len(seen) < count and repeated < _MOST_REPEATED:
        text, answer = task.draw(rng)
        repeated += 1
        if text not in seen:
            seen.add(text)
            repeated = 0
            yield Example(task.instruction, text, answer, where=f"demo:{task.name}#{len(seen)}")


def pretraining_rows(count: int, seed: int = 0) -> Iterator[tuple[str, Example]]:
    """Rows for the bundled base, of tasks that no demo client has, as (task name, example).

    Args:
        count: how many rows.
        seed: the seed of the run.
    """
    rng = random.Random(f"pretraining {seed}")
    for _ in range(count):
        task = rng.choice(PRETRAINING)
        text, answer = task.draw(rng)
        yield task.name, Example(task.instruction, text, answer)
