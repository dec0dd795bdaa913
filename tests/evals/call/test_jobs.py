"""Tasks and options of a call: what they stand for."""

from internvl.evals.call import jobs


def test_names_of_many_tasks_fit_a_file_system():
    todo = {f"{'x' * 60}-{n}": jobs.Job(None, "d", "en") for n in range(9)}
    assert jobs.title(todo) == f"{'x' * 60}-0+8-more"
    assert jobs.title({"a/b": todo[f"{'x' * 60}-0"]}) == "a-b"


def test_tasks_of_several_types_take_their_own_options():
    types = {"caption", "retrieval"}
    options = {"recall_k": [1], "max_new_tokens": 9, "limit": 2, "recal_k": [1]}
    assert jobs._options_of("caption", types, options) == {
        "max_new_tokens": 9,
        "limit": 2,
        "recal_k": [1],
    }
    assert jobs._options_of("retrieval", types, options).keys() == {
        *("recall_k", "limit", "recal_k")
    }
