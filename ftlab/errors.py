"""The exceptions that a command turns into one line on stderr instead of a traceback."""

__all__ = ["ConfigError", "DivergenceError", "FtlabError"]


class FtlabError(Exception):
    """Something the user can put right. The message says what is wrong, where, and what to do.

    A command prints ``error: <message>`` and exits with `exit_code`; ``FTLAB_DEBUG=1`` keeps the traceback.
    """

    exit_code = 1


class ConfigError(FtlabError):
    """The configuration cannot be used; raised before anything is downloaded or loaded."""

    exit_code = 2


class DivergenceError(FtlabError):
    """Training produced non-finite numbers too many times in a row, or a model whose scores are not finite."""

    exit_code = 3
