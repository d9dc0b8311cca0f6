"""Models that see or hear, also those that read beside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

from tests.architectures import VOCAB

from .adapt import Case, lora, values
from .text import IDS, LAYERS

__all__ = ["PATCHES", "audio", "clip", "llava", "qwen2_vl", "vision", "whisper"]

PATCHES = {"image_size": 16, "patch_size": 4}
WORDS = {"vocab_size": VOCAB, **LAYERS, **IDS}


def vision(kind: str, **options: Any) -> Callable[[], Case]:
    """A model of images by the name of its config's class."""
    return lambda: lora(hf.AutoModel.from_config(getattr(hf, kind)(**options)), {"pixel_values": values(2, 3, 16, 16)})


def audio(kind: str, **options: Any) -> Callable[[], Case]:
    """A model of waves, which its convolutions make shorter by 4."""
    convolutions = {"conv_dim": (20, 24), "conv_kernel": (4, 4), "conv_stride": (2, 2), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}

    def make() -> Case:
        settings = getattr(hf, kind)(**LAYERS, **convolutions, **positions, **options)
        return lora(hf.AutoModel.from_config(settings), {"input_values": values(2, 40)})

    return make


def whisper() -> Case:
    settings = hf.WhisperConfig(
        vocab_size=VOCAB,
        d_model=48,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=80,
        decoder_ffn_dim=80,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_mel_bins=6,
        max_source_positions=12,
        max_target_positions=64,
        **IDS,
        decoder_start_token_id=1,
    )
    inputs = {"input_features": values(2, 6, 24), "decoder_input_ids": torch.randint(3, VOCAB, (2, 5))}
    return lora(hf.WhisperForConditionalGeneration(settings), inputs)


def clip(kind: str) -> Callable[[], Case]:
    """A model of images and one of texts side by side."""

    def make() -> Case:
        parts = {"text_config": {**WORDS, "max_position_embeddings": 16}, "vision_config": {**LAYERS, **PATCHES}}
        inputs = {"input_ids": torch.randint(3, VOCAB, (2, 7)), "pixel_values": values(2, 3, 16, 16)}
        return lora(hf.AutoModel.from_config(getattr(hf, kind)(**parts)), inputs)

    return make


def llava() -> Case:
    """CLIP's images, as tokens among a Llama's."""
    image = VOCAB - 1
    settings = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**LAYERS, **PATCHES),
        text_config=hf.LlamaConfig(**WORDS, num_key_value_heads=2),
        image_token_id=image,
        image_seq_length=16,
    )
    ids = torch.cat([torch.full((2, 16), image), torch.randint(3, image, (2, 5))], 1)
    inputs = {"input_ids": ids, "pixel_values": values(2, 3, 16, 16)}
    return lora(hf.LlavaForConditionalGeneration(settings), inputs)


def qwen2_vl() -> Case:
    """Images of any size as one row of patches, positions in three dimensions."""
    start, image = VOCAB - 2, VOCAB - 1
    settings = hf.Qwen2VLConfig(
        text_config={
            **WORDS,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4},
        image_token_id=image,
        vision_start_token_id=start,
        video_token_id=VOCAB - 3,
    )
    picture = [start, *[image] * 4]
    ids = torch.tensor([[*picture, 5, 6, 7, 8]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": values(16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == image).long(),
    }
    return lora(hf.Qwen2VLForConditionalGeneration(settings), inputs)
