"""How deep a JSON text is nested, told without parsing it.

Parsers go down by calling themselves. Some count the levels and not the stack that is left, so that a
text of others, nested some thousand levels deep, ends the process in a thread with a small stack.
"""

from __future__ import annotations

import re
from array import array
from itertools import accumulate
from typing import Final

__all__ = ("LEVELS_MAX", "is_too_deep")

LEVELS_MAX: Final = 900
"""More levels than any document needs, and fewer than a stack of 1 MiB holds."""
_STRING: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_STEPS: Final = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NO_BRACKETS: Final = bytes(set(range(256)) - set(b"[{]}"))


def is_too_deep(text: bytes, levels: int = LEVELS_MAX) -> bool:
    """Say whether arrays and objects stand in each other more than so many levels deep.

    Of a text that is not JSON it may say so too; such a text is refused either way.
    """
    if text.count(b"[") + text.count(b"{") <= levels:
        return False
    steps = _STRING.sub(b"", text).translate(_STEPS, _NO_BRACKETS)
    return max(accumulate(array("b", steps)), default=0) > levels
