"""A store of bundles: whole versions, a pointer that moves in one step, and the way back."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

import orjson
import pytest
from loop_harness import EVENT
from test_cli import ripcurrent

from encoder.features.learner import SchemaLearner
from encoder.ocsf.decoder import decode
from encoder.ocsf.events import Message
from streamer.bundles.manifest import FORMAT, BundleError, resolve, verify
from streamer.bundles.store import Store
from streamer.errors import ConfigurationError


def bundle(path: Path, created: str, note: str = "") -> Path:
    """A directory that is a whole bundle as far as its manifest goes."""
    path.mkdir(parents=True)
    learner = SchemaLearner()
    learner.add(decode([Message("events", 0, i, -1, orjson.dumps(EVENT | {"status_id": i % 2})) for i in range(30)])[0])
    schema = learner.finish()
    (path / "schema.json").write_bytes(schema.to_json())
    (path / "note").write_text(note)
    files = {name: sha256((path / name).read_bytes()).hexdigest() for name in ("note", "schema.json")}
    training = {"events": 1000, "from": 1_767_571_200_000, "to": 1_768_176_000_000, "events_per_day": 143.0}
    manifest = {"format": FORMAT, "version": f"{path.name}-{files['note'][:6]}", "created": created, "files": files}
    (path / "manifest.json").write_bytes(orjson.dumps(manifest | {"schema_hash": schema.hash, "training": training}))
    return path


def test_versions_are_promoted_and_rolled_back_by_name(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert (store.names(), store.current) == ([], None)
    one, two, three = (
        store.promote(str(bundle(tmp_path / name, f"2026-01-0{day}T00:00:00+00:00", name)))
        for day, name in enumerate(("one", "two", "three"), 1)
    )
    assert store.names() == [one, two, three]
    assert store.current == three
    assert store.rollback() == store.current == two
    assert store.rollback() == store.current == one
    with pytest.raises(ConfigurationError, match="no version to go back to"):
        store.rollback()
    assert store.promote(three) == store.current == three
    assert store.rollback() == one
    assert [name for _, name in store.history()] == [one, two, three, two, one, three, one]
    assert verify(resolve(store.path))[0]["version"] == one


def test_what_is_not_whole_is_not_promoted(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    one = store.promote(str(bundle(tmp_path / "one", "2026-01-01T00:00:00+00:00", "one")))
    two = bundle(tmp_path / "two", "2026-01-02T00:00:00+00:00", "two")
    (two / "note").write_text("changed")
    with pytest.raises(BundleError, match="note was changed"):
        store.promote(str(two))
    with pytest.raises(BundleError, match="neither a version"):
        store.promote("three")
    assert (store.names(), store.current) == ([one], one)
    assert os.listdir(store.path / "versions") == [one]


def test_the_commands(tmp_path: Path) -> None:
    bundle(tmp_path / "one", "2026-01-01T00:00:00+00:00", "one")
    bundle(tmp_path / "two", "2026-01-02T00:00:00+00:00", "two")
    for name in ("one", "two"):
        done = ripcurrent("bundle", "promote", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "serves, one-" in done.stdout
    listed = ripcurrent("bundle", "list", cwd=tmp_path).stdout.splitlines()
    assert [line[:5] for line in listed] == ["  one", "* two"]
    shown = orjson.loads(ripcurrent("bundle", "show", cwd=tmp_path).stdout)
    assert shown["version"].startswith("two-")
    assert shown["serves"]
    assert ripcurrent("bundle", "rollback", cwd=tmp_path).returncode == 0
    assert Store(tmp_path / "bundles").current == listed[0].split()[0]
    wrong = ripcurrent("bundle", "promote", "three", cwd=tmp_path)
    assert wrong.returncode == 1
    assert "neither a version" in wrong.stderr
