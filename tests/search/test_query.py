"""Words with weights, and filters."""

import sqlite3

import pytest

from internvl.errors import UserError
from internvl.search.query import Filters, Term, check_terms, parse_terms


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a dog in the snow", [("a dog in the snow", 1)]),
        ("beach:1 people:-0.5", [("beach", 1), ("people", -0.5)]),
        ("a red car:2   old town:.5", [("a red car", 2), ("old town", 0.5)]),
        ("海边:1 人:-0.5", [("海边", 1), ("人", -0.5)]),
        ("海边：1 人：-0.5 晚上", [("海边", 1), ("人", -0.5), ("晚上", 1)]),
        ("a train at 10:30", [("a train at 10:30", 1)]),
        ("format 4:3", [("format 4:3", 1)]),
        ("title: none", [("title: none", 1)]),
        ("version:1.2.3", [("version:1.2.3", 1)]),
        ("  ", []),
        (" " * 50_000 + "a:2" + " " * 50_000 + "b", [("a", 2), ("b", 1)]),  # at once
    ],
)
def test_words_and_their_weights(text, expected):
    assert [(term.text, term.weight) for term in parse_terms(text)] == expected


def test_nothing_to_look_for_is_refused():
    with pytest.raises(UserError, match="nothing to look for"):
        check_terms([])
    with pytest.raises(UserError, match=r"no weight is above 0 \(beach people × -0.5\)"):
        check_terms(parse_terms("beach people:-0.5"))
    with pytest.raises(UserError, match="the weight is nan"):
        check_terms([Term("a", weight=float("nan"))])
    with pytest.raises(UserError, match=r"the weight is 1e\+39; write one from -1,000,000 to"):
        check_terms([Term("a", weight=1e39)])


def test_thousands_of_folders_are_refused():
    with pytest.raises(UserError, match="takes 100 folders, not 1,000"):
        Filters(("2024",) * 1000)


def test_a_folder_stands_for_what_is_below_it_whatever_its_name():
    database = sqlite3.connect(":memory:")
    database.execute("CREATE TABLE photos (path TEXT)")
    paths = ["[2024] beach/d.png", "[2024] beach/e/f.png", "3 beach/g.png", "h.png"]
    database.executemany("INSERT INTO photos VALUES (?)", [(path,) for path in paths])

    def found(*folders):
        condition, values = Filters(folders).condition()
        rows = database.execute(f"SELECT path FROM photos WHERE {condition}", values)
        return [path for (path,) in rows]

    assert found("[2024] beach") == paths[:2]
    assert found("3*", "./[2024] beach/e/") == [paths[1], paths[2]]
    for all_of_them in (".", "./", "", "*"):
        assert found(all_of_them) == paths


@pytest.mark.parametrize("text", ["2024", "2024-02", "2024-02-29"])
def test_dates(text):
    assert Filters(since=text, until=text).condition()[1] == [text, f"{text}~"]


@pytest.mark.parametrize("text", ["24", "2024-13", "2023-02-29", "01.05.2024", "2024-5"])
def test_what_is_no_date_is_refused(text):
    with pytest.raises(UserError, match="is no date; write 2024"):
        Filters(since=text)
