"""What makes two configurations the same run: everything but where it is computed and how it is watched."""

import json
import tomllib
from collections.abc import Mapping
from typing import Any

MAY_CHANGE = ("name", "device", "log", "checkpoint", "profile", "threads")
"""The keys under which a run may continue with other values; its folder may be renamed and copied."""


def different_keys(one_toml: str, other_toml: str) -> list[str]:
    """The first-level keys, `MAY_CHANGE` left out, that differ between two resolved configurations."""
    one, other = tomllib.loads(one_toml), tomllib.loads(other_toml)
    keys = sorted({*one, *other} - {*MAY_CHANGE})
    return [key for key in keys if _canonical(one, key) != _canonical(other, key)]


def _canonical(table: Mapping[str, Any], key: str) -> str:
    return json.dumps(table.get(key), sort_keys=True, default=str)
