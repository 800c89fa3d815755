"""The accelerator of ``target="vta -config=FILE"``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvmstruct.errors import TargetError, VtaConfigError
from tvmstruct.vta.config import DEFAULT, Config

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tvmstruct.vta.integer import Reorder, Step
    from tvmstruct.vta.simulated_kernel import Kernel


@dataclass(frozen=True)
class Accelerator:
    """A VTA of some configuration, simulated on this machine."""

    config: Config

    @classmethod
    def of(cls, path: Any) -> Accelerator:
        """Return the VTA whose configuration a JSON file has, stock VTA for None."""
        if path is None:
            return cls(DEFAULT)
        try:
            return cls(Config.from_json(Path(str(path))))
        except VtaConfigError as error:
            raise TargetError(f'target "vta -config={path}": {error}') from error

    @property
    def key(self) -> str:
        """The name of what changes the streams made for it."""
        return f"vta-{self.config.name}"

    def kernels(self, steps: Sequence[Step], rows: int) -> tuple[Kernel | Reorder, ...]:
        """Return steps as one launch for so many rows, and what the CPU moves beside it.

        Raises VtaError where this VTA cannot have them so.
        """
        from tvmstruct.vta.simulated_kernel import make_kernels

        return make_kernels(steps, rows, self.config)
