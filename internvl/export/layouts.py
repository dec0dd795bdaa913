"""Export layouts of the two families: formats, files besides the weights, and probe logits.

`LAYOUTS` has an entry for each key of `families.FAMILIES`.
"""

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration

from internvl.data.images import STATISTICS
from internvl.errors import ExportError
from internvl.inference import families
from internvl.inference.chat import Chat
from internvl.inference.families import Description
from internvl.inference.opened import OpenedModel
from internvl.models import configs, hub
from internvl.models.chat import model as chat_model
from internvl.models.dual import configs as dual_configs
from internvl.models.dual import files as dual_files
from internvl.models.dual.configs import DualConfig
from internvl.models.dual.model import DualModel

Format = Literal["hf", "official"]


class Layout(ABC):
    """Formats, files and probe of one family's export."""

    @abstractmethod
    def check_format(self, config: Any, format: Format) -> None:
        """Raises ExportError if the format cannot hold the model."""

    @abstractmethod
    def describe(self, opened: OpenedModel) -> Description | None:
        """Returns tokenizer and template of an opened folder; None for InternVL-14B."""

    @abstractmethod
    def conversation(self, handle: Any) -> Chat | None:
        """Returns the same of a loaded model."""

    @abstractmethod
    def to_official(self, config: Any) -> dict[str, Any]:
        """Returns config.json of the official layout."""

    @abstractmethod
    def official_files(self, config: Any) -> dict[str, dict[str, Any]]:
        """Returns further files of the official layout: name -> content."""

    @abstractmethod
    def load(
        self, files: hub.ModelFolder, config: Any, device: torch.device, dtype: torch.dtype
    ) -> Any:
        """Loads a folder of either layout with this package's classes."""

    @abstractmethod
    def logits(self, model: Any) -> Tensor:
        """Returns the logits of a fixed image and text; the model is in evaluation mode."""

    @torch.no_grad()
    def answer(self, model: Any) -> Tensor:
        """Returns `logits` as float32 on the CPU; restores the model's mode."""
        # Dropout and stochastic depth would make two runs differ.
        training = model.training
        model.eval()
        answer = self.logits(model)
        model.train(training)
        return answer.float().cpu()


class ChatLayout(Layout):
    """Chat models, in either format."""

    def check_format(self, config: Any, format: Format) -> None:
        """See `Layout.check_format`."""
        if format == "hf" and configs.chat_settings(config)["ps_version"] == "v1":
            raise ExportError(
                "pixel shuffle v1 (InternVL-Chat 1.1 and 1.2) exists in no class of transformers; "
                "export this model with format official (--format official)"
            )

    def describe(self, opened: OpenedModel) -> Description:
        """See `Layout.describe`."""
        return families.describe(opened)

    def conversation(self, handle: Any) -> Chat:
        """See `Layout.conversation`."""
        return handle

    def to_official(self, config: Any) -> dict[str, Any]:
        """See `Layout.to_official`."""
        return configs.to_official(config)

    def official_files(self, config: Any) -> dict[str, dict[str, Any]]:
        """See `Layout.official_files`: none."""
        return {}

    def load(
        self, files: hub.ModelFolder, config: Any, device: torch.device, dtype: torch.dtype
    ) -> chat_model.ChatModel:
        """See `Layout.load`."""
        # Read again: of a folder just written, its own config.json must be compared.
        config = chat_model.read_config(files, config.image_token_id)
        return chat_model.materialize(config, files, device=device, dtype=dtype)

    def logits(self, model: InternVLForConditionalGeneration) -> Tensor:
        """See `Layout.logits`: (1, 8, V), also of transformers' own class."""
        config, device = model.config, model.device
        side = config.vision_config.image_size[0]
        # Drawn on the CPU: a GPU's generator gives other values for the same seed.
        generator = torch.Generator().manual_seed(0)
        pixels = torch.rand(1, 3, side, side, generator=generator)  # one tile
        words = torch.randint(0, config.text_config.vocab_size, (8,), generator=generator)
        # A placeholder among the words would ask for one visual token more than there are.
        words = torch.where(words == config.image_token_id, 0, words)
        image = torch.full((chat_model.tokens_per_tile(config, side),), config.image_token_id)
        ids = torch.cat([words[:4], image, words[4:]])[None]
        output = model(
            input_ids=ids.to(device),
            pixel_values=pixels.to(device),
            logits_to_keep=8,  # not (L, V): a vocabulary has 150,000 tokens
            use_cache=False,
        )
        return output.logits


class DualLayout(Layout):
    """InternVL-14B, in the official format."""

    def check_format(self, config: Any, format: Format) -> None:
        """See `Layout.check_format`."""
        if format == "hf":
            raise ExportError(
                "InternVL-14B exists in no class of transformers; export it with format official "
                "(--format official)"
            )
        if not config.text_config.num_query_tokens:
            raise ExportError(
                "this is InternVL-C alone, and the official layout holds InternVL-14B whole; "
                "export OpenGVLab/InternVL-14B-224px, which has the same InternVL-C"
            )

    def describe(self, opened: OpenedModel) -> None:
        """See `Layout.describe`."""

    def conversation(self, handle: Any) -> None:
        """See `Layout.conversation`."""

    def to_official(self, config: Any) -> dict[str, Any]:
        """See `Layout.to_official`."""
        return dual_configs.to_official(config)

    def official_files(self, config: Any) -> dict[str, dict[str, Any]]:
        """See `Layout.official_files`: the processor of the releases."""
        return {"preprocessor_config.json": _clip_processor(config)}

    def load(
        self, files: hub.ModelFolder, config: Any, device: torch.device, dtype: torch.dtype
    ) -> DualModel:
        """See `Layout.load`."""
        return dual_files.load_model(files, device=device, dtype=dtype)

    def logits(self, model: DualModel) -> Tensor:
        """See `Layout.logits`: embeddings and logits one after another."""
        side, vocabulary = model.config.image_size, model.config.text_config.vocab_size
        # On the CPU, as for chat models.
        generator = torch.Generator().manual_seed(0)
        pixels = torch.rand(1, 3, side, side, generator=generator).to(model.device)
        # From 1: id 0 is padding, which attention would leave out.
        ids = torch.randint(1, vocabulary, (1, 8), generator=generator).to(model.device)
        mask = model.joint_mask("itm", torch.ones_like(ids))
        queries, text = model.joint_states(model.encode_kv(model.vision_tokens(pixels)), ids, mask)
        answers = (
            *model.encode_image(pixels, ("c", "g")),
            *(model.encode_text(ids), model.itm_logits(queries), model.lm_head(text)),
        )
        # One vector: a single comparison covers every head.
        return torch.cat([answer.float().flatten() for answer in answers])


LAYOUTS: dict[str, Layout] = {"chat": ChatLayout(), "dual": DualLayout()}


def probe(model: Any) -> Tensor:
    """Returns the logits of a fixed image and text, float32 on the CPU.

    Takes a model of either family, or of transformers' own chat class.
    """
    return LAYOUTS[families.name_of(model.config)].answer(model)


def processor_files(config: InternVLConfig) -> dict[str, dict[str, Any]]:
    """Returns processor files as the -hf releases have them: file name -> content."""
    settings = configs.chat_settings(config)
    side = config.vision_config.image_size[0]
    mean, std = STATISTICS[settings["normalize"]]
    dynamic = settings["dynamic_image_size"]
    images = {
        # The class that the -hf releases name; transformers has none of InternVL's own.
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": "InternVLProcessor",
        "size": {"height": side, "width": side},
        "crop_to_patches": dynamic,
        # Without dynamic tiling an image is one tile.
        "min_patches": settings["min_dynamic_patch"] if dynamic else 1,
        "max_patches": settings["max_dynamic_patch"] if dynamic else 1,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "rescale_factor": 1 / 255,
        "resample": 3,  # PIL's bicubic
        "image_mean": list(mean),
        "image_std": list(std),
    }
    shared = ("size", "do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
    videos = {key: images[key] for key in (*shared, "rescale_factor", "resample")}
    videos |= {key: images[key] for key in ("image_mean", "image_std", "processor_class")}
    videos["video_processor_type"] = "InternVLVideoProcessor"
    processor = {
        "processor_class": "InternVLProcessor",
        "image_seq_length": config.image_seq_length,
    }
    return {
        "preprocessor_config.json": images,
        "video_preprocessor_config.json": videos,
        "processor_config.json": processor,
    }


def _clip_processor(config: DualConfig) -> dict[str, Any]:
    """Returns `preprocessor_config.json` as InternVL-14B's releases have it."""
    mean, std = STATISTICS["imagenet"]
    return {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "do_resize": True,
        "size": config.image_size,
        "resample": 3,
        "do_center_crop": True,
        "crop_size": config.image_size,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
