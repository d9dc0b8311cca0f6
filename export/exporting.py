"""`export_onnx`: capture, fuse, translate, check, write."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from flora_fx.capturing import CAPTURING
from flora_fx.config import FuseConfig
from flora_fx.errors import ExportError, require
from flora_fx.fusing import fuse_unstored, report
from flora_fx.mixed.selection import ADAPTER_IDS
from flora_fx.reporting.fusion_report import combined
from flora_fx.storage.mapped import give_back

from .check.checking import check
from .check.differences import Verify
from .describing import describe
from .directory.companions import write_companions
from .directory.identity import identify
from .directory.manifest import DATA, MANIFEST, MODEL, write_manifest
from .directory.operators import choose_operators, copy_operators
from .directory.saving import save_graphs
from .directory.sealing import Sealing
from .directory.staging import staged
from .forms import stacked_forms
from .lora.stacking import SlotPlan, plan_slots, stack
from .lora.swappable import check_swappable
from .result import ExportResult
from .run.session import DEFAULT_PROVIDERS, provider_name, usable_providers
from .targets import Target, TargetName, trace
from .trace.model import DTYPES, kind_of, private_copy, unwrap
from .trace.quantized_base import Activations, Base, check_options, settle_base
from .translate.lora_operators import use_lora_operators
from .translate.lowering import lower
from .translate.products import arrange_products
from .translate.slots import make_slots
from .translate.swappable import make_swappable

__all__ = ["export_onnx"]


def export_onnx(
    model: nn.Module,
    directory: str | Path,
    *,
    example_inputs: Mapping[str, Tensor] | None = None,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    providers: Sequence[Any] = DEFAULT_PROVIDERS,
    overwrite: bool = False,
    config: FuseConfig | None = None,
    target: TargetName | None = None,
    hot_swap: bool = False,
    adapters: Sequence[str] | None = None,
    slots: int | None = None,
    rank: int | None = None,
    custom_ops: bool | None = None,
    verify: Verify | None = None,
    base: Base | None = None,
    activations: Activations = "exact",
    progress: Callable[[str], None] | None = None,
) -> ExportResult:
    """Write a model with its adapters fused in as a directory for ONNX Runtime, and check it there.

    The directory holds ``model.onnx`` and ``model.onnx.data``, ``config.json``, ``generation_config.json``, the
    tokenizer's files and ``flora_fx.json``; of an encoder-decoder also ``encoder.onnx``, whose weights are in the same
    data file. It appears when all is written and checked; on any error there is nothing, or what was there before. The
    model is left as it is: mode, dtype, weights, config.

    Args:
        model: a transformers causal LM, encoder-decoder or encoder, or a PEFT model around it with LoRA or FFBA
            adapters (the active ones are exported, unmerged).
        directory: to write; missing parents are made.
        example_inputs: by name, batch first; needed for encoders whose inputs cannot be guessed.
        tokenizer: a transformers tokenizer to save beside the model.
        dtype: float32, float16 or bfloat16, to cast to; None for the model's own.
        providers: ONNX Runtime execution providers for the check; those that this machine lacks are passed over.
        overwrite: replace an earlier export.
        config: the fused forms; None for those that were measured to be the fastest, see `flora_fx.export.forms`.
        target: of a causal LM. ``"decoder"``: attention is ``com.microsoft::GroupQueryAttention``, and the directory is
            a model directory of onnxruntime-genai. ``"general"``: plain ONNX operators. None: the first where the
            model's attention is such, the second where it is not; `ExportResult.notes` says why.
        hot_swap: let `Decoder.load_adapter` replace the LoRA in the exported graph (target ``"decoder"``). This
            costs about 2% of prefill and decode on a CPU.
        adapters: names of LoRAs of the model, between which each row of a batch chooses when it runs, see
            `Decoder.generate` (target ``"decoder"``). They may differ in rank, layers and scale.
        slots: so many places for LoRAs, which `Decoder.load_adapter` fills and replaces; ``adapters`` (None: the active
            ones) stand in the first of them. Like ``hot_swap=True`` beside ``adapters``, it costs speed on a CPU.
        rank: of every slot; None for the highest of those adapters.
        custom_ops: write LoRA in the operators of ``flora_ort`` (target ``"decoder"``), a library of this project that
            has to be built: 9 nodes a Llama layer, with one adapter or up to 50. Where they can be replaced 13; on
            CUDA in half precision 9. None: where CUDA is the first provider, the library is there, and there are no
            more of them. False: plain operators. ``Manifest.custom_ops`` says what was written.
        verify: how the result is compared with PyTorch. ``"full"``: it is loaded as it will be, and its logits and
            greedy tokens are compared. ``"quick"``: the graph runs part by part and the model layer by layer, so that
            neither has to stand in memory; logits are compared, no tokens are generated. That is for a causal LM on a
            CPU, without slots; of all others it is ``"full"``. ``"none"``: not at all. None: ``"quick"`` for weights of
            more than 2 GiB, else ``"full"``. ``ExportResult.verified`` and the manifest say which it was.
        base: what becomes of a quantized base. ``"keep"``: MatMulNBits, or MatMulBnb4 for codebooks (target
            ``"decoder"``). ``"dequantize"``: few bits in the file, and nodes that ONNX Runtime folds into plain weights
            as it loads. ``"float"``: plain weights in the file. None: kept where MatMulNBits holds the weights exactly,
            dequantized where it does not. All of them multiply with the same numbers; docs/qlora.md.
        activations: what MatMulNBits multiplies with. ``"int8"``: rounded to int8, which is faster and not exact; the
            result says by how much.
        progress: called with the name of each stage as it begins.

    Returns:
        where it is, what was fused, how far it is from PyTorch.

    Raises:
        ExportError: the model is of another kind, cannot be captured or translated, does not agree with PyTorch on
            ONNX Runtime, or the directory must not be written.
        TypeError: ``model`` is no module, ``dtype`` no dtype, ``config`` no `FuseConfig`.
        ValueError: an unknown target, base, activations or way to verify.
        AdapterError: an adapter weight holds NaN or infinity; ``hot_swap`` of an adapter that is more than a LoRA of
            linear layers, or ``adapters`` that are unknown, are more than that, or do not fit the slots.
        MissingExtraError: transformers, onnx, onnxscript or onnxruntime is not installed.

    What `generate` is not told it takes from the model's generation config (``Manifest.generation``); what that asks
    for and exports do not have is in the notes, and in a UserWarning each.

    The graph of a causal LM is prefill and decode in one, with onnxruntime-genai's names: ``input_ids`` [batch, seq],
    ``attention_mask`` [batch, total], ``past_key_values.N.key`` and ``.value`` [batch, kv_heads, past, head_dim] in;
    ``logits`` [batch, seq, vocab], ``present.N.key`` and ``.value`` out. Positions are counted from the mask. Of target
    ``"decoder"`` prompts are padded on the right, and past and present may be one buffer; docs/deploying.md.

    That of an encoder-decoder is its decoder, likewise: ``input_ids`` [batch, target], ``encoder_attention_mask``
    [batch, seq], ``cross_key_values.N.key`` and ``.value`` [batch, heads, seq, head_dim], ``past_key_values`` in. The
    cross keys and values are what ``encoder.onnx`` makes of ``input_ids`` and ``attention_mask`` [batch, seq].

    >>> print(export_onnx(peft_model, "out", tokenizer=tokenizer))  # doctest: +SKIP
    exported to /home/me/out: 210 adapters fused, 0 declined
    ...
    >>> prompt = tokenizer("Once upon", return_tensors="pt")  # doctest: +SKIP
    >>> tokenizer.batch_decode(load("out").generate(**prompt, max_new_tokens=40))  # doctest: +SKIP
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a transformers or PEFT model")
    if dtype is not None and dtype not in DTYPES.values():
        raise TypeError(f"dtype is {dtype!r}; it must be one of {', '.join(f'torch.{name}' for name in DTYPES)}")
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "onnx")
    if target not in (None, *get_args(TargetName)):
        raise ValueError(f"target is {target!r}; it must be 'decoder', 'general' or None")
    if verify not in (None, *get_args(Verify)):
        raise ValueError(f"verify is {verify!r}; it must be 'full', 'quick', 'none' or None")
    check_options(base, activations)
    provider = provider_name(usable_providers(providers)[0])  # before the work, not after
    core = unwrap(model)
    kind = kind_of(core)
    plan: SlotPlan | None = None
    if adapters is not None or slots is not None or rank is not None:
        plan = plan_slots(core, adapters, slots, rank, replaceable=hot_swap)
        hot_swap = plan.replaceable
    elif hot_swap:
        check_swappable(core)
    operators = choose_operators(custom_ops, provider, 1 if plan is None else len(plan.slots))
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        if progress is not None:
            progress(name)
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start

    destination = Path(directory).absolute()
    with staged(destination, overwrite=overwrite, marker=MANIFEST) as place, Sealing() as sealing:
        with CAPTURING, stage("capture"):
            reference = private_copy(core, dtype)
            quantized = settle_base(reference, base, activations, dtype)
            whole = reference if plan is None else stack(reference, plan)
            chosen, traced = trace(whole, kind, example_inputs, target, provider)
            why_not = "; ".join(traced.notes) or kind
            if custom_ops and chosen.operator_forms is None:
                raise ExportError(f"custom_ops is for target 'decoder'; {why_not}")
            if custom_ops and quantized is not None:
                raise ExportError("custom_ops is for plain weights, and the base is quantized; pass base='float', too")
            if quantized is not None and not chosen.keeps_codes:
                quantized = quantized.unkept(base, why_not)
            operators = operators and chosen.operator_forms is not None and quantized is None
            own_forms = (chosen.operator_forms if operators else None) or chosen.forms
            if quantized is not None:
                own_forms = chosen.swappable_forms or chosen.forms  # codes cannot stand beside an adapter's numbers
            if plan is not None and chosen.swappable_forms is None:
                raise ExportError(f"adapters= is for target 'decoder'; {why_not}")
            if hot_swap:
                own_forms = _swappable_forms(chosen, why_not)
            if plan is not None and not operators:
                own_forms = stacked_forms(own_forms, provider)
        give_back()
        with CAPTURING, stage("fuse"):
            captured = chosen.graphs(traced)
            fused = {name: fuse_unstored(part.program, config or own_forms) for name, part in captured.items()}
            fusion = combined([report(program) for program in fused.values()])
            chosen.finish(fused)
        with CAPTURING, stage("translate"):
            graphs = {name: lower(fused[name], part, quantized) for name, part in captured.items()}
            operators = operators and bool(use_lora_operators(graphs[MODEL], fusion))
            if operators:
                arrange_products(graphs[MODEL], provider)
            if plan is not None:
                swappable = make_slots(graphs[MODEL], fusion, plan)
            else:
                swappable = make_swappable(graphs[MODEL], fusion, reference) if hot_swap else ()
        with stage("write"):
            save_graphs(graphs, place)
            sealing.begin(place / DATA)
            write_companions(place, core, reference, tokenizer)
            manifest = describe(core, reference, kind, chosen, traced)
            for note in manifest.notes[len(traced.notes) :]:
                warnings.warn(note, stacklevel=2)
            library = copy_operators(place, provider) if operators else None
            notes = [*manifest.notes, *chosen.write_companions(place, reference, traced, provider, library)]
            manifest = replace(
                manifest,
                identity=identify(model, core, None if plan is None else plan.names),
                live=swappable,
                inputs=manifest.inputs if plan is None else [*manifest.inputs, ADAPTER_IDS],
                slots=() if plan is None else plan.slots,
                custom_ops=operators,
                notes=notes,
            )
            example = traced.example
            # What torch.onnx has translated holds the packs: a second copy of the weights, not needed for the check.
            del graphs, fused, captured, traced, whole
            give_back()
        with stage("check"):
            if quantized is not None:
                from .check.quantized import base_notes, check_base, exact_copy

                paths = [place / name for name in manifest.graphs]
                manifest = replace(manifest, base=check_base(paths, quantized, fusion, providers))
                manifest = replace(manifest, notes=[*manifest.notes, *base_notes(manifest.base)])
                reference = exact_copy(reference)
            # Plain greedy tokens are compared, whatever the model asks for.
            checked = check(place, replace(manifest, generation={}), reference, providers, example, verify)
            told = asdict(checked) if checked.verified != "none" else {"verified": "none"}
            manifest = replace(manifest, fusion=fusion.to_dict(), check=told)
        with stage("seal"):
            files = write_manifest(place, manifest, sealing.sha256)
    return ExportResult(
        destination,
        fusion,
        **asdict(checked),
        target=manifest.target,
        notes=tuple(manifest.notes),
        files=files,
        seconds=seconds,
    )


def _swappable_forms(target: Target, why_not: str) -> FuseConfig:
    if target.swappable_forms is None:
        raise ExportError(f"hot_swap is for target 'decoder'; {why_not}")
    return target.swappable_forms
