"""What a user gives as the place of a cache: paths, URLs, and weights behind them."""

from pathlib import Path

import pytest

from minicache.options.where import Where, split_weight


@pytest.mark.parametrize(
    ("where", "place", "weight"),
    [
        ("a:0.7", "a", 0.7),
        ("a/:2", "a/", 2.0),
        ("a:b:.5", "a:b", 0.5),
        ("C:/caches/a:1e-3", "C:/caches/a", 1e-3),
        ("C:\\caches\\a:0.5", "C:\\caches\\a", 0.5),
        ("s3://bucket/name:0.7", "s3://bucket/name", 0.7),
        ("s3://bucket/name/:2", "s3://bucket/name/", 2.0),
        ("s3://host:9000/name:2", "s3://host:9000/name", 2.0),
        ("s3://bucket:0.7", "s3://bucket", 0.7),
        ("file:///caches/a:3", "file:///caches/a", 3.0),
    ],
)
def test_a_number_behind_a_path_is_its_weight(where: Where, place: str, weight: float) -> None:
    assert split_weight(where) == (place, weight)


@pytest.mark.parametrize(
    "where",
    [
        "s3://host:9000",
        "memory://name:2",
        "s3://host:9000/",
        "s3://host:9000/name",
        "C:/caches/a",
        "C:\\caches\\a",
        "a:b",
        "a:",
        ":0.7",
        "a:-1",
        "a:1.",
        Path("a"),
    ],
)
def test_a_place_without_a_weight_stays_as_it_is(where: Where) -> None:
    assert split_weight(where) == (where, None)
