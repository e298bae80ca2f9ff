"""Makes the demo's data: a shop's mail, and the record that each message should become.

    python examples/orders/make_data.py

writes ``train.jsonl`` and ``test.jsonl`` beside this file, the same bytes every time. The
messages are ``phrasings_train.txt`` and ``phrasings_test.txt`` with their gaps filled. No
phrasing and no order number of the test is in the training data, and half of the test's
messages are about things that training never names.

A row is ``{"prompt": message, "completion": record}``. The record is compact JSON:

    intent    buy, status, cancel, return, exchange, damaged, missing or invoice
    order     the order number, or null
    item      the thing in the singular, or null
    quantity  how many of it; null where no thing is named
    by        the day by which the customer needs it, or null
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

HERE = Path(__file__).parent
SEED = 7
NUM_TRAIN = 1320  # 5 of each phrasing
NUM_TEST = 160  # 2 of each phrasing
FIELDS = ("intent", "order", "item", "quantity", "by")

T = TypeVar("T")


def listed(text: str) -> list[str]:
    """What the commas of ``text`` separate."""
    return [part.strip() for part in text.split(",")]


#: everyday things whose plural is regular
ITEMS = listed("""
backpack, baking tray, bath towel, blanket, bottle opener, bowl, bread box, candle, cardigan,
chair, coat hook, coffee grinder, cooking pot, cup, cushion, cutting board, desk lamp,
dinner plate, door mat, flower pot, footstool, garden chair, hammock, hand mirror, hat, jacket,
jewellery box, kettle, lamp, laptop sleeve, lunch box, mug, notebook, paint brush, phone case,
picture frame, pillow, poster, rain coat, rug, salad bowl, serving tray, shopping bag,
shower curtain, side table, skirt, suitcase, sweater, table cloth, tea towel, teapot,
travel mug, umbrella, vase, wall clock, wallet, wash basket, water bottle, wine glass, yoga mat
""")
ITEMS_OF_TEST = listed("""
alarm clock, apron, bar stool, bird house, camping chair, dress, fruit basket, gift box,
handbag, letter opener, pencil case, sofa cover, soup spoon, spice rack, storage jar, tea strainer,
wooden bench
""")
KINDS = listed("red, blue, green, black, white, grey, yellow, brown, small, large")

NUMBERS = listed("zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve")
DAYS = listed("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
MONTHS = listed(
    "January, February, March, April, May, June, July, August, September, October, November, "
    "December"
)

#: the words that agree with one thing, and with several
AGREEING = listed("is, was, has, does, it, they, one")
ONE = dict(zip(AGREEING, listed("is, was, has, does, it, it, one"), strict=True))
SEVERAL = dict(zip(AGREEING, listed("are, were, have, do, them, they, ones"), strict=True))


@dataclass(frozen=True)
class Phrasing:
    """One way to say something: a message with gaps."""

    intent: str
    text: str

    @property
    def gaps(self) -> tuple[str, ...]:
        return tuple(re.findall(r"\{(\w+)\}", self.text))


def read_phrasings(path: Path) -> list[Phrasing]:
    """Reads ``[intent]`` headings and a phrasing a line; ``#`` starts a comment."""
    phrasings, intent = [], ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            intent = line.strip("[]")
        elif line and not line.startswith("#"):
            phrasings.append(Phrasing(intent, line))
    return phrasings


def make(num_train: int = NUM_TRAIN, num_test: int = NUM_TEST, seed: int = SEED) -> dict[str, list]:
    """The rows of both files, by their name without the ending."""
    used: set[str] = set()  # order numbers and messages: none occurs twice, in either file
    train = read_phrasings(HERE / "phrasings_train.txt")
    test = read_phrasings(HERE / "phrasings_test.txt")
    return {
        "train": list(rows(train, [ITEMS], num_train, random.Random(seed), used)),
        "test": list(rows(test, [ITEMS, ITEMS_OF_TEST], num_test, random.Random(seed + 1), used)),
    }


def rows(
    phrasings: Sequence[Phrasing],
    item_lists: Sequence[Sequence[str]],
    num: int,
    rng: random.Random,
    used: set[str],
) -> Iterator[dict[str, str]]:
    """``num`` rows in a shuffled order, phrasings and lists of items taken equally often.

    Args:
        used: order numbers and messages that are taken; it grows.
    """
    for i in _shuffled(rng, range(num)):
        phrasing = phrasings[i // len(item_lists) % len(phrasings)]
        while True:
            message, record = fill(phrasing, item_lists[i % len(item_lists)], rng, used)
            if message not in used:
                break
        used.add(message)
        completion = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
        yield {"prompt": message, "completion": completion}


def fill(
    phrasing: Phrasing, items: Sequence[str], rng: random.Random, used: set[str]
) -> tuple[str, dict[str, Any]]:
    """A message from a phrasing, and its record."""
    gaps = phrasing.gaps
    values: dict[str, str] = {"past": _past(rng)}
    record: dict[str, Any] = dict.fromkeys(FIELDS)
    record["intent"] = phrasing.intent
    if {"n", "a", "the", "my", "item"} & set(gaps):
        singular = {"a", "item"} & set(gaps)
        item = _pick(rng, items)
        if rng.random() < 0.5:
            item = f"{_pick(rng, KINDS)} {item}"
        count = 1 if singular else _count(rng, most_are_one="n" not in gaps)
        record["item"], record["quantity"] = item, count
        values |= _agreeing(rng, item, count)
    if "order" in gaps:
        record["order"] = values["order"] = _order_number(rng, used)
    for gap in ("by", "day"):
        if gap in gaps:
            record["by"] = values[gap] = _day(rng, or_tomorrow=gap == "by")
    return _in_haste(_filled(phrasing.text, values), rng), record


def _filled(text: str, values: dict[str, str]) -> str:
    """The text with its gaps filled; a value that begins a sentence gets a capital."""

    def value(gap: re.Match[str]) -> str:
        word = values[gap[2]]
        return word if gap[1] is None else gap[1] + word[0].upper() + word[1:]

    return re.sub(r"(^|[.!?] )?\{(\w+)\}", value, text)


def plural(item: str) -> str:
    """The regular plural: ``-es`` after a hiss, ``-s`` else."""
    return item + ("es" if item.endswith(("s", "x", "sh", "ch")) else "s")


def _agreeing(rng: random.Random, item: str, count: int) -> dict[str, str]:
    """What the gaps about the thing are filled with."""
    number = NUMBERS[count] if rng.random() < 0.5 else str(count)
    if count == 1:
        article = "an" if item[0] in "aeiou" else "a"
        words = {"a": f"{article} {item}", "item": item, "the": f"the {item}", "my": f"my {item}"}
        return {"n": f"{number} {item}", **words, **ONE}
    counted = f"{number} {plural(item)}"
    return {"n": counted, "the": f"the {counted}", "my": f"my {counted}", **SEVERAL}


def _count(rng: random.Random, *, most_are_one: bool) -> int:
    if rng.random() < (0.65 if most_are_one else 0.15):
        return 1
    return 2 + _below(rng, 4 if most_are_one else 11)


def _order_number(rng: random.Random, used: set[str]) -> str:
    while True:
        number = _pick(rng, "ABCDEFGHKLMNPRSTUWXZ") + "".join(str(_below(rng, 10)) for _ in "1234")
        if number not in used:
            used.add(number)
            return number


def _day(rng: random.Random, *, or_tomorrow: bool) -> str:
    if or_tomorrow and rng.random() < 0.1:
        return "tomorrow"
    return _pick(rng, DAYS) if rng.random() < 0.5 else _date(rng)


def _past(rng: random.Random) -> str:
    return _pick(
        rng,
        [
            "yesterday",
            "last week",
            f"last {_pick(rng, DAYS)}",
            f"on {_date(rng)}",
            f"{_pick(rng, NUMBERS[2:7])} weeks ago",
        ],
    )


def _date(rng: random.Random) -> str:
    return f"{1 + _below(rng, 28)} {_pick(rng, MONTHS)}"


def _in_haste(message: str, rng: random.Random) -> str:
    """Typed as people type: now and then no capital, no full stop, no apostrophe."""
    chance = rng.random()
    if chance < 0.1 and message[1].isalpha():  # an order number keeps its letter
        message = message[0].lower() + message[1:]
    if 0.05 < chance < 0.2:
        message = message.removesuffix(".")
    if chance > 0.9:
        message = message.replace("'", "")
    return message


# random.Random's own choice and shuffle may change between Pythons; random() never does


def _below(rng: random.Random, limit: int) -> int:
    return int(rng.random() * limit)


def _pick(rng: random.Random, values: Sequence[T]) -> T:
    return values[_below(rng, len(values))]


def _shuffled(rng: random.Random, values: Sequence[T]) -> list[T]:
    return [value for _, value in sorted((rng.random(), value) for value in values)]


def main() -> None:
    for name, made in make().items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
        (HERE / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")
        print(f"{name}.jsonl: {len(made)} rows")


if __name__ == "__main__":
    main()
