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

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flora_fx.errors import AdapterError

from .places import ADAPTER_FILE, MLX_FILE
from .wording import examples, shape

__all__ = ["PREFIX", "is_lone", "is_mlx", "kohya_to_peft", "mlx_to_peft", "refuse_pipelines", "with_peft_names"]

PREFIX = "base_model.model."

_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_NAMED = re.compile(r"(?P<front>.+\.lora_(?:A|B|magnitude_vector))\.(?P<name>[^.]+)(?P<end>\.weight)")
_SAVED = re.compile(r"\.modules_to_save\.(default\.)?")
_KOHYA = re.compile(r"(?P<part>lora_(?:unet|te\d?))_(?P<module>[^.]+)\.(?P<which>.+)")
_KOHYA_PARTS = {"lora_down.weight", "lora_up.weight", "alpha"}
# Not ``transformer.h.``: those are GPT-2's.
_PIPELINE = re.compile(r"((unet|prior|text_encoder(_\d)?)\.|transformer\.\w*transformer_blocks\.).*lora")
_TORCHTUNE = re.compile(r".+\.lora_(a|b)\.weight")
_LORALIB = re.compile(r".+\.lora_(A|B)")

_AS_PEFT = "PeftModel.save_pretrained() writes a layout that is read here"


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
            f"{path} is in loralib's layout{examples(found)}, which does not say by what B (A x) is scaled; {_AS_PEFT}"
        )
    if any(_KOHYA.fullmatch(key) for key in keys):
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


# --- MLX --------------------------------------------------------------------------------------------------


def is_mlx(settings: Mapping[str, Any]) -> bool:
    """Whether an ``adapter_config.json`` is mlx-lm's.

    >>> is_mlx({"fine_tune_type": "lora"}), is_mlx({"peft_type": "LORA"})
    (True, False)
    """
    return "peft_type" not in settings and ("lora_parameters" in settings or "fine_tune_type" in settings)


def mlx_to_peft(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What mlx-lm trained: ``y + scale · (x a) b``, a [in, rank], b [rank, out].

    Raises:
        AdapterError: no LoRA of linear layers, or one whose scale is not certain.
    """
    kind, parameters = settings.get("fine_tune_type", "lora"), settings.get("lora_parameters")
    fuse = "fuse it into its base with mlx_lm.fuse and export that"
    if kind != "lora":
        raise AdapterError(f"{path} was trained by MLX with fine_tune_type {kind!r}; only 'lora' is read here: {fuse}")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        raise AdapterError(
            f"{path.parent}: adapter_config.json is MLX's and names no scale in lora_parameters; put the file there "
            "that mlx_lm.lora wrote"
        )
    if isinstance(parameters, dict) and parameters.get("alpha") is not None:
        raise AdapterError(
            f"{path.parent}: adapter_config.json is MLX's and names alpha and scale, which versions of MLX computed "
            f"with in different ways; {fuse}"
        )
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, which = key.rpartition(".")
        if which not in ("lora_a", "lora_b") or tensor.dim() != 2:
            raise AdapterError(
                f"{path}: {key} ({shape(tensor.shape)}) is no lora_a or lora_b of a linear layer, and "
                f"adapter_config.json is MLX's; {fuse}, or put the adapter's own adapter_config.json beside it"
            )
        pairs.setdefault(module, {})["A" if which == "lora_a" else "B"] = tensor.t().contiguous()
    ranks = {module: pair["A"].shape[0] for module, pair in pairs.items() if "A" in pair}
    scales = {module: scale * rank for module, rank in ranks.items()}
    return _as_peft(pairs, ranks, scales)


# --- kohya ------------------------------------------------------------------------------------------------


def is_lone(directory: Path) -> Path | None:
    """The file of an adapter that comes without a config: the only safetensors of a directory that is no model."""
    files = sorted(directory.glob("*.safetensors"))
    known = (directory / "config.json").is_file() or any(file.name in (ADAPTER_FILE, MLX_FILE) for file in files)
    return files[0] if len(files) == 1 and not known else None


def kohya_to_peft(
    tensors: Mapping[str, Tensor], path: Path, modules: Collection[str] | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What kohya's scripts trained: up [out, rank], down [rank, in], times alpha / rank; names with ``_`` for ``.``.

    Args:
        tensors: of the file.
        path: of the file, for messages.
        modules: names of the model's; None where no model is at hand.

    Raises:
        AdapterError: another layout, another model, or more than ``B (A x)``.
    """
    refuse_pipelines(tensors, path)
    matches = {key: _KOHYA.fullmatch(key) for key in tensors}
    if odd := [key for key, match in matches.items() if match is None]:
        raise AdapterError(
            f"{path} has no adapter_config.json beside it, and {odd[0]} is no name of kohya's; {_AS_PEFT}"
        )
    found = {key: match for key, match in matches.items() if match is not None}
    if odd := [key for key, match in found.items() if match["which"] not in _KOHYA_PARTS]:
        raise AdapterError(
            f"{path} is kohya's and more than a LoRA of linear layers{examples(odd)}; merge it into its base with "
            "kohya's scripts"
        )
    parts = sorted({match["part"] for match in found.values()})
    if len(parts) > 1 or parts == ["lora_unet"]:
        raise AdapterError(
            f"{path} is kohya's LoRA of a diffusion pipeline ({', '.join(parts)}), not of one transformers model; load "
            "it with diffusers' pipeline.load_lora_weights(...) and pass the pipeline's unet to flora_fx.capture"
        )
    if modules is None:
        raise AdapterError(
            f"{path} is kohya's, whose names say which layer is meant only beside the model; load it with load_model "
            "and save it with PeftModel.save_pretrained()"
        )
    # Before transformers 5 CLIP's text model had all its layers in a module ``text_model``: kohya's names have it.
    names = {name.replace(".", "_"): name for name in modules}
    names = {f"text_model_{flat}": name for flat, name in names.items()} | names
    pairs: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, match in found.items():
        module = names.get(match["module"])
        if module is None:
            raise AdapterError(
                f"{path}: {key} is of no layer of this model; is it the adapter of another model (an unet, another "
                "text encoder)?"
            )
        if match["which"] == "alpha":
            alphas[module] = float(tensors[key])
        else:
            which = "A" if match["which"].startswith("lora_down") else "B"
            pairs.setdefault(module, {})[which] = tensors[key]
    ranks = {module: pair["A"].shape[0] for module, pair in pairs.items() if "A" in pair}
    scaled = {module: alphas.get(module, float(rank)) for module, rank in ranks.items()}
    if odd := [module for module, alpha in scaled.items() if not math.isfinite(alpha) or alpha == 0]:
        raise AdapterError(f"{path}: alpha of {odd[0]} is {scaled[odd[0]]}, which must be a number and not 0")
    return _as_peft(pairs, ranks, scaled)


def _as_peft(
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
