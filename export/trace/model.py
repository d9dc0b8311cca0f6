"""What is being exported: the transformers model inside, its kind, and a private copy to trace."""

from __future__ import annotations

import copy
import inspect
import itertools
import sys
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flora_fx.errors import ExportError, require
from flora_fx.quantized import QuantizedLinear
from flora_fx.quantized.formats.live import with_quantized_linears
from flora_fx.storage.casting import cast_later

from .shapes_alone import is_large

__all__ = ["DTYPES", "Kind", "kind_of", "private_copy", "unwrap"]

Kind = Literal["causal-lm", "seq2seq-lm", "encoder"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""The dtypes that ONNX Runtime computes in, by the names that manifests use."""

_SUPPORTED = (
    "export_onnx takes a transformers causal language model (Llama, Qwen, GPT-2, OPT, ...), an encoder-decoder "
    "(T5, BART, Marian, Whisper, TrOCR, ...) or an encoder (BERT, ViT, ...), alone or in a PEFT model with LoRA or "
    "FFBA adapters"
)


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model with its adapters in place: what a PEFT model wraps.

    Raises:
        ExportError: neither a transformers model nor a PEFT model with adapters inside the layers.
    """
    transformers = require("transformers", "hf")
    peft: Any = sys.modules.get("peft")  # who holds a PEFT model has imported it
    if peft is not None and isinstance(model, peft.PeftModel):
        if model.active_peft_config.is_prompt_learning:
            method = model.active_peft_config.peft_type.value
            raise ExportError(f"{method} adds virtual tokens, which are not in the layers; {_SUPPORTED}")
        model = model.base_model.model
    if not isinstance(model, transformers.PreTrainedModel):
        name = f"{type(model).__module__}.{type(model).__qualname__}"
        raise ExportError(f"{name} is not a transformers model; {_SUPPORTED}")
    return model


def kind_of(model: nn.Module) -> Kind:
    """Whether a transformers model generates tokens, from what, or encodes.

    Raises:
        ExportError: a recurrent model, an encoder-decoder without a head for tokens, or one that generates something
            else than text.
    """
    config: Any = model.config
    name = type(model).__name__
    if getattr(model, "_is_stateful", False):
        raise ExportError(f"{name} keeps a recurrent state instead of keys and values; {_SUPPORTED}")
    generates = model.can_generate()  # type: ignore[operator]
    names = require("transformers.models.auto.modeling_auto", "hf")
    if getattr(config, "is_encoder_decoder", False):
        known = {
            *names.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values(),
            *names.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values(),
        }
        if name in names.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values():
            if "input_ids" in inspect.signature(model.forward).parameters:
                raise ExportError(f"{name} reads text beside its images, which is not exported; {_SUPPORTED}")
            known.add(name)
        if not generates or name not in known:
            raise ExportError(f"{name} is an encoder-decoder that generates no text; {_SUPPORTED}")
        return "seq2seq-lm"
    if not generates:
        return "encoder"
    if name not in names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ExportError(f"{name} is no causal language model; {_SUPPORTED}")
    return "causal-lm"


def private_copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of all but the weights, which are shared: whatever is done to it, ``model`` stays as it was.

    Its Parameters are frozen objects of their own on the same storage. Its modules, configs and mode are its own, as
    are the buffers that are in no state dict: some modules write to those as they run (LongRoPE its frequencies).
    Quantized linear layers of other libraries are `QuantizedLinear` in it.

    Args:
        model: in any mode, on any device.
        dtype: cast the floating-point weights (then they are not shared); the parameters of a large model when they are
            read, see `cast_later`. Scales of quantized weights keep theirs, and what is not in the state dict, such as
            rotary frequencies, as it does in ``from_pretrained(dtype=...)``.

    Returns:
        the copy, in eval mode.

    Raises:
        ExportError: a quantized layer cannot be taken over as it is.

    >>> layer = nn.Linear(2, 3)
    >>> private = private_copy(layer)
    >>> private.weight.data_ptr() == layer.weight.data_ptr(), private.training, layer.training
    (True, False, True)
    """
    copied = with_quantized_linears(model)
    if copied.left:
        raise ExportError(f"{type(model).__name__} cannot be exported: its {copied.told()}")
    model = copied.model
    saved = set(model.state_dict())
    cast = saved - {f"{name}.scales" for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    memo: dict[int, Any] = {}
    large = dtype is not None and is_large(model, dtype)
    for name, tensor in itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    ):
        value = tensor.detach()
        if name not in saved and not isinstance(tensor, nn.Parameter):
            value = value.clone()
        if dtype is not None and value.is_floating_point() and name in cast:
            value = cast_later(value, dtype) if large and isinstance(tensor, nn.Parameter) else value.to(dtype)
        memo.setdefault(id(tensor), _like(tensor, value))
    private = copy.deepcopy(model, memo).eval()
    if dtype is not None and hasattr(private, "config"):
        private.config.dtype = dtype
    return private


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
