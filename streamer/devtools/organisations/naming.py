"""The naming schemes of one organisation: people, hosts, services, containers, files, operations, addresses.

Words are made of syllables drawn for the organisation, so that no two organisations share a vocabulary. Names that
incidents need come from the same functions as all others.
"""

from __future__ import annotations

from collections.abc import Sequence

from streamer.devtools.organisations.dice import Dice

_ONSETS = "b br c ch d dr f fl g gr h j k kl l m n p pl qu r s sh sk st t tr v w z".split()  # noqa: SIM905
_VOWELS = "a e i o u ai ea io ou".split()  # noqa: SIM905
_CODAS = ("", "", "", "l", "m", "n", "r", "s", "t", "x", "nd", "rt", "sk")
_READ = ("get", "list", "describe", "search", "read")
_CREATE = ("create", "add", "put", "start")
_UPDATE = ("update", "set", "modify", "patch")
_DELETE = ("delete", "remove", "stop", "purge")
VERBS = {1: _CREATE, 2: _READ, 3: _UPDATE, 4: _DELETE}
"""Verbs by `activity_id` of API Activity."""
EXTENSIONS = ("docx", "xlsx", "pdf", "csv", "txt", "pptx", "json", "md", "dwg", "jpg", "xml", "sql", "zip", "dat")


class Naming:
    """The schemes of one organisation. Words and containers are distinct; other names are so for distinct arguments."""

    def __init__(self, seed: int) -> None:
        dice = Dice("organisation", seed, "naming")
        self.seed = seed
        self._dice = dice
        self._onsets = dice.some(_ONSETS, 14)
        self._vowels = dice.some(_VOWELS, 5)
        self._codas = dice.some(_CODAS, 6)
        self._used: set[str] = set()
        self._topics: dict[str, list[str]] = {}
        self.name = self.word()
        self.suffix = dice.pick(("com", "org", "net", "io", "co", "eu", "de", "fr", "se", "info"))
        self.domain = f"{self.name}.{self.suffix}"
        self.directory = dice.pick((self.name.upper(), f"{self.name[:4].upper()}AD", f"corp-{self.name[:3]}", "CORP"))
        self.internal = dice.pick(
            (f"corp.{self.domain}", f"{self.name}.local", f"int.{self.domain}", f"ad.{self.name}")
        )
        self.accounts = dice.pick(("first.last", "flast", "last.f", "number", "firstl", "first_last"))
        self.desks = dice.pick(("serial", "site-number", "account", "random", "model-number"))
        self.servers = dice.pick(("role-nn", "site-role-nn", "word", "address", "env-role"))
        self.bots = dice.pick(("svc-x", "x-sa", "sa_x", "x.service", "SVC_X", "x"))
        self.pods = dice.pick(("replica", "counter", "id", "release"))
        self.files = dice.pick(("word-n", "Word Word vN", "date_word", "CODE-n", "word_hash"))
        self.calls = dice.pick(("Pascal", "dotted", "snake", "rest", "colon"))
        self.letter = dice.pick("uexkpz")
        self.extensions = dice.some(EXTENSIONS, 6)
        self.assets = dice.pick(("WS", "PC", "NB", "LT", "CL", "DT"))
        self.stage = dice.pick(("prd", "prod", "p", "live"))

    def word(self) -> str:
        """A word of two or three syllables that was not given before."""
        while True:
            parts = [
                self._dice.pick(self._onsets) + self._dice.pick(self._vowels) for _ in range(self._dice.whole(2, 3))
            ]
            made = "".join(parts) + self._dice.pick(self._codas)
            if made not in self._used and len(made) > 3:
                self._used.add(made)
                return made

    def topics(self, of: str) -> list[str]:
        """The words that files, records and paths of something are named with."""
        if of not in self._topics:
            self._topics[of] = [self.word() for _ in range(5)]
        return self._topics[of]

    def account(self, first: str, last: str, index: int) -> str:
        serial = "" if index < 400 else str(index)
        return {
            "first.last": f"{first}.{last}{serial}",
            "flast": f"{first[0]}{last}{serial}",
            "last.f": f"{last}.{first[0]}{serial}",
            "number": f"{self.letter}{31007 + index * 37:06}",
            "firstl": f"{first}{last[:2]}{serial}",
            "first_last": f"{first}_{last}{serial}",
        }[self.accounts]

    def desk(self, account: str, site: str, index: int, dice: Dice) -> str:
        return {
            "serial": f"{self.assets}-{dice.whole(100000, 999999)}",
            "site-number": f"{site[:3].upper()}{self.assets}{1000 + index:05}",
            "account": f"{account.replace('.', '-').replace('_', '-')}-{self.assets.lower()}",
            "random": "DESKTOP-" + "".join(dice.pick("ABCDEFGHJKLMNPQRSTUVWXYZ0123456789") for _ in range(7)),
            "model-number": f"{self.name[:3]}{self.assets.lower()}{index + 40:04}",
        }[self.desks]

    def server(self, role: str, site: str, number: int, ip: str) -> str:
        return {
            "role-nn": f"{role}{number:02}",
            "site-role-nn": f"{site[:3]}-{role}-{number:02}",
            "word": self.word(),
            "address": f"ip-{ip.replace('.', '-')}",
            "env-role": f"{self.stage}-{role}-{number}",
        }[self.servers]

    def bot(self, word: str) -> str:
        return {
            "svc-x": f"svc-{word}",
            "x-sa": f"{word}-sa",
            "sa_x": f"sa_{word}",
            "x.service": f"{word}.service",
            "SVC_X": f"SVC_{word.upper()}",
            "x": word,
        }[self.bots]

    def pod(self, service: str, release: int, number: int) -> str:
        """An instance of a service: its name changes with each release."""
        dice = Dice("organisation", self.seed, "pod", service, release, number)
        replica = Dice("organisation", self.seed, "pod", service, release).hex(9)
        return {
            "replica": f"{service}-{replica}-{dice.hex(5)}",
            "counter": f"{service}-{release}-{number}",
            "id": dice.hex(12),
            "release": f"{service}.r{140 + release}.{number}",
        }[self.pods]

    def file(self, topics: Sequence[str], dice: Dice, when: str) -> str:
        word, n = dice.skewed(topics), int(dice.random() ** 2 * 80)
        ending = self.extensions[sum(map(ord, word)) % len(self.extensions)]
        return {
            "word-n": f"{word}-{n}.{ending}",
            "Word Word vN": f"{word.title()} {dice.pick(topics).title()} v{n % 7}.{ending}",
            "date_word": f"{when}_{word}.{ending}",
            "CODE-n": f"{word[:3].upper()}-{1000 + n * 7}.{ending}",
            "word_hash": f"{word}_{dice.hex(6)}.{ending}",
        }[self.files]

    def operation(self, activity: int, noun: str, dice: Dice) -> str:
        verb = dice.pick(VERBS[activity])
        return {
            "Pascal": f"{verb.title()}{noun.title()}",
            "dotted": f"{noun}s.{verb}",
            "snake": f"{verb}_{noun}",
            "rest": f"{ {1: 'POST', 2: 'GET', 3: 'PUT', 4: 'DELETE'}[activity] } /v{1 + dice.below(3)}/{noun}s/{verb}",
            "colon": f"{noun}:{verb}",
        }[self.calls]
