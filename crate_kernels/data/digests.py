"""A short digest of a run's data. A resumed run compares it with the data that it finds."""

from __future__ import annotations

import hashlib

import numpy as np


def digest(*parts: bytes | np.ndarray) -> str:
    """The first twelve digits of the SHA-256 of all parts together."""
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return sha256.hexdigest()[:12]
