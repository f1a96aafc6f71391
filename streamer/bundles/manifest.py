"""The manifest of a bundle, and the check that the bundle is complete; quick, without heavy imports."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import orjson

from encoder.features.schema import Schema
from streamer.errors import RipcurrentError

FORMAT = 8
"""The format of bundles; it changes with their contents."""
MANIFEST, SCHEMA = "manifest.json", "schema.json"
CURRENT, VERSIONS = "current", "versions"
"""Names in a bundle store: the link to the serving version, and the folder of all versions."""


class BundleError(RipcurrentError):
    """A bundle that cannot be used."""


def verify(path: Path) -> tuple[dict[str, Any], Schema]:
    """The manifest and schema of the bundle at `path`.

    Raises BundleError where it is missing, incomplete or changed, or has another schema than it was fitted with.
    """
    path = resolve(path)
    manifest = read_manifest(path)
    for name, digest in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise BundleError(f"bundle {path} lacks {name}; fit it again or restore the file")
        if digest_of(file) != digest:
            raise BundleError(f"{file} was changed or cut off since the bundle was written; fit it again or restore it")
    schema = Schema.from_json((path / SCHEMA).read_bytes(), str(path / SCHEMA))
    if schema.hash != manifest["schema_hash"]:
        raise BundleError(
            f"{path / SCHEMA} has hash {schema.hash[:12]}, the bundle was fitted with {manifest['schema_hash'][:12]}; "
            "fit a bundle with this schema"
        )
    return manifest, schema


def resolve(path: Path) -> Path:
    """The bundle at `path`: itself, or for a store its serving version. Raises BundleError for a store without a
    promoted version."""
    try:
        return path / os.readlink(path / CURRENT)
    except OSError:
        if (path / VERSIONS).is_dir() and not (path / MANIFEST).exists():
            raise BundleError(
                f"no version of {path} serves; ripcurrent bundle promote VERSION --store {path}"
            ) from None
        return path


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the bundle or store at `path`. Raises BundleError."""
    file = resolve(path) / MANIFEST
    try:
        manifest = orjson.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise BundleError(f"there is no bundle at {path}; make one: ripcurrent fit FILES --out {path}") from error
    except (OSError, orjson.JSONDecodeError) as error:
        raise BundleError(f"{file} cannot be read ({error}); fit the bundle again or restore the file") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        number = manifest.get("format") if isinstance(manifest, dict) else None
        raise BundleError(f"{path} has bundle format {number}, this version reads {FORMAT}; fit the bundle again")
    return manifest


def digest_of(path: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
