"""The errors a user can meet: one small hierarchy, each raised with the value, the place and the way out."""


class RipcurrentError(Exception):
    """Base of every error that the command prints as one line before it exits with code 1."""


class ConfigurationError(RipcurrentError):
    """A setting that cannot work: unknown key, topic that does not exist, server that does not answer."""


class StreamError(RipcurrentError):
    """The stream cannot go on without a person: offsets that no longer exist, a fenced producer."""
