"""Fixtures of the engine's tests."""

import contextlib
import resource

import pytest


@pytest.fixture
def no_room():
    """``with no_room():`` no file of this process takes a byte more, as on a full disk (names can still be made)."""

    @contextlib.contextmanager
    def full():
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return full
