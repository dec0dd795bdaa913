"""Keys of other trainers that people try in a recipe, and ours with the same effect.

Names of `transformers`, of the original's scripts, and of common fine-tuning tools.
"""

from functools import cache

_LENGTHS = "a longer sample is cut at its end"
_PER_DEVICE = (
    "counts samples over all devices; how they split into rows and devices changes no result"
)
_TRAINED = "it lists what trains, all else is frozen"
_ADAPTERS = "adapters are a section, `model.lora: {rank: 16, on: [language_model]}`"

# One entry for each of ours: a new spelling is one more word.
_THEIRS: tuple[tuple[str, str, str], ...] = (
    ("optim.lr", "learning_rate base_lr peak_lr max_lr", ""),
    ("optim.weight_decay", "wd decay", ""),
    ("optim.schedule", "lr_scheduler_type lr_scheduler scheduler lr_schedule", ""),
    ("optim.min_lr_ratio", "min_lr min_lr_rate lr_scheduler_kwargs", "a share of optim.lr"),
    ("optim.warmup_ratio", "warmup warmup_proportion", ""),
    ("optim.warmup_steps", "num_warmup_steps warmup_iters", ""),
    ("optim.betas", "adam_beta1 adam_beta2 beta1 beta2", "a list of two, [0.9, 0.999]"),
    ("optim.eps", "adam_epsilon adam_eps epsilon", ""),
    ("optim.max_grad_norm", "gradient_clipping clip_grad grad_clip gradient_clip_val", ""),
    ("optim.name", "optimizer optimizer_type", ""),
    ("optim.layer_decay", "vit_layer_decay_rate qllama_layer_decay_rate layerwise_lr_decay", ""),
    (
        "global_batch",
        "batch_size bs per_device_train_batch_size per_device_batch_size per_gpu_train_batch_size "
        "per_device_bs train_batch_size global_batch_size total_batch_size micro_batch_size "
        "gradient_accumulation_steps grad_accum accumulation_steps accumulate_grad_batches "
        "gradient_acc "
        "train_micro_batch_size_per_gpu",
        _PER_DEVICE,
    ),
    ("epochs", "num_train_epochs num_epochs epoch max_epochs n_epochs", ""),
    ("steps", "max_steps num_steps train_steps num_train_steps max_iters iterations", ""),
    ("drop_last", "dataloader_drop_last", ""),
    ("model.lora.rank", "lora_rank lora_r use_llm_lora use_lora r", _ADAPTERS),
    ("model.lora.alpha", "lora_alpha", ""),
    ("model.lora.dropout", "lora_dropout", ""),
    (
        "model.lora.on",
        "use_backbone_lora lora_target_modules target_modules lora_target lora_modules",
        "a list of vision_tower and language_model; for both `model.lora: {rank: 16, on: "
        "[vision_tower, language_model]}`",
    ),
    (
        "model.train",
        "freeze_backbone freeze_llm freeze_mlp freeze_vit freeze_vision_tower freeze_aligner "
        "freeze_qllama freeze_model freeze train_llm train_vit tune_vision tune_mm_llm tune_mm_mlp "
        "trainable unfreeze_lm_head unfreeze_qllama_head unfreeze_crossattn finetuning_type "
        "train_type",
        _TRAINED,
    ),
    ("model.train_last_vision_blocks", "unfreeze_vit_layers", ""),
    ("model.quantize", "load_in_4bit load_in_8bit quantization_bit quant_bits quantization", ""),
    ("model.drop_path", "drop_path_rate", ""),
    ("model.id", "model_name_or_path model_name model_path model_id pretrained base_model", ""),
    ("model.vision", "vision_path", ""),
    ("model.language", "llm_path", ""),
    ("model.projector", "mlp_path", ""),
    ("model.select_layer", "vision_select_layer", ""),
    ("data.max_tokens", "max_seq_length max_seq_len max_length model_max_length", _LENGTHS),
    ("data.max_tokens", "cutoff_len seq_len seq_length sequence_length", _LENGTHS),
    ("data.row_tokens", "max_packed_tokens packing_length", "the length of a packed row"),
    ("data.max_tiles", "num_images_expected", "the most tiles of a packed row"),
    ("data.packing", "use_packed_ds pack_dataset sample_packing", "samples are always packed"),
    ("data.packing_buffers", "max_buffer_size", ""),
    ("data.tiles.max", "max_dynamic_patch max_num max_patches", "the most tiles of an image"),
    ("data.tiles.min", "min_dynamic_patch", ""),
    ("data.tiles.max", "dynamic_image_size", "1 leaves an image in one tile"),
    ("data.tiles.thumbnail", "use_thumbnail", ""),
    ("data.tiles.size", "force_image_size image_size resolution", "side of a tile in pixels"),
    ("data.tiles.pad_square", "pad2square image_aspect_ratio", ""),
    ("data.normalize", "normalize_type", ""),
    ("data.video.min_frames", "min_num_frame min_num_frames", ""),
    ("data.video.max_frames", "max_num_frame max_num_frames num_frames", ""),
    ("data.template", "conv_style chat_template conv_template", ""),
    ("data.system_message", "system system_prompt", ""),
    ("data.meta", "meta_path", ""),
    (
        "data.sources",
        "dataset datasets dataset_name train_file train_files data_path data_files train_data "
        "train_dataset annotation",
        "a list of annotation files, `[{name: mine, annotations: train.jsonl, images: photos}]`",
    ),
    ("data.sources.N.images", "image_folder image_dir image_root root media_dir", ""),
    ("data.sources.N.repeat", "repeat_time", ""),
    ("data.sources.N.augment", "data_augment", ""),
    ("data.workers", "dataloader_num_workers num_workers preprocessing_num_workers", ""),
    ("objective.weighting", "loss_reduction", ""),
    ("objective.loss_normalization", "loss_reduction_all_gather", ""),
    ("objective.name", "task loss stage loss_type", ""),
    ("compute.checkpointing", "gradient_checkpointing grad_checkpoint grad_checkpointing", ""),
    ("compute.checkpointing", "activation_checkpointing", ""),
    ("compute.attention", "attn_implementation flash_attn use_flash_attn attn_impl", ""),
    ("compute.compile", "torch_compile", ""),
    ("compute.float8", "fp8", ""),
    ("dtype", "bf16 fp16 precision mixed_precision torch_dtype", "bfloat16 or float32"),
    ("run", "output_dir out_dir save_dir work_dir logging_dir output", "the run folder"),
    (
        "run",
        "resume resume_from_checkpoint overwrite_output_dir",
        "the same command goes on with the run in this folder, another folder starts anew",
    ),
    ("checkpoint.every", "save_steps save_every save_strategy save_interval", "in steps"),
    ("checkpoint.keep", "save_total_limit", ""),
    ("checkpoint.best", "metric_for_best_model load_best_model_at_end", ""),
    ("checkpoint.best_is", "greater_is_better", ""),
    ("stop.patience", "early_stopping_patience patience", ""),
    (
        "evals.NAME.every",
        "eval_steps eval_strategy evaluation_strategy eval_every val_check_interval do_eval",
        "in steps, for each evaluation",
    ),
    ("evals.NAME.batch_size", "per_device_eval_batch_size eval_batch_size", ""),
    (
        "evals.NAME.annotations",
        "eval_dataset val_dataset validation_file val_data eval_file validation_split",
        "an evaluation is a section, `evals: {val: {type: loss, annotations: val.jsonl}}`",
    ),
    ("log_every", "logging_steps log_steps log_interval", "in steps"),
    ("wandb", "report_to wandb_project use_wandb", "the name of the project"),
    ("seed", "random_seed data_seed manual_seed", ""),
)
"""(our key, theirs, a note for the message)."""


OPTIONS = {
    **dict.fromkeys(
        ("gpus", "num_gpus", "nproc_per_node"),
        "all GPUs are used; `--gpus N` uses fewer",
    ),
    **dict.fromkeys(
        ("partition", "nodes", "nnodes"),
        "`internvl launch RECIPE --nodes N --partition NAME` makes a Slurm job",
    ),
}
"""Key that people try in a recipe -> the option of the command line that stands for it."""


@cache
def ours() -> dict[str, tuple[str, str]]:
    """Returns a foreign key -> (our dotted key, note)."""
    return {name: (key, note) for key, names, note in _THEIRS for name in names.split()}
