"""Takes credentials out of everything that is logged, tagged or saved."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

HIDDEN = "***"
_SECRET_NAME = re.compile(
    r"passw|pwd|passphrase|secret|credential|api_?key|access_?key|auth_?token|(^|[._])(token|pass)$", re.I
)
_NO_SECRET = ("PWD", "OLDPWD")  # where the shell stands
_URLS = re.compile(r"://[^\s'\"]+")
_AUTHORITY = re.compile(r"[^/?#]*")
_PORT = re.compile(r"(\[.*\]|[^:]*)(:[\d{}.,]*)?$")  # no password stands here: HOST, HOST:5000, [::1]:5000
_QUERY = re.compile(
    r"([?&;][\w.-]*(?:sig|token|secret|credential|pass|pwd|key|auth|jwt|sas|odbc_connect)[\w.-]*=)[^&\s'\"]+",
    re.I,
)
_HEADER = re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{8,}", re.I)


def _without_user(joined: str) -> str:
    """One URL or several (``URL::URL``) without what stands between ``://`` and ``@``.

    A password may hold what it should have as %40 or %2F: everything up to the last ``@`` goes, as soon as there is an
    ``@`` before the first slash, or what stands there ends in ``:`` and no port.
    """
    first, *rest = joined.split("://")
    out, begun = [first], ""
    for part in rest:
        authority = _AUTHORITY.match(part := begun + part)[0]
        begun = ""
        if "@" in authority or not _PORT.match(authority):
            if "@" not in part:  # the password has a :// in it
                begun = f"{part}://"
                continue
            part = HIDDEN + part[part.rindex("@") :]
        out.append(part)
    return "://".join([*out, begun.removesuffix("://")] if begun else out)


def urls(value: str) -> str:
    """``value`` without user:password in URLs, signed query values and authorisation headers."""
    value = _URLS.sub(lambda found: _without_user(found[0]), value)
    return _HEADER.sub(rf"\1 {HIDDEN}", _QUERY.sub(rf"\1{HIDDEN}", value))


def text(value: str) -> str:
    """As ``urls``, and without the secrets of the environment (variables whose name says PASSWORD, TOKEN ...)."""
    value = urls(value)
    for name, secret in os.environ.items():
        if len(secret) < 6 or name in _NO_SECRET or (secret.startswith("/") and os.path.exists(secret)):
            continue  # SECRETS_DIR=/shared says where they are, not what
        if _SECRET_NAME.search(name) or name.endswith("_TOKEN"):
            value = value.replace(secret, HIDDEN)
    return value


def setting(value: str) -> str:
    """As ``text``, of a text that is a URL to its end: no space or quotation mark in a password ends it."""
    return text(_without_user(value))


def value(name: str, value: Any) -> Any:
    """A setting that may be shown: strings redacted, hidden whole if its name is that of a secret."""
    if isinstance(value, str):
        return HIDDEN if value and _SECRET_NAME.search(name) else setting(value)
    if isinstance(value, Mapping):
        return {k: _value(f"{name}.{k}", v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_value(name, v) for v in value]
    return value


_value = value  # the name that the comprehension above can see


def bare(uri: str) -> str:
    """A redacted URL that can be called: without the mark in the place of user and password."""
    return uri.replace(f"://{HIDDEN}@", "://")


class Stream:
    """A text stream that redacts what passes (libraries put URLs into their messages)."""

    def __init__(self, stream: Any, by: Callable[[str], str] = text):
        self._stream, self._by = stream, by

    def write(self, value: str) -> int:
        """As a file's."""
        return self._stream.write(self._by(value))

    def writelines(self, values: Iterable[str]) -> None:
        """As a file's."""
        for line in values:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
