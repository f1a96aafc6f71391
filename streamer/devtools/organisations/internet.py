"""Places, providers and sites outside the organisation: where its people travel, and what it talks to.

An attacker's address is drawn as a traveller's is, and the site that an incident talks to as a new supplier's is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from streamer.devtools.organisations.dice import Dice
from streamer.devtools.organisations.naming import Naming

_COUNTRIES = "DE FR GB US NL PL SE ES IT BR IN JP SG ZA CA AU MX TR CZ AT CH DK FI NO RO UA KR ID NG EG CN RU".split()  # noqa: SIM905
_PRIVATE = {0, 10, 100, 127, 169, 172, 192, 198, 203}


@dataclass(frozen=True)
class Provider:
    """A network of a place: addresses begin with `prefix` (two octets)."""

    name: str
    number: int
    prefix: str

    def address(self, dice: Dice) -> str:
        return f"{self.prefix}.{dice.below(256)}.{dice.whole(1, 254)}"


@dataclass(frozen=True)
class Place:
    """A city with the providers whose addresses are located there. zone: hours ahead of UTC."""

    city: str
    country: str
    zone: int
    providers: tuple[Provider, ...]


@dataclass(frozen=True)
class Spot:
    """An address on the internet, with the place and the network that it belongs to."""

    ip: str
    place: Place
    provider: Provider

    def endpoint(self) -> dict[str, Any]:
        """An OCSF Network Endpoint with all that a product may know of it."""
        return {
            "ip": self.ip,
            "location": {"city": self.place.city, "country": self.place.country},
            "autonomous_system": {"number": self.provider.number, "name": self.provider.name},
        }


@dataclass(frozen=True)
class Site:
    """A site on the internet, by name and address."""

    name: str
    ip: str


class Internet:
    """The world of one organisation. Places, spots and sites that are drawn later are new ones."""

    def __init__(self, naming: Naming, dice: Dice) -> None:
        self._naming, self._suffixes = naming, dice.some(("com", "net", "org", "io", "dev", "app", "cloud", "co"), 5)
        self.countries = dice.some(_COUNTRIES, 12)
        self._forms = dice.some(
            ("{0}.{2}", "{0}-{1}.{2}", "{0}{1}.{2}", "www.{0}.{2}", "api.{0}.{2}", "{0}.{1}.{2}"), 4
        )
        self.sites = [self.site(dice) for _ in range(220)]
        self.edges = [self.site(dice) for _ in range(3)]

    def place(self, dice: Dice, country: str = "") -> Place:
        providers = tuple(
            Provider(f"{self._naming.word().title()} {dice.pick(('Telecom', 'Mobile', 'Networks', 'Hosting'))}",
                     dice.whole(2000, 64000), f"{_octet(dice)}.{dice.below(256)}")
            for _ in range(dice.whole(2, 4))
        )  # fmt: skip
        country = country or dice.pick(self.countries)
        return Place(self._naming.word().title(), country, dice.whole(-8, 10), providers)

    def spot(self, place: Place, dice: Dice) -> Spot:
        provider = dice.pick(place.providers)
        return Spot(provider.address(dice), place, provider)

    def site(self, dice: Dice) -> Site:
        naming = self._naming
        name = dice.pick(self._forms).format(naming.word(), naming.word(), dice.pick(self._suffixes))
        return Site(name, f"{_octet(dice)}.{dice.below(256)}.{dice.below(256)}.{dice.whole(1, 254)}")

    def visited(self, dice: Dice) -> Site:
        """A site that somebody browses to: a popular one, at times one of a content network's or a new one."""
        chance = dice.random()
        if chance < 0.06:
            edge = dice.pick(self.edges)
            return Site(f"{dice.hex(8)}.{edge.name}", edge.ip)
        if chance < 0.08:
            return self.site(dice)
        return dice.skewed(self.sites, 3.0)


def _octet(dice: Dice) -> int:
    while True:
        octet = dice.whole(2, 222)
        if octet not in _PRIVATE:
            return octet
