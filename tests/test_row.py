"""Members of a row's JSON text, whatever the rest contains."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.feed.row import excerpt, members

texts = st.text(st.characters(codec="utf-8"))
names = st.sampled_from(["name", "id", "a", 'q"', "{", "b\\", "$body$", "ö", "\n"]) | texts
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=10,
)


@settings(deadline=None)
@given(st.dictionaries(names, values), st.lists(names, min_size=1, max_size=3, unique=True))
def test_members_are_what_a_parser_finds(row: dict[str, object], columns: list[str]) -> None:
    """Members of any object, with names of any kind, are found exactly when a JSON parser finds
    them.
    """
    for text in (
        json.dumps(row, ensure_ascii=False),
        json.dumps(row, indent=1, ensure_ascii=False),
    ):
        found, cut = members(text, tuple(columns)), excerpt(text, tuple(columns))
        if all(column in row for column in columns):
            assert found is not None and cut is not None
            assert [json.loads(each) for each in found] == [row[column] for column in columns]
            assert json.loads(cut) == {column: row[column] for column in columns}
            assert list(json.loads(cut)) == columns
        else:
            assert found is None and cut is None


@pytest.mark.parametrize(
    "document",
    ["[" * 100_000 + "]" * 100_000, '"\\u0000"', '"\\ud800"', '"\\\\"', '{"name":"no"}', '"}"'],
    ids=["deep", "zero", "lone surrogate", "backslash", "nested name", "bracket"],
)
def test_what_parsers_refuse_is_stepped_over(document: str) -> None:
    """A row's name is found before and after a document that cannot be parsed."""
    assert members(f'{{"name":"a","doc":{document}}}', ("name",)) == ('"a"',)
    assert members(f'{{"doc":{document},"name":"a"}}', ("name",)) == ('"a"',)
    assert members(f'{{"doc":{document}}}', ("name",)) is None
    assert excerpt(f'{{"id":1.10,"doc":{document},"b":2}}', ("b", "id")) == '{"b": 2, "id": 1.10}'
