"""What `protocol=compose` does to the model beside the edits, and in which order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from errata.editors.core.errors import ConfigError

EDIT, COMPRESS, UNLEARN = ROLES = ("edit", "compress", "unlearn")


_WHOLE = 2**53  # up to here a float that is a whole number is that number


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < _WHOLE else value


@dataclass(frozen=True)
class ComposeConfig:
    """What `protocol=compose` does beside the edits."""

    order: str = "edit-compress"
    """edit, compress and unlearn, each at most once and edit always, in the order in which they are done."""
    end: Literal["again", "keep", "none"] = "again"
    """After a compression that is not the last step. again: compress anew, as the authors do; keep: what the
    compression fixed, pruned elements or the grid, is put back; none: the model stays as the later steps left it."""
    compress: Mapping[str, Any] = field(default_factory=dict)
    """Name and fields of the compression: magnitude, wanda, sparsegpt, rtn, gptq, awq or torchao."""
    unlearn: Mapping[str, Any] = field(default_factory=dict)
    """Name and fields of the unlearning: rmu, ga or gd."""

    def __post_init__(self) -> None:
        for role in (COMPRESS, UNLEARN):
            # 40, 40.0 and 4e1 are one number, and so one run.
            object.__setattr__(self, role, {name: _plain(value) for name, value in getattr(self, role).items()})
        if len(set(self.roles)) < len(self.roles) or not set(self.roles) <= set(ROLES) or EDIT not in self.roles:
            raise ConfigError(
                f"compose.order: expected edit, compress and unlearn joined by -, each at most once and edit always, "
                f"such as compress-edit, got {self.order!r}"
            )

    @property
    def roles(self) -> tuple[str, ...]:
        """What is done, first to last."""
        return tuple(self.order.split("-"))

    def named(self, role: str) -> tuple[str, dict[str, Any]]:
        """Return the name of what a role is given to, and its fields.

        Raises:
            ConfigError: There is no name.
        """
        given = dict(self.compress if role == COMPRESS else self.unlearn)
        name = given.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError(f"compose.{role}.name is missing: compose.order={self.order} needs one")
        return name, given
