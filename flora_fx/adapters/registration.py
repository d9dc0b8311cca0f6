"""PEFT's place for a method that does not come with PEFT: ``PeftType.FLORA``.

`peft.utils.register_peft_method` takes only methods that the enumeration `peft.PeftType` knows, and PEFT, transformers
and its Trainer ask configurations for ``peft_type.value``: so the enumeration gets one more member.
"""

from __future__ import annotations

from peft import PeftType

__all__ = ["PEFT_TYPE", "PREFIX"]

NAME = "FLORA"

PREFIX = "flora_"
"""What the names of FFBA parameters begin with: ``….q_proj.flora_A.default.weight``."""


def _member() -> PeftType:
    if NAME in PeftType.__members__:
        return PeftType[NAME]
    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    return member


PEFT_TYPE = _member()
"""``PeftType.FLORA``."""
