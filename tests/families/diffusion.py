"""diffusers' models, with LoRA as diffusers puts it there: `add_adapter`, or a file that `load_lora_adapter` reads."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import nn

from .adapt import Case, config, perturbed, values

__all__ = ["autoencoder", "flux", "sd3", "unet", "wan"]

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def added(model: Any, inputs: dict[str, Any], targets: list[str] | None = None) -> Case:
    """As it is trained: `add_adapter`."""
    every = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    model.add_adapter(config(perturbed(model), target_modules=targets or every))
    return Case(model.double().eval().requires_grad_(False), inputs)


def loaded(model: Any, inputs: dict[str, Any]) -> Case:
    """As it is used: `load_lora_adapter` from safetensors."""
    perturbed(model)
    twin = type(model).from_config(model.config)
    twin.load_state_dict(model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        added(twin, inputs).model.float().save_lora_adapter(folder)
        model.load_lora_adapter(folder, prefix=None, use_safetensors=True)
    return Case(model.double().eval().requires_grad_(False), inputs)


def flux() -> Case:
    """Two streams of tokens, then one; all linear layers."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=12,
        num_attention_heads=4,
        joint_attention_dim=40,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 4, 4),
        guidance_embeds=True,
    )
    inputs = {
        "hidden_states": values(2, 9, 16),
        "encoder_hidden_states": values(2, 5, 40),
        "pooled_projections": values(2, 20),
        "timestep": torch.tensor([0.3, 0.7], dtype=torch.float64),
        "guidance": torch.tensor([3.5, 3.5], dtype=torch.float64),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(3.0)).double(),
        "txt_ids": torch.zeros(5, 3, dtype=torch.float64),
        "return_dict": False,
    }
    return added(model, inputs)


def sd3() -> Case:
    """Two streams, attention twice in the first block (SD 3.5); all linear layers."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=4,
        joint_attention_dim=40,
        caption_projection_dim=48,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    inputs = {
        "hidden_states": values(2, 4, 8, 8),
        "encoder_hidden_states": values(2, 5, 40),
        "pooled_projections": values(2, 20),
        "timestep": torch.tensor([3, 700]),
        "return_dict": False,
    }
    return loaded(model, inputs)


def wan() -> Case:
    """Video; all linear layers."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=40,
        freq_dim=16,
        ffn_dim=80,
        num_layers=2,
        rope_max_seq_len=32,
    )
    inputs = {
        "hidden_states": values(1, 4, 2, 8, 8),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": values(1, 5, 40),
        "return_dict": False,
    }
    return loaded(model, inputs)


def unet() -> Case:
    """Stable Diffusion's, with the targets of LyCORIS' and kohya's files: attention, MLPs and convolutions."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 24),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=40,
        attention_head_dim=4,
        use_linear_projection=True,
    )
    inputs = {
        "sample": values(2, 4, 8, 8),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": values(2, 5, 40),
        "return_dict": False,
    }
    return added(model, inputs, [*ATTENTION, "proj_in", "proj_out", "proj", "ff.net.2", "conv1", "conv_shortcut"])


def autoencoder() -> Case:
    """Stable Diffusion's, its attention in the middle."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(16, 24),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=8,
    )
    return added(model, {"sample": values(2, 3, 8, 8), "return_dict": False}, ATTENTION)
