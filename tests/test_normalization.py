"""The promises of the forms of values: templates, what is derived from them, and numbers, whatever JSON holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from encoder.features.normalization import (
    AGE,
    DERIVED,
    FOLDER,
    NETWORK,
    WORD,
    ages,
    derived,
    folder,
    is_address,
    normalise,
    number,
)
from encoder.ocsf.events import Column


@pytest.mark.parametrize(
    ("value", "path", "text"),
    [
        ("C:\\Users\\Ann\\a.EXE", "p", "c:\\users\\*\\a.exe"),
        ("/home/ann/x1", "p", "/home/*/x0"),
        ("pid 4711 of {0B5AD3F5-65AF-5F5D-6E00-000000000C00}", "p", "pid 0 of {}"),
        ("deadbeef1 and 0xdeadbeef1", "p", "# and #"),
        ("/srv/reports-b4e2bc.out", "p", "/srv/reports-#.out"),
        ("checkout-7d9f8b6c54-x2b7q", "container.pod_name", "checkout-#-#"),
        ("checkout-5f6585d649-fnmft", "device.hostname", "checkout-#-#"),
        ("checkout-5f6585d649-final", "device.hostname", "checkout-#-final"),
        ("checkout-https", "device.hostname", "checkout-https"),
        ("facade 123456 ab12f", "p", "facade 0 ab0f"),
        (443, "dst_endpoint.port", "443"),
        (49152, "dst_endpoint.port", "ephemeral"),
        (1.0, "p", "1"),
        (1.5, "p", "1.5"),
        (True, "p", "true"),
        (["b", "a", "b"], "p", "[a,b]"),
        ([], "p", "[]"),
    ],
)
def test_values_are_templated(value: Any, path: str, text: str) -> None:
    assert normalise(value, path) == text


@given(st.text(max_size=2000))
def test_templates_are_short_and_their_folder_is_a_part_of_them(text: str) -> None:
    template = normalise(text, "p")
    assert len(template) <= 200 and len(folder(template)) <= len(template)


@given(st.floats() | st.integers() | st.text(max_size=9) | st.booleans() | st.none())
def test_a_number_is_finite_or_none(value: Any) -> None:
    x = number(value)
    assert x is None or np.isfinite(x)


@pytest.mark.parametrize(
    ("text", "suffix", "parts"),
    [
        ("c:\\windows\\x.exe", FOLDER, ("c:/windows",)),
        ("x.exe", FOLDER, ("",)),
        ('"c:\\a b\\x.exe" -enc #== -enc', WORD, ("c", "a", "b", "x.exe", "-enc", "#")),
        ("get /a/b?c=d&e", WORD, ("get", "a", "b", "c", "d", "e")),
        ("...", WORD, ("...",)),
        ("", WORD, ("",)),
        ("10.1.2.3", NETWORK, ("10.1.0.0/16",)),
        ("2001:db8:1:2::3", NETWORK, ("2001:db8::/32",)),
        ("::ffff:10.1.2.3", NETWORK, ("10.1.0.0/16",)),
        ("fe80::1%eth0", NETWORK, ("fe80::/32",)),
        ("[10.1.2.3,10.1.9.9,10.2.0.1]", NETWORK, ("10.1.0.0/16", "10.2.0.0/16")),
        ("aws internal", NETWORK, ("",)),
    ],
)
def test_what_is_derived(text: str, suffix: str, parts: tuple[str, ...]) -> None:
    assert derived(text, suffix) == parts


@given(st.text(max_size=300), st.sampled_from([suffix for suffix in DERIVED if suffix != AGE]))
def test_any_text_has_one_part_or_more(text: str, suffix: str) -> None:
    assert derived(normalise(text, "x"), suffix)


def test_addresses_are_told_from_names() -> None:
    assert is_address("10.0.0.1") and is_address("::1") and is_address("[10.0.0.1,x]")
    assert not is_address("db-1") and not is_address("[]") and not is_address("")


def test_an_age_is_read_however_the_time_is_written() -> None:
    values = [1_750_000_000_000, 1_750_000_000, "2025-06-15T15:06:40Z", "never", None]
    column = Column(np.arange(5, dtype=np.int32), values)
    assert ages(column, np.full(5, 1_750_000_001_500)) == [1.5, 1.5, 1.5, None, None]
