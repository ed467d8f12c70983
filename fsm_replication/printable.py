"""Makes text safe to show: what comes from data must not reach a terminal as it is."""

from __future__ import annotations

from fsm_replication.errors import ConfigError

__all__ = ("printable", "told")


def printable(raw: str | bytes, width: int | None = None) -> str:
    """Return text that no terminal obeys, in one line: whatever is not printable is escaped.

    That is what Unicode calls so: controls and escape sequences, the ends of lines, marks that change
    the direction of writing. With ``width``, in characters, the rest is cut, which an ellipsis tells.
    """
    if isinstance(raw, bytes):
        # A character has up to four bytes: no more than that is looked at, however large a field is.
        raw = raw if width is None else raw[: 4 * width + 4]
        raw = raw.decode("utf-8", "backslashreplace")
    text = raw if width is None else raw[: width + 1]
    if not text.isprintable():
        text = "".join(
            one if one.isprintable() else one.encode("unicode_escape").decode("ascii")
            for one in text
        )
    return text if width is None or len(text) <= width else f"{text[: width - 1]}…"


def told(error: BaseException) -> str:
    """Return what an error says, safe to show: in one line, or in one for each problem it lists."""
    text = str(error)
    if not isinstance(error, ConfigError):
        return printable(text)
    head = text.removesuffix("".join(f"\n  {problem}" for problem in error.problems))
    return "\n  ".join(map(printable, (head, *error.problems)))
