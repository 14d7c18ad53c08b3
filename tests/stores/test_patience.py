"""How long an answer may take that comes in pieces."""

from __future__ import annotations

import time

import pytest

from querycache.backends.patience import Patience


def test_an_answer_has_its_timeout_and_as_long_again_for_each_megabyte(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    patience = Patience(0.5)
    for _ in range(2):
        patience.start()
        for _ in range(8):
            now += 0.25
            patience.received(2**19)
        now += 0.5
        patience.received(1)
        now += 0.001
        with pytest.raises(TimeoutError):
            patience.received(1)
