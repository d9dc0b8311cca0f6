"""Language models: decoders, encoders, encoder-decoders, mixtures of experts, state spaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

from tests.architectures import MODELS, VOCAB, example_inputs

from .adapt import Case, lora

__all__ = ["IDS", "LAYERS", "decoder", "headless", "known", "only", "sentence", "seq2seq"]

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LAYERS: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def only(sizes: dict[str, Any]) -> dict[str, Any]:
    """Sizes for a config that calls them otherwise: none of `LAYERS`."""
    return {**dict.fromkeys(LAYERS), **sizes}


def known(name: str) -> Callable[[], Case]:
    """A family that other tests have, too."""
    return lambda: lora(MODELS[name](), example_inputs(name, torch.float64))


def decoder(
    kind: str, targets: Any = "all-linear", parameters: list[str] | None = None, **options: Any
) -> Callable[[], Case]:
    """A causal language model by the name of its config's class.

    Experts are multiplied with as a batch: torch's grouped GEMM, the default, has no float64.
    """

    def make() -> Case:
        experts = {"experts_implementation": "batched_mm"} if "num_experts_per_tok" in options else {}
        model = hf.AutoModelForCausalLM.from_config(configured(kind, **options), **experts)
        return lora(model, sentence(), target_modules=targets, target_parameters=parameters)

    return make


def headless(kind: str, targets: Any = "all-linear", **options: Any) -> Callable[[], Case]:
    """A model without a head by the name of its config's class."""
    return lambda: lora(hf.AutoModel.from_config(configured(kind, **options)), sentence(), target_modules=targets)


def seq2seq(kind: str) -> Callable[[], Case]:
    sizes = {
        f"{side}_{size}": number
        for side in ("encoder", "decoder")
        for size, number in {"layers": 2, "ffn_dim": 80, "attention_heads": 4}.items()
    }

    def make() -> Case:
        settings = getattr(hf, kind)(
            vocab_size=VOCAB, d_model=48, max_position_embeddings=64, **sizes, **IDS, decoder_start_token_id=1
        )
        model = hf.AutoModelForSeq2SeqLM.from_config(settings)
        return lora(model, {**sentence(), "decoder_input_ids": torch.randint(3, VOCAB, (2, 5))})

    return make


def configured(kind: str, **options: Any) -> Any:
    """A config of two small layers; what is None in the options is left to the family."""
    sizes = {"vocab_size": VOCAB, **LAYERS, **IDS, **options}
    return getattr(hf, kind)(**{key: value for key, value in sizes.items() if value is not None})


def sentence(length: int = 7) -> dict[str, Any]:
    """Two rows of tokens, the first padded on the right: on the left its first tokens would see nothing, which is NaN
    in some families."""
    ids, mask = torch.randint(3, VOCAB, (2, length)), torch.ones(2, length, dtype=torch.long)
    mask[0, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}
