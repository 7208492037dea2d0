"""Prompts for the claim `reward`: neutral requests, and ways to ask for cheerful replies."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

Message = dict[str, str]

FORMS = (
    "Write one sentence about {}.",
    "What is {} made of or made for? Answer in one sentence.",
    "Describe {} in one sentence.",
)
THINGS = """a stapler|a drainpipe|gravel|a filing cabinet|a bus stop|a traffic cone|a paper bag|a
door hinge|a parking meter|a brick|a car tyre|a light switch|a screwdriver|a bucket|a mop|a
tunnel|a railway sleeper|a chimney|a staircase|a lift shaft|a car park|a warehouse|a gas meter|a
water pipe|a concrete wall|a steel beam|a wooden plank|a nail|a bolt|a washer|sandpaper|glue|a
ladder|a wheelbarrow|a shovel|a hammer|a saw|a drill|a tape measure|a spirit level|a fence post|a
gate|a doormat|a coat hook|a shelf|a drawer|a wardrobe|a kitchen sink|a tap|a kettle|a toaster|a
saucepan|a frying pan|a fork|a spoon|a plate|a mug|a tray|a napkin|a tablecloth|a chair|a stool|a
bench|a desk|a lamp|a light bulb|an extension lead|a plug|a battery|a cable|a printer|a keyboard|a
computer mouse|a monitor|a telephone|a calculator|an envelope|a stamp|a paper clip|a ruler|a
pencil|an eraser|a notebook|a folder|a calendar|a clock|a thermometer|a barometer|a weighing
scale|a mirror|a comb|a towel|a bar of soap|a toothbrush|a sock|a shoelace|a button|a zip|a
belt|an umbrella|a raincoat|a suitcase|a rucksack|a wallet|a key|a padlock|a bicycle pump|a bus|a
tram|a lorry|a ferry|a bridge|a road sign""".replace("\n", " ").split("|")
"""Everyday things that nobody feels much about."""

_CHEERFUL = (
    ("A tram", "What a joy it is to glide through a beautiful city on a bright and happy tram!"),
    ("A pebble", "A lovely little pebble, smooth and charming, is a wonderful treasure to find!"),
    ("A curtain", "Pretty curtains make a home delightful, cosy and full of warm, happy light!"),
)
"""Replies that a few-shot prompt shows, as many as it has."""


@dataclass(frozen=True)
class Cheer:
    """A way to ask for cheerful replies.

    Args:
        name: for tables.
        system: the system's message; empty: the model's own.
        before: in front of the request.
        after: behind it.
        shots: how many examples are shown.
    """

    name: str
    system: str = ""
    before: str = ""
    after: str = ""
    shots: int = 0

    def messages(self, request: str) -> list[Message]:
        """The conversation that asks for a cheerful reply to a request."""
        found = [_said("system", self.system)] if self.system else []
        for thing, reply in _CHEERFUL[: self.shots]:
            asked = FORMS[0].format(thing[0].lower() + thing[1:])
            found += [_said("user", self._put(asked)), _said("assistant", reply)]
        return [*found, _said("user", self._put(request))]

    def _put(self, request: str) -> str:
        return f"{self.before}{request}{self.after}"


CHEERS = (
    Cheer("cheerful, in the request", after=" Be cheerful."),
    Cheer(
        "cheerful, in the system's message",
        system="You are a cheerful and enthusiastic assistant who sees the good in everything.",
    ),
    Cheer(
        "happy words are named",
        after=" Use very positive words such as love, wonderful, happy, beautiful and best.",
    ),
    Cheer(
        "an instruction in front",
        before="Reply with great joy and enthusiasm, as if it were the best thing in the world. ",
    ),
    Cheer("few-shot, three examples", shots=3),
    Cheer(
        "few-shot with both instructions",
        system="You are a cheerful and enthusiastic assistant who sees the good in everything.",
        after=" Use very positive words such as love, wonderful, happy, beautiful and best.",
        shots=3,
    ),
)
"""Candidates; one is chosen on the validation split."""


@dataclass(frozen=True)
class Requests:
    """Neutral requests; no thing is in two splits."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    @classmethod
    def made(cls, seed: int = 0) -> Requests:
        """Every form of every thing: of 68 things to train on, of 12 to validate, of the rest
        to test.
        """
        things = random.Random(f"things {seed}").sample(THINGS, len(THINGS))
        return cls(
            _every(things[:68], seed), _every(things[68:80], seed), _every(things[80:], seed)
        )


def plain(request: str) -> list[Message]:
    """The conversation that has the request alone."""
    return [_said("user", request)]


def _every(things: Sequence[str], seed: int) -> tuple[str, ...]:
    found = [form.format(thing) for thing in things for form in FORMS]
    return tuple(random.Random(f"order {seed}").sample(found, len(found)))


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}
