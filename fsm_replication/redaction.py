"""Takes credentials out of texts: out of URLs, and out of what a server says that was told them.

A server may quote what it was sent: one that does not know ``AUTH`` names user and password in its
error. So no text of a server goes on before :meth:`Secrets.scrub` has seen it, with the credentials of
the URL by which that server was reached. URLs are masked by their form alone, wherever they stand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple, Self
from urllib.parse import unquote, unquote_plus, urlsplit

__all__ = ("MASK", "NO_SECRETS", "TEXT_MAX", "Secrets", "mask_url", "redact")

MASK: Final = "***"
# Characters of a server's text that are looked at and kept; a peer may send any number.
TEXT_MAX: Final = 2048
# So much of a password is masked without the rest: a server may have cut what it quotes.
PREFIX_MIN: Final = 6
# Anything shorter is masked only where it stands alone, or no word of a text would be left.
INSIDE_WORDS_MIN: Final = 4

# What a URL's query may hold that is no secret.
_HARMLESS: Final = frozenset(
    (
        *("db", "ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile"),
        *("ssl_check_hostname", "ssl_cert_reqs"),
    )
)
_SECRET_NAMES: Final = frozenset({"password", "username", "user", "ssl_password"})
# It begins at "://" and not at the scheme, which would be looked for from every letter of a text.
_CREDENTIALS: Final = re.compile(r"(?P<scheme>://)\S*@")
_OPTION: Final = re.compile(r"(?P<name>[?&;](?P<key>[^\s=&;?]*)=)[^&;\s]*")
_SERVER: Final = re.compile(r"(?:\[[0-9a-fA-F:.]+\]|[\w.-]*)(?::\d*)?")
_DATABASE: Final = re.compile(r"/?\d*")


def redact(text: str) -> str:
    """Return ``text`` with the credentials of every URL in it replaced by ``***``."""
    if "://" not in text:
        return text
    text = _OPTION.sub(_without_secret, text)
    return _CREDENTIALS.sub(rf"\g<scheme>{MASK}@", text)


def _without_secret(option: re.Match[str]) -> str:
    # A name may be spelled in percents as well as a value: "pass%77ord".
    secret = _plain(option["key"]) in _SECRET_NAMES
    return option["name"] + MASK if secret else option[0]


def mask_url(url: str) -> str:
    """Return a Redis URL without its credentials, and without whatever may be a part of them."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return MASK
    try:
        parts = urlsplit(url)
        login, _, server = parts.netloc.rpartition("@")
    except ValueError:
        return f"{scheme}://{MASK}"
    is_socket = parts.scheme == "unix"
    path_fits = "@" not in parts.path if is_socket else _DATABASE.fullmatch(parts.path)
    if not path_fits or not _SERVER.fullmatch(server) or parts.fragment or "#" in rest:
        return f"{scheme}://{MASK}"
    shown = f"{scheme}://{MASK + '@' if login else ''}{server}{parts.path}"
    options = [_masked_option(option) for option in parts.query.split("&") if parts.query]
    return f"{shown}?{'&'.join(options)}" if options else shown


def _masked_option(option: str) -> str:
    name, equals, _ = option.partition("=")
    if not equals:
        return MASK
    return option if _plain(name) in _HARMLESS else f"{name}={MASK}"


def _plain(name: str) -> str:
    return unquote_plus(name).casefold()


class _Secret(NamedTuple):
    """One text to be masked: the spellings of each of its characters, in lower case.

    ``least`` is how many characters of it are masked by themselves. ``begins`` finds where it may
    begin.
    """

    spellings: tuple[tuple[str, ...], ...]
    least: int
    begins: re.Pattern[str]

    def ends(self, text: str, begin: int) -> int | None:
        """Return where it ends that begins here, None where it does not."""
        ends, matched = {begin}, 0
        for spellings in self.spellings:
            further = {
                end + len(spelling)
                for end in ends
                for spelling in spellings
                if text.startswith(spelling, end)
            }
            if not further:
                break
            ends, matched = further, matched + 1
        if matched < self.least:
            return None
        last = max(ends)
        stands_alone = not (_is_word(text, begin - 1) or _is_word(text, last))
        return last if len(self.spellings) >= INSIDE_WORDS_MIN or stands_alone else None


class Secrets:
    """Credentials that must not be shown, and the texts from which they are taken out.

    They are found in every spelling that a URL, a server or a language may give them: with any
    characters in percents, behind backslashes, in hexadecimal, in either case; and cut at the end.
    """

    __slots__ = ("_secrets",)

    def __init__(
        self, users: frozenset[str] = frozenset(), passwords: frozenset[str] = frozenset()
    ) -> None:
        self._secrets = tuple(
            _secret(text, len(text)) for text in sorted(users - passwords) if text
        ) + tuple(_secret(text, min(len(text), PREFIX_MIN)) for text in sorted(passwords) if text)

    @classmethod
    def of(cls, url: str) -> Self:
        """Return what stands in a URL, in its authority and in its query; nothing if it is none."""
        try:
            parts = urlsplit(url)
            users, passwords = _spellings(parts.username), _spellings(parts.password)
        except ValueError:
            return cls()
        for option in parts.query.split("&"):
            name, _, value = option.partition("=")
            if _plain(name) in ("username", "user"):
                users |= _spellings(value)
            elif _plain(name) not in _HARMLESS:
                passwords |= _spellings(value)
        return cls(users, passwords)

    def scrub(self, text: str) -> str:
        """Return ``text``, of which at most 2,048 characters are kept, without these secrets."""
        if len(text) > TEXT_MAX:
            text = f"{text[:TEXT_MAX]}…"
        if not self._secrets:
            return text
        lower = text.lower()
        if len(lower) != len(text):
            lower = "".join(low if len(low := one.lower()) == 1 else one for one in text)
        made, done = "", 0
        for begin, end in _joined(sorted(self._places(lower))):
            made += text[done:begin] + MASK
            done = end
        return made + text[done:]

    def _places(self, lower: str) -> Iterator[tuple[int, int]]:
        for secret in self._secrets:
            at = 0
            while found := secret.begins.search(lower, at):
                end = secret.ends(lower, found.start())
                if end is not None:
                    yield found.start(), end
                at = found.start() + 1 if end is None else end

    def scrub_error(self, error: BaseException) -> None:
        """Take the secrets out of an error, and out of those it came from, where they are."""
        seen: set[int] = set()
        waiting: list[BaseException | None] = [error]
        while waiting:
            one = waiting.pop()
            if one is None or id(one) in seen:
                continue
            seen.add(id(one))
            one.args = tuple(self.scrub(arg) if isinstance(arg, str) else arg for arg in one.args)
            waiting += [one.__cause__, one.__context__]

    def __repr__(self) -> str:
        return f"<Secrets {len(self._secrets)}>"


NO_SECRETS: Final = Secrets()


def _spellings(raw: str | None) -> frozenset[str]:
    """Return what a part of a URL may be sent as: parsers differ in how often they decode it."""
    if not raw:
        return frozenset()
    forms = {raw, unquote(raw), unquote_plus(raw)}
    return frozenset(forms | {unquote(form) for form in forms})


def _secret(text: str, least: int) -> _Secret:
    spellings = tuple(tuple(sorted(_spelled(one))) for one in text)
    # It looks for two characters, since one is found all over a text.
    begins = "".join(f"(?:{'|'.join(map(re.escape, one))})" for one in spellings[: min(2, least)])
    return _Secret(spellings, least, re.compile(begins))


def _spelled(character: str) -> frozenset[str]:
    """Return how one character may be written, all in lower case."""
    raw = character.encode("utf-8", "surrogatepass")
    units = character.encode("utf-16-be", "surrogatepass").hex()
    forms = {
        character,
        f"\\{character}",
        "".join(f"%{byte:02x}" for byte in raw),
        "".join(f"%25{byte:02x}" for byte in raw),
        "".join(f"\\x{byte:02x}" for byte in raw),
        "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4)),
        f"\\U{ord(character):08x}",
        repr(character)[1:-1],
    }
    if character == " ":
        forms.add("+")
    elif character in "\r\n\t\a\b\f\v":
        # Servers put a space where a line would end, and escape the others.
        forms |= {" ", "\\ ", "\\" + "rntabfv"["\r\n\t\a\b\f\v".index(character)]}
    elif character == "\N{REPLACEMENT CHARACTER}" or not character.isascii():
        forms |= {"\N{REPLACEMENT CHARACTER}" * number for number in range(1, len(raw) + 1)}
        forms.add("".join(map(chr, raw)))
    return frozenset(form.lower() for form in forms)


def _is_word(text: str, at: int) -> bool:
    return 0 <= at < len(text) and text[at].isalnum()


def _joined(places: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield stretches that do not meet, of stretches sorted by where they begin."""
    if not places:
        return
    begin, end = places[0]
    for next_begin, next_end in places[1:]:
        if next_begin <= end:
            end = max(end, next_end)
        else:
            yield begin, end
            begin, end = next_begin, next_end
    yield begin, end
