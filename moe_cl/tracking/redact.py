"""Takes credentials out of everything that is logged, tagged or saved."""

from __future__ import annotations

import os
import re
from typing import Any

HIDDEN = "***"
_SECRET_NAME = re.compile(r"password|passwd|secret|credential|api_?key|access_?key|auth_?token|(^|[._])token$", re.I)
_USERINFO = re.compile(r"(?<=://)[^/@\s'\"]+(?=@)")
_QUERY = re.compile(r"([?&][\w.-]*(?:sig|signature|token|secret|password|credential|key)[\w.-]*=)[^&\s'\"]+", re.I)
_HEADER = re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{8,}", re.I)


def text(value: str) -> str:
    """``value`` without user:password in URLs, signed query values, authorisation headers and secrets of the
    environment (variables whose name says PASSWORD, TOKEN, SECRET ...)."""
    value = _HEADER.sub(rf"\1 {HIDDEN}", _QUERY.sub(rf"\1{HIDDEN}", _USERINFO.sub(HIDDEN, value)))
    for name, secret in os.environ.items():
        if len(secret) >= 6 and (_SECRET_NAME.search(name) or name.endswith("_TOKEN")):
            value = value.replace(secret, HIDDEN)
    return value


def value(name: str, value: Any) -> Any:
    """A setting that may be shown: strings redacted, hidden whole if its name is that of a secret."""
    if isinstance(value, str):
        return HIDDEN if value and _SECRET_NAME.search(name) else text(value)
    if isinstance(value, dict):
        return {k: _value(f"{name}.{k}", v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_value(name, v) for v in value]
    return value


_value = value  # the name that the comprehension above can see


class Stream:
    """A text stream that redacts what passes (libraries put URLs into their messages)."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, value: str) -> int:
        """As a file's."""
        return self._stream.write(text(value))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
