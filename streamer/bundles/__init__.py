"""Bundles on disk: files, manifest, and the store of versions."""
