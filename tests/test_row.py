"""One member of a row's JSON text, whatever the rest contains."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.feed.row import member, scan

texts = st.text(st.characters(codec="utf-8"))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(["name", "id", "a", 'q"', "{"]) | texts, values))
def test_a_member_is_what_a_parser_finds(row: dict[str, object]) -> None:
    """Both ways find the member `name` of any object exactly when a JSON parser does."""
    for text in (json.dumps(row), json.dumps(row, indent=1, ensure_ascii=False)):
        for found in (member(text, "name"), scan(text, "name")):
            if "name" in row:
                assert found is not None and json.loads(found) == row["name"]
            else:
                assert found is None


@pytest.mark.parametrize(
    "document",
    ["[" * 100_000 + "]" * 100_000, '"\\u0000"', '"\\ud800"', '"\\\\"', '{"name":"no"}', '"}"'],
    ids=["deep", "zero", "lone surrogate", "backslash", "nested name", "bracket"],
)
def test_what_parsers_refuse_is_stepped_over(document: str) -> None:
    """A row's name is found before and after a document that cannot be parsed."""
    assert member(f'{{"name":"a","doc":{document}}}', "name") == '"a"'
    assert member(f'{{"doc":{document},"name":"a"}}', "name") == '"a"'
    assert member(f'{{"doc":{document}}}', "name") is None
