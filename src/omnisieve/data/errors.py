"""Mistakes in data that a user can cure."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be used; the message says what is wrong, where, and how to cure it."""
