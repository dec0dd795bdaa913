"""Adapters chosen by row: logits are those of each adapter alone, in one pass and packed."""

import peft_folders
import pytest
import torch

from internvl.errors import ModelFolderError
from internvl.models.adapters import switched


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return peft_folders.hf_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    work = tmp_path_factory.mktemp("adapters")
    narrow = {"r": 2, "lora_alpha": 3, "target_modules": peft_folders.QKV}
    return [
        peft_folders.write(base, work / "wide"),
        peft_folders.write(base, work / "narrow", exclude_modules=r".*vision.*", **narrow),
    ]


def chosen(model, switch, adapter):
    ids = len(peft_folders.IDS[0]) + model.config.image_seq_length
    switch.prefill([ids], [adapter], "cpu")
    return peft_folders.logits(model)


def test_rows_are_those_of_each_adapter_alone(base, folders):
    model = peft_folders.loaded(base)
    before = peft_folders.logits(model)
    names = [name for name, _ in model.named_modules()]
    switch = None
    read = [switched.read(model, folder) for folder in folders]
    assert [name for name, _ in model.named_modules()] == names
    assert not hasattr(model, "peft_config")
    assert torch.equal(peft_folders.logits(model), before)
    switch = switched.attach(model, read)
    for adapter, folder in enumerate([base, *folders]):
        expected = peft_folders.logits(peft_folders.loaded(folder))
        torch.testing.assert_close(chosen(model, switch, adapter), expected, atol=2e-5, rtol=1e-4)
    assert peft_folders.difference(chosen(model, switch, 1), before) > 0.01


def test_a_single_token_of_every_slot():
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 5)
    matrices = [switched.Matrices(torch.randn(r, 6), torch.randn(5, r), 0.5) for r in (2, 3)]
    model = torch.nn.Sequential(layer)
    switch = switched.attach(model, [{"0": m} for m in matrices])
    hidden = torch.randn(4, 1, 6)
    for adapters in ([0, 1, 2, 1], [2, 2, 0, 0]):
        switch.decode(adapters, "cpu")
        for row, adapter in enumerate(adapters):
            expected = layer(hidden[row])
            if adapter:
                m = matrices[adapter - 1]
                expected = expected + 0.5 * hidden[row] @ m.a.T @ m.b.T
            torch.testing.assert_close(model(hidden)[row], expected)


def test_the_ends_of_a_packed_row():
    """After the last attention one position of each prompt is left, or padding follows them."""
    switch = switched.Switch()
    switch.prefill([2, 3], [1, 0], "cpu")
    assert switch.rows(5).tolist() == [[1, 1, 0, 0, 0]]
    assert switch.rows(8).tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]]
    assert switch.rows(2).tolist() == [[1, 0]]


def test_what_cannot_be_chosen_by_row_is_refused(base, tmp_path):
    model = peft_folders.loaded(base)
    before = peft_folders.logits(model)
    vision = r"model\.vision_tower\.encoder\.layer\.\d+\.mlp\.fc1"
    for settings, words in (
        ({"target_modules": vision}, "cannot be chosen by row"),
        ({"use_dora": True}, "cannot be chosen by row"),
        ({"modules_to_save": ["lm_head"]}, "which rows share"),
    ):
        folder = peft_folders.write(base, tmp_path / str(len(words + str(settings))), **settings)
        with pytest.raises(ModelFolderError, match=words):
            switched.read(model, folder)
    assert torch.equal(peft_folders.logits(model), before)
