"""The one exception of the package."""

from __future__ import annotations


class MergeError(ValueError):
    """These ingredients cannot be merged like this: one line that names the offender and the fix."""
