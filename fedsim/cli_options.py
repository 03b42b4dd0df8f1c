"""What several commands read from their options. May import: fedsim.errors, inside the functions."""

from __future__ import annotations


def whole(option: str, text: str) -> int:
    from fedsim.errors import ConfigError

    if not text.strip().isdigit() or int(text) < 1:
        raise ConfigError(f"{option} takes whole numbers of at least 1, separated by commas, got {text!r}")
    return int(text)
