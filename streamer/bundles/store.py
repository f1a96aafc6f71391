"""The bundle store: a directory of named versions and a pointer to the one that serves.

`STORE/versions/NAME` are bundles, `STORE/current` is a link to one of them, replaced in one step, and
`STORE/history.ndjson` records its changes. Promises: the pointer always leads to a complete bundle; a version
is checked before it is promoted, never changed, and never removed here.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from streamer.bundles.manifest import CURRENT, MANIFEST, VERSIONS, BundleError, read_manifest, verify
from streamer.errors import ConfigurationError

_HISTORY = "history.ndjson"


@dataclass(frozen=True)
class Store:
    """The store at a path, which need not exist before something is promoted."""

    path: Path

    def names(self) -> list[str]:
        """The versions, oldest first."""
        folder = self.path / VERSIONS
        folders = [each for each in folder.iterdir() if (each / MANIFEST).is_file()] if folder.is_dir() else []
        return [each.name for each in sorted(folders, key=lambda each: (read_manifest(each)["created"], each.name))]

    def manifest(self, name: str) -> dict[str, Any]:
        """The manifest of a version. Raises BundleError."""
        return read_manifest(self._version(name))

    @property
    def current(self) -> str | None:
        """The version that serves; None before the first is promoted."""
        try:
            return Path(os.readlink(self.path / CURRENT)).name
        except OSError:
            return None

    def history(self) -> list[tuple[str, str]]:
        """(when, version) of each promotion and rollback, oldest first."""
        file = self.path / _HISTORY
        rows = [orjson.loads(line) for line in file.read_bytes().splitlines()] if file.exists() else []
        return [(row["time"], row["version"]) for row in rows]

    def promote(self, bundle: str) -> str:
        """Let a version serve: one of this store by its name, or a bundle elsewhere by its path, which is copied in.
        Returns its name. Raises BundleError where it is not whole."""
        name = bundle if bundle in self.names() else self._add(Path(bundle))
        verify(self._version(name))
        self._point(name)
        return name

    def rollback(self) -> str:
        """Let the version serve that served before the current one. Returns its name. Raises ConfigurationError where
        there was none."""
        stack: list[str] = []
        for _, name in self.history():  # A rollback is recorded with the version that it returned to.
            if len(stack) > 1 and stack[-2] == name:
                stack.pop()
            elif not stack or stack[-1] != name:
                stack.append(name)
        if len(stack) < 2:
            serving = stack[-1] if stack else "none"
            raise ConfigurationError(f"{self.path} has no version to go back to: {serving} serves")
        verify(self._version(stack[-2]))
        self._point(stack[-2])
        return stack[-2]

    def _version(self, name: str) -> Path:
        return self.path / VERSIONS / name

    def _add(self, bundle: Path) -> str:
        if not bundle.exists():
            known = ", ".join(self.names()) or "none"
            raise BundleError(f"{bundle} is neither a version of {self.path} ({known}) nor a bundle's directory")
        manifest, _ = verify(bundle)
        name, folder = str(manifest["version"]), self.path / VERSIONS
        if (folder / name).exists():
            return name
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".", dir=folder))
        try:
            copy = temporary / name
            shutil.copytree(bundle, copy)
            os.rename(copy, folder / name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return name

    def _point(self, name: str) -> None:
        link = self.path / f".{CURRENT}-{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(Path(VERSIONS) / name, target_is_directory=True)
        os.replace(link, self.path / CURRENT)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with (self.path / _HISTORY).open("ab") as file:
            file.write(orjson.dumps({"time": now, "version": name}, option=orjson.OPT_APPEND_NEWLINE))
