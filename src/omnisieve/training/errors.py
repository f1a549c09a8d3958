"""Mistakes that the user of a training run can cure."""

from __future__ import annotations


class TrainingError(ValueError):
    """A run cannot start or go on; the message says what, where and how to cure it."""


class CheckpointError(TrainingError):
    """A checkpoint cannot be resumed from."""
