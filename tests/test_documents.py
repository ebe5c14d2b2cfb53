"""A document's digest: SHA-256 of its JSON with sorted keys and no spaces, however it is put together."""

import json
from hashlib import sha256
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from qwenfit.planner.documents import digest

TEXTS = st.text(max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


def plain(document: dict[str, Any]) -> str:
    rest = {key: value for key, value in document.items() if key != "sha256"}
    return sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@given(st.dictionaries(TEXTS, VALUES, max_size=5), VALUES)
def test_the_digest_is_of_the_plain_spelling(document: dict[str, Any], value: Any) -> None:
    share = {"b": value, "a": [value]}
    document["plans"] = [{"devices": [share, share, dict(share)], "of": [share, 1]}, document.copy()]
    assert digest(document) == plain(document)
