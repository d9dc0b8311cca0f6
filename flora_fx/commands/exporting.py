"""`flora-fx export`: a checkpoint to a directory for ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flora_fx.errors import FloraError
from flora_fx.tasks import Task

from .ending import Outcome, left_of
from .leaving_out import leave_out
from .naming import named_adapters
from .quiet import quiet
from .stages import staged_work

__all__ = ["STAGES", "export"]

STAGES = 7
"""Loading, and the six of `export_onnx`."""


def export(
    model: str,
    adapters: Sequence[str],
    output: Path,
    options: dict[str, Any],
    outcome: Outcome,
    *,
    task: Task = "auto",
    tokenizer: str | None = None,
) -> Any:
    """Write the fused ONNX directory and say what its own check found.

    Args:
        model: directory or Hub id.
        adapters: directories or Hub ids; ``NAME=…`` of each where rows of a batch are to choose among them.
        output: the directory to write.
        options: of ``export_onnx``.
        outcome: its document is what ``--json`` prints.
        task: what the model is for.
        tokenizer: directory or Hub id; None for the adapter's, where there is one, or the model's.

    Returns:
        an ``ExportResult``.

    Raises:
        FloraError: the checkpoint cannot be read, or the export cannot be written.
    """
    adapter = named_adapters(adapters, several=bool({"slots", "rank"} & options.keys()))
    if isinstance(adapter, dict):
        options = {**options, "adapters": list(adapter)}
    outcome.left = left_of(output)
    leave_out(model, adapter.values() if isinstance(adapter, dict) else [adapter] if adapter else [])
    quiet()
    with staged_work(STAGES) as stages:
        stages.begin("load")
        from flora_fx.checkpoint import load_model
        from flora_fx.export import export_onnx
        from flora_fx.export.directory.manifest import versions
        from flora_fx.storage.mapped import giving_back

        loaded = load_model(model, adapter, task=task)
        chosen = _tokenizer(loaded, model, None if isinstance(adapter, dict) else adapter, tokenizer)
        with giving_back(loaded):
            result = export_onnx(loaded, output, tokenizer=chosen, progress=stages.begin, **options)
    report = result.report
    outcome.document.update(
        directory=str(output),
        target=result.target,
        adapters={"fused": len(report.fused), "declined": len(report.declines)},
        operations={"before": dict(report.ops_before), "after": dict(report.ops_after)},
        declines=report.to_dict()["declines"],
        verified=result.verified,
        max_abs_error=None if result.verified == "none" else result.max_abs_error,
        max_rel_error=None if result.verified == "none" else result.max_rel_error,
        greedy_tokens_equal=result.greedy_tokens_equal,
        checked_on=result.checked_on,
        crossed=list(result.crossed),
        not_crossed=list(result.not_crossed),
        notes=list(result.notes),
        files=dict(result.files),
        seconds=stages.seconds,
        peak_bytes=stages.peaks,
        versions=versions(),
    )
    return result


def _tokenizer(loaded: Any, model: str, adapter: str | None, tokenizer: str | None) -> Any:
    """The one that is asked for, else the one beside the adapter, else the model's."""
    from flora_fx.checkpoint import load_tokenizer
    from flora_fx.checkpoint.vocabulary import token_embedding

    if tokenizer is not None:
        found: Any = load_tokenizer(tokenizer)
        if found is None:
            raise FloraError(f"{tokenizer} has no tokenizer; pass the directory where tokenizer.json is")
        return found
    found = load_tokenizer(model, adapter)
    embedding = token_embedding(loaded) if found is not None and adapter is not None else None
    rows = None if embedding is None else len(embedding.weight)
    if rows is not None and len(found) > rows:
        raise FloraError(
            f"the tokenizer in {found.name_or_path} has {len(found)} tokens and the model's embedding {rows} rows: "
            "those of its new tokens are not in the adapter. Save them with it (save_embedding_layers=True), or pass "
            "the tokenizer that fits: --tokenizer"
        )
    return found
