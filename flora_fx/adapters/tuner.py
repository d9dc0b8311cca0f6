"""The tuner: PEFT's machinery (names, switching, saving, loading) over FFBA's places."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features
from torch import nn

from flora_fx.errors import AdapterError

from .blocks import Block, find_blocks
from .config import FloraConfig
from .directions import begin_with_directions
from .layer import CANNOT_MERGE, FloraLayer
from .link import Link
from .registration import PREFIX

__all__ = ["FloraModel", "Path", "find_places"]


@dataclass(frozen=True)
class Path:
    """One down-projection and its up-projections, by the names of the modules.

    Attributes:
        reads: the module whose input is read.
        writes: the modules whose outputs are added to.
        beside: the projections that read the same; none where a norm's input is read.
    """

    reads: str
    writes: tuple[str, ...]
    beside: tuple[str, ...]


def find_places(model: nn.Module, config: FloraConfig) -> list[Path]:
    """Where a configuration's adapters read and write.

    Args:
        model: a transformers model.
        config: the placement, and which blocks.

    Raises:
        AdapterError: the model has no such blocks, no norm before them (``ends="backward"``), or none that follows
            another (``placement="cross"``).
    """
    blocks = find_blocks(model, config)
    if config.placement == "shared":
        return [Path(block.first[0], (*block.first, block.last), block.first) for block in blocks]
    if config.placement == "cross":
        follows = [(a, b) for a, b in pairwise(blocks) if a.stack == b.stack]
        if not follows:
            raise AdapterError(f"placement 'cross' needs a block after another one; {type(model).__name__} has none")
        return [Path(block.last, following.first, (block.last,)) for block, following in follows]
    if config.ends == "forward":
        return [Path(block.first[0], block.first, block.first) for block in blocks]
    if config.ends == "backward":
        return [Path(_norm(block), (block.last,), ()) for block in blocks]
    return [Path(block.first[0], (block.last,), block.first) for block in blocks]


def _norm(block: Block) -> str:
    if not block.norm:
        raise AdapterError(
            f"ends='backward' reads what comes before a block's norm, and no norm was found before {block.kind} of "
            f"{block.stack}.{block.layer}; use ends='both'"
        )
    return block.norm


class FloraModel(BaseTuner):
    """A model with FFBA adapters: what `peft.get_peft_model` makes of a `FloraConfig`."""

    prefix = PREFIX
    tuner_layer_cls = FloraLayer

    def _prepare_adapter_config(self, peft_config: FloraConfig, model_config: dict[str, Any]) -> FloraConfig:
        return peft_config

    def _prepare_model(self, peft_config: FloraConfig, model: nn.Module) -> None:
        paths = find_places(model, peft_config)
        for name in dict.fromkeys(name for path in paths for name in (path.reads, *path.writes)):
            _require_fitting(name, model.get_submodule(name), reads_norm=peft_config.ends == "backward")
        links = [(path, Link(path.reads, len(path.writes))) for path in paths]
        self._reads = {path.reads: link for path, link in links}
        self._beside = {path.reads: [_base(model.get_submodule(name)) for name in path.beside] for path in paths}
        self._writes = {name: link for path, link in links for name in path.writes}
        peft_config.target_modules = frozenset((*self._reads, *self._writes))

    @staticmethod
    def _check_target_module_exists(peft_config: FloraConfig, key: str) -> bool:
        return key in peft_config.target_modules

    def _create_and_replace(
        self,
        peft_config: FloraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, FloraLayer) else FloraLayer(target, current_key)
        features_in, features_out = _features(layer.get_base_layer())
        reads, writes = self._reads.get(current_key), self._writes.get(current_key)
        layer.attach(
            adapter_name,
            peft_config,
            None if reads is None else (reads, features_in),
            None if writes is None else (writes, features_out),
        )
        if peft_config.init == "svd" and reads is not None and not peft_config.inference_mode:
            begin_with_directions(layer.flora_A[adapter_name], self._beside[current_key], current_key)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and activate another one in all layers where it was the active one.

        Args:
            adapter_name: its name.

        Raises:
            ValueError: there is none of that name.
        """
        super().delete_adapter(adapter_name)
        if self.active_adapters:  # each layer chose among its own; ends of different adapters do not meet
            self.set_adapter(self.active_adapters)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        if kwargs.get("adapter_names") is not None:
            raise AdapterError(
                "FFBA has no adapter_names: call flora_fx.MixedAdapters(model, names) with adapter_ids, where each row "
                "has its own; or activate one with set_adapter, and batch by adapter"
            )
        return nullcontext()

    def _check_merge_allowed(self) -> None:
        raise AdapterError(CANNOT_MERGE)


def _base(module: nn.Module) -> Any:
    return module.get_base_layer() if isinstance(module, FloraLayer) else module


def _features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a projection or a norm; zeros for anything else."""
    if _is_norm(module):
        size: Any = module.weight.shape[0]  # type: ignore[index]
        return int(size), int(size)
    features: tuple[int | None, int | None] = _get_in_out_features(module)
    return features[0] or 0, features[1] or 0


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.dim() == 1


def _require_fitting(name: str, module: nn.Module, *, reads_norm: bool) -> None:
    base = _base(module)
    if isinstance(base, BaseTunerLayer):
        raise AdapterError(f"{name} carries an adapter of another kind ({type(base).__name__}); unload it first")
    if not (reads_norm and _is_norm(base)) and _get_in_out_features(base)[0] is None:
        raise AdapterError(f"{name} is a {type(base).__name__}; FFBA knows linear layers")
