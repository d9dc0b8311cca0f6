"""Adapters as other tools lay them out, read as PEFT has them where that is exact, else named as what they are.

PEFT            ``base_model.model.layers.0.q_proj.lora_A.weight`` [rank, in], ``lora_B`` [out, rank], alpha / rank
wrapped         the same with ``_orig_mod.`` of torch.compile, or FSDP's, somewhere in the name: left out
bare            the same without ``base_model.model.``: put in front
named           ``lora_A.default.weight``, as ``state_dict()`` has it: the adapter's name is left out
twofold         ``lm_head.modules_to_save.weight`` beside ``lm_head.weight``, as PEFT saves resized ones: one of them
MLX             ``layers.0.q_proj.lora_a`` [in, rank], ``lora_b`` [rank, out], times ``scale``: transposed
kohya           ``lora_te_layers_0_q_proj.lora_down.weight`` [rank, in], ``lora_up``, ``alpha``: renamed by the modules

torchtune's own layout (another order of rows), loralib's (no scale), diffusers' and kohya's of whole pipelines (another
model), and variants of them that are more than ``B (A x)`` are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flora_fx.errors import AdapterError

from .wording import examples

__all__ = ["AS_PEFT", "KOHYA", "PREFIX", "as_peft", "refuse_pipelines", "with_peft_names"]

PREFIX = "base_model.model."

_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_NAMED = re.compile(r"(?P<front>.+\.lora_(?:A|B|magnitude_vector))\.(?P<name>[^.]+)(?P<end>\.weight)")
_SAVED = re.compile(r"\.modules_to_save\.(default\.)?")
KOHYA = re.compile(r"(?P<part>lora_(?:unet|te\d?))_(?P<module>[^.]+)\.(?P<which>.+)")
# Not ``transformer.h.``: those are GPT-2's.
_PIPELINE = re.compile(r"((unet|prior|text_encoder(_\d)?)\.|transformer\.\w*transformer_blocks\.).*lora")
_TORCHTUNE = re.compile(r".+\.lora_(a|b)\.weight")
_LORALIB = re.compile(r".+\.lora_(A|B)")

AS_PEFT = "PeftModel.save_pretrained() writes a layout that is read here"


def with_peft_names(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a PEFT adapter by the names that PEFT itself gives them.

    Raises:
        AdapterError: two tensors would have one name, or the layout is another tool's.
    """
    _refuse_others(tensors, path)
    bare = {_WRAPPERS.sub("", key): key for key in tensors}
    if len(bare) != len(tensors):
        raise AdapterError(
            f"{path} holds {len(tensors)} tensors under {len(bare)} names, once those of torch.compile and FSDP are "
            "left out; save the adapter again from the model inside"
        )
    if all(key.startswith(f"module.{PREFIX}") for key in bare):  # DistributedDataParallel
        bare = {key.removeprefix("module."): old for key, old in bare.items()}
    adapters = {match["name"] for key in bare if (match := _NAMED.fullmatch(key))}
    if len(adapters) > 1:
        raise AdapterError(
            f"{path} holds {len(adapters)} adapters{examples(sorted(adapters))}; save one: "
            "model.save_pretrained(directory, selected_adapters=[name])"
        )
    front = "" if any(key.startswith("base_model.") for key in bare) else PREFIX
    found: dict[str, Tensor] = {}
    for key, old in sorted(bare.items()):
        name = front + _SAVED.sub(".", _NAMED.sub(r"\g<front>\g<end>", key))
        if not _same(found.setdefault(name, tensors[old]), tensors[old]):
            raise AdapterError(
                f"{path} holds two tensors for {name}, which differ; save the adapter again with save_pretrained()"
            )
    return dict(sorted(found.items()))


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and one.equal(other))


def _refuse_others(tensors: Mapping[str, Tensor], path: Path) -> None:
    keys = list(tensors)
    if found := [key for key in keys if _TORCHTUNE.fullmatch(key)]:
        raise AdapterError(
            f"{path} is in torchtune's own layout{examples(found)}, whose rows of q and k stand in another order than "
            "transformers'; let torchtune's FullModelHFCheckpointer write it, which gives PEFT's layout"
        )
    if found := [key for key in keys if _LORALIB.fullmatch(key)]:
        raise AdapterError(
            f"{path} is in loralib's layout{examples(found)}, which does not say by what B (A x) is scaled; {AS_PEFT}"
        )
    if any(KOHYA.fullmatch(key) for key in keys):
        raise AdapterError(
            f"{path} is in kohya's layout{examples(keys)} and has an adapter_config.json, which says other things; "
            "put the file into a directory of its own"
        )
    refuse_pipelines(keys, path)


def refuse_pipelines(keys: Collection[str], path: Path) -> None:
    """
    Raises:
        AdapterError: the LoRA of a diffusers pipeline.
    """
    if found := [key for key in keys if _PIPELINE.match(key)]:
        raise AdapterError(
            f"{path} is the LoRA of a diffusers pipeline{examples(found)}, not of a transformers model; load it with "
            "pipeline.load_lora_weights(...) and pass the pipeline's unet or transformer to flora_fx.capture"
        )


def as_peft(
    pairs: Mapping[str, Mapping[str, Tensor]], ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of the same adapter in PEFT's layout; scale is alpha / rank."""
    rank = next(iter(ranks.values()), 1)
    alpha = next(iter(alphas.values()), 1.0)
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(pairs),
        "rank_pattern": {f"^{re.escape(name)}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
    }
    return settings, {
        f"{PREFIX}{module}.lora_{which}.weight": tensor
        for module, pair in sorted(pairs.items())
        for which, tensor in sorted(pair.items())
    }
