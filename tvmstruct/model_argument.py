"""What MODEL names on the command line: a file, a folder, or a built-in model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tvmstruct.errors import InputError
from tvmstruct.vta.container import is_package

if TYPE_CHECKING:
    from tvmstruct.frontends import Source
    from tvmstruct.models import Config

PREFIX = "random:"


@dataclass(frozen=True)
class ModelArgument:
    """A path that exists, or with ``config`` a built-in model that has random weights."""

    text: str
    config: Config | None = None

    def __str__(self) -> str:
        """Return what the user wrote."""
        return self.text

    @property
    def path(self) -> Path:
        """Return the file or folder; a built-in model has none."""
        assert self.config is None, self.text
        return Path(self.text)

    @property
    def compiled(self) -> bool:
        """Return whether it is a compiled model."""
        if self.config is not None:
            return False
        return self.path.suffix == ".tvms" or is_package(self.path)

    def source(self) -> Source:
        """Read the file or folder, or make the built-in model."""
        import tvmstruct

        if self.config is not None:
            return tvmstruct.models.source(self.config)
        read = tvmstruct.from_pretrained if self.path.is_dir() else tvmstruct.from_onnx
        return read(self.path)


def parse_model(text: str) -> ModelArgument:
    """Return what ``text`` names; misuse, as typer says it, where that is nothing."""
    if text.startswith(PREFIX):
        from tvmstruct import models  # numpy and onnx, which --help must not wait for

        try:
            return ModelArgument(text, models.parse(text.removeprefix(PREFIX)))
        except InputError as error:
            raise typer.BadParameter(str(error)) from error
    if not Path(text).exists():
        raise typer.BadParameter(f"path {text!r} does not exist.")
    return ModelArgument(text)
