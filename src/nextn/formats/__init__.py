"""Saved layouts: our own (`native`) and, later, one module a foreign one."""


class FormatError(ValueError):
    """A directory or file that cannot be read or written; the message says why and what to do."""
