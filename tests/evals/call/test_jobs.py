"""Tasks and options of a call: what they stand for."""

import pytest
from chat_folders import prompt_folder

from internvl import evaluate
from internvl.errors import UserError
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


def test_a_chat_model_is_refused_before_the_data_of_a_classification(tmp_path):
    chat = prompt_folder("internlm2.internlm2-chat", tmp_path / "chat")
    says = "cifar10.*: an evaluation of type classify needs an InternVL-14B model; .*chat model"
    with pytest.raises(UserError, match=says):
        evaluate.measure(chat, "cifar10", root=tmp_path / "gone", device="cpu")
