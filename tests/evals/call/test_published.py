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


def test_the_guides_training_shows_before_and_after(tmp_path) -> None:
    """Published after the training, and those of the released model before it."""
    run = tmp_path / "internvl2_2b_lora_coco"
    run.mkdir()
    (run / "recipe.yaml").touch()
    metrics = {"caption-coco/cider": 1.3, "caption-coco/exact": 0.01}
    counts = {"caption-coco": {"images": 5_000, "texts": 25_010}}
    head, cider, exact = evaluate.render(metrics, run, counts).splitlines()
    assert head.split("  ")[-3:] == ["measured", "published", "published before training"]
    assert cider.split() == ["caption-coco/cider", "1.3000", "1.3120", "0.7930"]
    assert exact.split() == ["caption-coco/exact", "0.0100"]
    released = evaluate.render(metrics, "OpenGVLab/InternVL2-2B", counts)
    assert "before training" not in released
    assert "0.7930" in released
    # A part of the set has no published values.
    fewer = evaluate.render(metrics, run, {"caption-coco": {"images": 10, "texts": 50}})
    assert "1.3120" not in fewer
    assert "0.7930" not in fewer


BLEU = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider")
RECALLS = [f"{way}_retrieval_recall@{k}" for way in ("text", "image") for k in (1, 5, 10)] + [
    "mean_recall"
]
TUTORIAL = "internvl2_2b_internlm2_1_8b_dynamic_res_2nd_finetune_lora_coco"
FLICKR = "RUN/internvl_stage2_finetune_flickr_364_bs1024_ep10"
FLICKR_CN = "RUN/internvl_stage2_finetune_flickrcn_364_bs1024_ep10"
RELEASED = "pretrained/InternVL-14B-224px"
GUIDES = {
    # Model or run, as the guides name it, evaluation and mode -> values as they print them.
    ("pretrained/InternVL2-2B", "caption-coco", ""): (64.0, 46.3, 32.0, 21.4, 26.7, 50.4, 79.3),
    (f"RUN/{TUTORIAL}", "caption-coco", ""): (80.5, 64.9, 50.4, 38.5, 30.0, 59.5, 131.2),
    (RELEASED, "caption-coco", ""): (78.8, 63.5, 49.1, 37.1, 30.1, 59.0, 128.2),
    (RELEASED, "caption-flickr30k", ""): (71.8, 53.5, 38.3, 27.0, 25.3, 53.1, 79.2),
    (RELEASED, "caption-nocaps", ""): (85.2, 71.7, 57.3, 44.3, 30.1, 60.7, 113.7),
    (FLICKR, "retrieval-flickr30k", "c_"): (97.2, 100.0, 100.0, 88.5, 98.4, 99.2, 97.2),
    (FLICKR, "retrieval-flickr30k", "g_"): (97.9, 100.0, 100.0, 89.6, 98.6, 99.2, 97.6),
    (FLICKR_CN, "retrieval-flickr30k-cn", "c_"): (96.5, 99.9, 100.0, 85.2, 97.0, 98.5, 96.2),
    (FLICKR_CN, "retrieval-flickr30k-cn", "g_"): (96.9, 99.9, 100.0, 85.9, 97.1, 98.7, 96.4),
}


@pytest.mark.parametrize("model", GUIDES, ids="-".join)
def test_every_number_of_the_guides(model, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    name, evaluation, mode = model
    if name.startswith("RUN/"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "recipe.yaml").touch()
    metrics = BLEU if evaluation.startswith("caption") else RECALLS
    for metric, value in zip(metrics, GUIDES[model], strict=True):
        # The tables print a decimal of a percent.
        shown = evaluate.published(name, f"{evaluation}/{mode}{metric}")
        assert shown == pytest.approx(value / 100, abs=6e-4), metric
