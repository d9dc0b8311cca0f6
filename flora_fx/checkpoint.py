"""Load a model and its adapter (LoRA or FFBA) from disk or from the Hub, refusing what would load wrongly.

transformers and peft both prefer to go on: a weight that is missing is initialised at random, an adapter key
that fits nowhere is dropped, and a NaN goes through to the last token. Each of them ends here in one error
that names the file or the tensor and says what to do. All files are checked before the base is read, so that
a bad adapter does not cost the loading of its base.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from flora_fx.checksums import check_sum
from flora_fx.errors import AdapterError, FloraError, require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CheckpointNotFoundError", "Task", "load_model", "load_tokenizer", "read_adapter"]

Task = Literal["auto", "causal-lm", "seq2seq-lm", "encoder"]

_MODEL_FILE = "model.safetensors"
_MODEL_INDEX = "model.safetensors.index.json"
_ADAPTER_FILE = "adapter_model.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"
_PREFIXES = {"LORA": ".lora_", "FLORA": ".flora_"}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
# What one checkpoint needs from a Hub repository; no pickles, no second copies of the weights.
_HUB_FILES = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "model.safetensors",
    "model-*.safetensors",
    _ADAPTER_FILE,
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class CheckpointNotFoundError(FloraError, FileNotFoundError):
    """A directory, or a file that a checkpoint cannot do without, is not there."""


def load_model(
    model: str | Path,
    adapter: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    task: Task = "auto",
    verify: bool = True,
) -> nn.Module:
    """Load a transformers model, and a PEFT adapter on it (LoRA or FFBA), ready for `flora_fx.capture`.

    Only safetensors are read, never pickles, and no code from a checkpoint is run. The model comes back in
    eval mode. An adapter is loaded unmerged in its base's dtype: once fused the two share one weight. (PEFT
    itself would keep adapters of a half-precision base in float32.)

    Args:
        model: directory with ``config.json`` and safetensors weights, or a Hub id.
        adapter: directory with ``adapter_config.json`` and ``adapter_model.safetensors``, or a Hub id; None
            for the base alone.
        dtype: of the weights; None keeps the checkpoint's own.
        task: ``"causal-lm"`` and ``"seq2seq-lm"`` (an encoder-decoder) load with the language-model head,
            ``"encoder"`` without; ``"auto"`` reads the architecture from the config.
        verify: compare the SHA-256 of every file that has one in a ``SHA256SUMS`` beside it, or in the Hub's cache
            (about a second per 1.5 GB).

    Returns:
        A ``PreTrainedModel``, or with an adapter a ``PeftModel`` around it.

    Raises:
        CheckpointNotFoundError: a directory, its config or some of its weights are missing.
        AdapterError: files that cannot be read (truncated, pickles only) or are not what was saved, an adapter of
            another kind, one that holds NaN or Inf, or whose tensors do not fit this model.
        MissingExtraError: transformers or peft is not installed.

    >>> load_model("./no-such-directory")
    Traceback (most recent call last):
    ...
    flora_fx.checkpoint.CheckpointNotFoundError: no directory './no-such-directory'; check the path
    """
    if task not in get_args(Task):
        raise ValueError(f"task is {task!r}; it must be one of {', '.join(map(repr, get_args(Task)))}")
    base_directory = _resolve(model)
    config = _check_model_files(base_directory, verify=verify)
    adapter_directory = None if adapter is None else _resolve(adapter)
    tensors = {} if adapter_directory is None else _check_adapter_files(adapter_directory, verify=verify)

    base = _load_base(base_directory, _auto_class(config, task), dtype=dtype)
    loaded = base if adapter_directory is None else _load_adapter(base, adapter_directory, tensors)
    return loaded.eval()


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer that lies in a checkpoint or in an exported directory.

    Args:
        model: a directory or a Hub id.

    Returns:
        The tokenizer, or None where the directory has none.

    Raises:
        CheckpointNotFoundError: no such directory or Hub repository.
        AdapterError: tokenizer files that transformers cannot read.
        MissingExtraError: transformers is not installed.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as empty:
    ...     print(load_tokenizer(empty))
    None
    """
    directory = _resolve(model)
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        return None
    transformers = require("transformers", "hf")
    try:
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
        raise AdapterError(
            f"{directory}: the tokenizer cannot be read ({_first_line(error)}); "
            "copy its files again from the checkpoint"
        ) from error


# --- where it lies ----------------------------------------------------------------------------------------


def _resolve(name: str | Path) -> Path:
    """The local directory of a checkpoint; a Hub id is downloaded first (or found in the Hub's cache)."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointNotFoundError(f"'{path}' is a file; pass the directory that holds it")
    if isinstance(name, Path) or _HUB_ID.fullmatch(name) is None:
        raise CheckpointNotFoundError(f"no directory '{name}'; check the path")
    hub = require("huggingface_hub", "hf")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=list(_HUB_FILES), ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        raise CheckpointNotFoundError(
            f"'{name}' is neither a directory here nor a repository that the Hub delivered "
            f"({_first_line(error)}); check the spelling, the network, or `hf auth login`"
        ) from error


# --- are the files whole ----------------------------------------------------------------------------------


def _check_model_files(directory: Path, *, verify: bool) -> dict[str, Any]:
    if not (directory / "config.json").is_file():
        if (directory / _ADAPTER_CONFIG).is_file():
            raise CheckpointNotFoundError(
                f"{directory} is an adapter, not a model; pass it as the adapter, with its base model"
            )
        raise CheckpointNotFoundError(f"{directory} has no config.json; pass a directory written by save_pretrained()")
    config = _read_json(directory / "config.json")
    paths = _weight_files(directory)
    for path in paths:
        _check_safetensors(path)
    for path in (directory / "config.json", *paths) if verify else ():
        check_sum(path)
    return config


def _weight_files(directory: Path) -> list[Path]:
    """The files of the weights, one or the shards that the index names. All of them exist."""
    if (directory / _MODEL_INDEX).is_file():
        shards = sorted(set(_read_json(directory / _MODEL_INDEX).get("weight_map", {}).values()))
        missing = [name for name in shards if not (directory / name).is_file()]
        if missing or not shards:
            raise CheckpointNotFoundError(
                f"{directory}: of {len(shards)} shards that {_MODEL_INDEX} names, {len(missing)} are missing"
                f"{_examples(missing)}; it is half written or half downloaded: save or download it again"
            )
        return [directory / name for name in shards]
    if (directory / _MODEL_FILE).is_file():
        return [directory / _MODEL_FILE]
    _refuse_pickles(directory, "AutoModel.from_pretrained(...).save_pretrained(...) writes safetensors")
    raise CheckpointNotFoundError(
        f"{directory} has a config.json but no weights ({_MODEL_FILE} or {_MODEL_INDEX}); "
        "it is half written or half downloaded: save or download it again"
    )


def _check_adapter_files(directory: Path, *, verify: bool) -> dict[str, Tensor]:
    """The adapter's tensors, by PEFT's key, after every check that does not need the model."""
    _, tensors = read_adapter(directory, verify=verify)
    path = directory / _ADAPTER_FILE
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise AdapterError(f"{path}: {key} holds NaN or Inf; its training diverged: take an earlier checkpoint")
    return tensors


def read_adapter(adapter: str | Path, *, verify: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of a PEFT adapter (LoRA or FFBA), as they are on disk; the numbers are not looked at.

    Args:
        adapter: directory with ``adapter_config.json`` and ``adapter_model.safetensors``, or a Hub id.
        verify: as in `load_model`.

    Raises:
        CheckpointNotFoundError: the directory or one of its files is missing.
        AdapterError: files that cannot be read (truncated, pickles only) or are not what was saved, or an adapter of
            another kind.
        MissingExtraError: safetensors is not installed.
    """
    directory = _resolve(adapter)
    if not (directory / _ADAPTER_CONFIG).is_file():
        hint = (
            "this is a model; pass it as the model"
            if (directory / "config.json").is_file()
            else "pass a directory written by PeftModel.save_pretrained()"
        )
        raise CheckpointNotFoundError(f"{directory} has no {_ADAPTER_CONFIG}; {hint}")
    settings = _read_json(directory / _ADAPTER_CONFIG)
    peft_type = settings.get("peft_type")
    if peft_type not in _PREFIXES:
        raise AdapterError(
            f"{directory} has peft_type {peft_type!r}; only 'LORA' and 'FLORA' (FFBA) are supported: merge the adapter "
            "with peft"
        )
    path = directory / _ADAPTER_FILE
    if not path.is_file():
        _refuse_pickles(directory, "PeftModel.from_pretrained(...).save_pretrained(...) writes safetensors")
        raise CheckpointNotFoundError(
            f"{directory} has an {_ADAPTER_CONFIG} but no {_ADAPTER_FILE}; "
            "it is half written: save or download it again"
        )
    _check_safetensors(path)
    for known in (directory / _ADAPTER_CONFIG, path) if verify else ():
        check_sum(known)
    # Read, not mapped: each tensor of a mapped file leaves 64 bytes behind (safetensors 0.8.0), for every swap.
    found: dict[str, Tensor] = require("safetensors.torch", "hf").load(path.read_bytes())
    tensors = dict(sorted(found.items()))
    if not tensors:
        raise AdapterError(f"{path} holds no tensors; save the adapter again")
    return settings, tensors


def _refuse_pickles(directory: Path, remedy: str) -> None:
    pickles = [path.name for pattern in _PICKLES for path in sorted(directory.glob(pattern))]
    if pickles:
        raise AdapterError(
            f"{directory} holds its weights as pickles only{_examples(pickles)}; loading those can run code: {remedy}"
        )


def _check_safetensors(path: Path) -> None:
    """Open the header, which also compares the length that it promises with the file's."""
    safetensors = require("safetensors", "hf")
    try:
        with safetensors.safe_open(path, framework="pt"):
            pass
    except safetensors.SafetensorError as error:
        raise AdapterError(
            f"{path} is not a whole safetensors file ({_first_line(error)}); "
            "it is truncated or a Git LFS pointer: save or download it again"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path} is not JSON ({_first_line(error)}); save or download it again") from error
    if not isinstance(content, dict):
        raise AdapterError(
            f"{path} holds a {type(content).__name__} where an object is expected; save or download it again"
        )
    return content


# --- does it load -----------------------------------------------------------------------------------------


def _auto_class(config: dict[str, Any], task: Task) -> Any:
    """The class of transformers that loads a model for a task."""
    transformers = require("transformers", "hf")
    names = require("transformers.models.auto.modeling_auto", "hf")
    architectures = set(config.get("architectures") or []) if config.get("is_encoder_decoder") else set()
    speech = bool(architectures & set(names.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values()))
    if task == "auto":
        if speech or architectures & set(names.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()):
            task = "seq2seq-lm"
        elif any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.get("architectures") or []):
            task = "causal-lm"
    if task == "seq2seq-lm":
        return transformers.AutoModelForSpeechSeq2Seq if speech else transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM if task == "causal-lm" else transformers.AutoModel


def _load_base(directory: Path, auto: Any, *, dtype: torch.dtype | None) -> nn.Module:
    try:
        model, info = auto.from_pretrained(
            directory,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (ValueError, RuntimeError, KeyError) as error:
        raise AdapterError(f"{directory}: transformers cannot load this model ({_first_line(error)})") from error
    missing = sorted(info["missing_keys"])
    if missing and all(key.startswith("pooler.") for key in missing):
        # An encoder trained without its pooler: a random one would be worse than none.
        model.pooler = None
    elif missing:
        raise AdapterError(
            f"{directory}: {len(missing)} weights of {type(model).__name__} are not in the checkpoint"
            f"{_examples(missing)}; transformers would fill them at random: save the whole model, or pass "
            "another task"
        )
    return model


def _load_adapter(base: nn.Module, directory: Path, tensors: dict[str, Tensor]) -> nn.Module:
    peft = require("peft", "hf")
    require("flora_fx.adapters", "hf")  # makes FFBA known to PEFT
    _check_shapes(base, directory / _ADAPTER_FILE, tensors)
    try:
        with warnings.catch_warnings():
            # Said better below, as an error.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            model = peft.PeftModel.from_pretrained(base, directory, is_trainable=False, autocast_adapter_dtype=False)
        # from_pretrained keeps what it could not place to itself; placing the tensors once more tells.
        placed = peft.set_peft_model_state_dict(model, tensors)
    except (ValueError, RuntimeError, KeyError) as error:
        raise AdapterError(
            f"{directory} does not fit {type(base).__name__} ({_first_line(error)}); "
            "is it the adapter of another model?"
        ) from error
    missing = sorted(key for key in placed.missing_keys if any(prefix in key for prefix in _PREFIXES.values()))
    unexpected = sorted(placed.unexpected_keys)
    for keys, what in (
        (unexpected, "tensors have no place in this model"),
        (missing, f"tensors that {_ADAPTER_CONFIG} asks for are missing"),
    ):
        if keys:
            raise AdapterError(
                f"{directory / _ADAPTER_FILE} does not fit {type(base).__name__}: "
                f"{len(keys)} {what}{_examples(keys)}; is it the adapter of another model?"
            )
    return model


def _check_shapes(base: nn.Module, path: Path, tensors: dict[str, Tensor]) -> None:
    """Compare A (r × d_in) and B (d_out × r) with the projections they stand beside, and with each other."""
    modules = dict(base.named_modules())
    for key, down in tensors.items():
        owner, found, _ = key.partition(".lora_A")
        name = owner.removeprefix("base_model.model.")
        up = tensors.get(key.replace(".lora_A", ".lora_B"))
        weight = getattr(modules.get(name), "weight", None)
        if not found or up is None or weight is None or not down.ndim == up.ndim == weight.ndim == 2:
            continue
        d_out, d_in = weight.shape
        if type(modules[name]).__name__ == "Conv1D":  # GPT-2 stores its projections transposed
            d_out, d_in = d_in, d_out
        rank = down.shape[0]
        for tensor, expected, label in (
            (down, (rank, d_in), key),
            (up, (d_out, rank), key.replace("lora_A", "lora_B")),
        ):
            if tuple(tensor.shape) != expected:
                raise AdapterError(
                    f"{path}: {label} is {_shape(tensor.shape)} and {name} ({_shape((d_out, d_in))}) "
                    f"at rank {rank} needs {_shape(expected)}; is it the adapter of another model?"
                )


# --- wording ----------------------------------------------------------------------------------------------


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _examples(names: list[str]) -> str:
    return f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else ""


def _first_line(error: BaseException) -> str:
    """The first line that says something, short enough to stand in a sentence."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.rstrip(".:") if len(line) <= 160 else f"{line[:160]}…"
