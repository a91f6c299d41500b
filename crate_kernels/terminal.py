"""Text for the terminal."""

import unicodedata


def printable(text: str) -> str:
    """``text`` with a visible sign for every control character, because these can change the terminal's state.

    Line feeds and tabs are unchanged.
    """
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else _sign(ord(c)) for c in text)


def count(number: int, noun: str) -> str:
    """``"1 shard"``, ``"2 shards"``, ``"1,024 shards"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def in_bytes(number: int) -> str:
    """``"73 kB"``, ``"1.8 MB"``."""
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.0f} kB"


def _sign(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's pictures of the control characters
    return "\u2421" if code == 0x7F else "\ufffd"
