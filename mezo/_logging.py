"""Lets our warnings be seen in processes whose logging SGLang configures."""

from __future__ import annotations

import logging
import os


def show_warnings(server_level: str | None = None) -> None:
    """Let the `mezo` logger write warnings although the root logger, set by SGLang, would not.

    SGLang gives the root logger the level of its server, "error" by default. A user's own
    configuration goes first: nothing changes where the `mezo` logger has a level, where the root's
    level is not the server's, or where SGLang itself was given a logging configuration.

    Args:
        server_level: SGLang's ``log_level``; None in SGLang's own processes, which have no other.
    """
    ours = logging.getLogger("mezo")
    root = logging.getLevelName(logging.getLogger().level)
    is_sglangs = server_level is None or root == server_level.upper()
    has_own = "SGLANG_LOGGING_CONFIG_PATH" in os.environ
    if ours.level == logging.NOTSET and is_sglangs and not has_own:
        ours.setLevel(logging.WARNING)
