"""FloraConfig: its defaults, what it refuses, and that it survives JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest

from flora_fx.adapters import ACTIVATIONS, FloraConfig


def test_defaults() -> None:
    config = FloraConfig()
    fields = {name: getattr(config, name) for name in ("r", "alpha", "use_rslora", "placement", "ends", "activation")}
    assert fields == {
        "r": 8,
        "alpha": 8,
        "use_rslora": False,
        "placement": "block",
        "ends": "both",
        "activation": None,
    }
    assert (config.blocks, config.layers, config.init, config.dropout) == (["attention", "mlp"], None, "lora", 0.0)
    assert config.modules_to_save is None
    assert config.scaling == 1.0
    assert config.peft_type is peft.PeftType.FLORA


def test_scaling() -> None:
    assert FloraConfig(r=6, alpha=15).scaling == 2.5
    assert FloraConfig(r=6, alpha=15, use_rslora=True).scaling == pytest.approx(15 / math.sqrt(6), rel=1e-15)
    assert FloraConfig(alpha=-4).scaling == -0.5


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"placement": "beside"}, "placement is 'beside'; it must be one of 'block', 'shared', 'cross'"),
    ({"placement": None}, "placement is None; it must be one of 'block', 'shared', 'cross'"),
    ({"ends": "none"}, "ends is 'none'; it must be one of 'both', 'forward', 'backward'"),
    ({"init": True}, "init is True; it must be one of 'lora', 'gaussian', 'orthogonal', 'svd', 'random'"),
    ({"activation": "sin"}, "activation is 'sin'; it must be one of None, 'relu', 'silu', 'gelu', 'tanh'"),
    ({"r": 0}, "r is 0; it must be a positive whole number"),
    ({"r": -2}, "r is -2; it must be a positive whole number"),
    ({"r": 2.0}, "r is 2.0; it must be a positive whole number"),
    ({"r": True}, "r is True; it must be a positive whole number"),
    ({"alpha": 0}, "alpha is 0; it must be a number other than zero"),
    ({"alpha": math.nan}, "alpha is nan; it must be a number other than zero"),
    ({"alpha": math.inf}, "alpha is inf; it must be a number other than zero"),
    ({"alpha": "16"}, "alpha is '16'; it must be a number other than zero"),
    ({"dropout": 1}, "dropout is 1; it must be at least 0 and less than 1"),
    ({"dropout": -0.1}, "dropout is -0.1; it must be at least 0 and less than 1"),
    ({"dropout": math.nan}, "dropout is nan; it must be at least 0 and less than 1"),
    ({"dropout": None}, "dropout is None; it must be at least 0 and less than 1"),
    ({"blocks": []}, "blocks is []; it must list some of 'attention', 'mlp'"),
    ({"blocks": ["mlp", "embedding"]}, "blocks is ['mlp', 'embedding']; it must list some of 'attention', 'mlp'"),
    ({"layers": []}, "layers is []; it must list indices of layers, or be None"),
    ({"layers": [0, -1]}, "layers is [0, -1]; it must list indices of layers, or be None"),
    ({"layers": [1.0]}, "layers is [1.0]; it must list indices of layers, or be None"),
    ({"layers": [True]}, "layers is [True]; it must list indices of layers, or be None"),
]


@pytest.mark.parametrize(("fields", "said"), REFUSED, ids=[str(fields) for fields, _ in REFUSED])
def test_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"^FloraConfig\.") as error:
        FloraConfig(**fields)
    assert str(error.value) == f"FloraConfig.{said}"


@pytest.mark.parametrize("ends", ["forward", "backward"])
@pytest.mark.parametrize("placement", ["shared", "cross"])
def test_one_end_alone_goes_with_block_only(placement: Any, ends: Any) -> None:
    with pytest.raises(ValueError, match="one end alone is defined for placement='block' only") as error:
        FloraConfig(placement=placement, ends=ends)
    assert f"FloraConfig(ends='{ends}', placement='{placement}')" in str(error.value)


@pytest.mark.parametrize("fields", [{"blocks": None}, {"blocks": [["mlp"]]}, {"layers": 1}, {"alpha": True}], ids=str)
def test_refused_with_a_message_too(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^FloraConfig\.{next(iter(fields))} is "):
        FloraConfig(**fields)


def test_sequences_of_any_kind_become_lists() -> None:
    config = FloraConfig(blocks=("mlp",), layers=range(2))  # type: ignore[arg-type]
    assert config.blocks == ["mlp"]
    assert config.layers == [0, 1]


def test_a_config_does_not_share_its_blocks() -> None:
    FloraConfig().blocks.remove("mlp")
    assert FloraConfig().blocks == ["attention", "mlp"]


FULL = FloraConfig(
    r=5,
    alpha=7.5,
    use_rslora=True,
    ends="backward",
    activation="gelu",
    blocks=["mlp"],
    layers=[1, 3],
    init="gaussian",
    dropout=0.25,
    modules_to_save=["score"],
    task_type="SEQ_CLS",
)


@pytest.mark.parametrize("config", [FloraConfig(), FULL], ids=["defaults", "no defaults"])
@pytest.mark.parametrize("known", [FloraConfig, peft.PeftConfig], ids=["FloraConfig", "PeftConfig"])
def test_json_round_trip(known: Any, config: FloraConfig, tmp_path: Path) -> None:
    config.save_pretrained(str(tmp_path))
    found = known.from_pretrained(str(tmp_path))
    assert type(found) is FloraConfig
    assert found == config
    assert found.scaling == config.scaling
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "FLORA"


def test_names_of_one_models_modules_are_not_saved(tmp_path: Path) -> None:
    config = FloraConfig()
    config.target_modules = frozenset({"model.layers.0.self_attn.q_proj"})
    config.save_pretrained(str(tmp_path))
    assert "target_modules" not in json.loads((tmp_path / "adapter_config.json").read_text())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_taken(activation: str) -> None:
    assert FloraConfig(activation=activation).activation == activation
