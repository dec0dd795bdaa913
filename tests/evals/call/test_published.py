"""Published values of a model or a training, by its name."""

import pytest

from internvl import evaluate


def test_published_scores_of_every_task_language_and_mode() -> None:
    model = "OpenGVLab/InternVL-14B-224px"
    for name, value in {
        "retrieval-flickr30k/c_image_retrieval_recall@1": 0.817,
        "retrieval-flickr30k-cn/g_text_retrieval_recall@5": 0.994,
        "retrieval-coco/g_image_retrieval_recall@1": 0.586,
        "retrieval-coco-cn/c_text_retrieval_recall@10": 0.967,
        "retrieval-xtd/g_text_retrieval_recall@10": 0.986,
        "retrieval-xtd-ko/c_image_retrieval_recall@1": 0.583,
        "retrieval-xtd-pl/c_image_retrieval_recall@1": None,
        "retrieval-coco/g_itm_image_retrieval_recall@1": None,
        "caption-coco/cider": 1.282,
        "caption-nocaps/average_length": 10.463,
        "imagenet1k/c_acc1": 0.83178,
        "imagenet1k-cn/c_acc5": 0.87842,
        "imagenet1k-jp/c_mean_per_class_recall": 0.61406,
        "vtab-resisc45/c_acc1": 0.74226,
        "imagenet1k/g_acc1": None,
    }.items():
        assert evaluate.published(model, name) == pytest.approx(value, abs=1e-5), name
    assert evaluate.published("OpenGVLab/InternVL2-2B", "caption-coco/cider") == 0.793
    tuned = "pretrained/InternVL-14B-FlickrCN-FT-364px"
    mean = evaluate.published(tuned, "retrieval-flickr30k-cn/g_mean_recall")
    assert mean == pytest.approx(0.964)
    assert evaluate.published("somebody/else", "caption-coco/cider") is None
    # InternVL-C's own file is the same model.
    alone = "./pretrained/internvl_c_13b_224px.pth"
    assert evaluate.published(alone, "cifar10/c_acc1") == pytest.approx(0.9935)


def test_published_scores_of_a_training_by_the_name_of_its_run(tmp_path) -> None:
    name = "internvl2_2b_internlm2_1_8b_dynamic_res_2nd_finetune_lora_coco"
    for run in ("internvl2_2b_lora_coco", name, "internvl_14b_full_flickr30k", "mine"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "recipe.yaml").touch()
    for run in ("internvl2_2b_lora_coco", name):
        assert evaluate.published(tmp_path / run, "caption-coco/cider") == 1.312
    recall = "retrieval-flickr30k/g_text_retrieval_recall@1"
    value = evaluate.published(tmp_path / "internvl_14b_full_flickr30k", recall)
    assert value == pytest.approx(0.979)
    assert evaluate.published(tmp_path / "mine", "caption-coco/cider") is None
