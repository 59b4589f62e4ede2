"""One base error and few leaves. A message names the field, the value and the way out."""

__all__ = ["BadInputError", "ConfigError", "ConflictError", "IntegrityError", "RetuneError", "StageError"]


class RetuneError(Exception):
    """Base of every error that Retune raises on purpose; its text is meant for a person."""


class ConfigError(RetuneError):
    """A prompt file, an override or a setting is wrong. A retry cannot help."""


class BadInputError(RetuneError):
    """Landed data, a release or a base model cannot be used as it is. A retry cannot help."""


class IntegrityError(RetuneError):
    """Stored bytes are not the bytes that were recorded (hash, chain or tensor check failed). A retry cannot help."""


class ConflictError(RetuneError):
    """Somebody else wrote first (compare-and-set lost). Read again and decide again."""


class StageError(RetuneError):
    """A stage's process failed. A retry may help."""
