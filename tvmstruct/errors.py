"""The few errors that users catch; every message names the thing, the values and the fix."""


class TvmstructError(Exception):
    """Base of every error raised on purpose by tvmstruct."""


class ModelError(TvmstructError, ValueError):
    """The source model cannot be read: truncated, damaged, inconsistent or hostile."""


class UnsupportedOperatorError(ModelError):
    """The model uses an operator (or an attribute of one) that cannot be compiled."""


class InputError(TvmstructError, ValueError):
    """An array given to a model has a wrong name, rank, shape, dtype or value."""


class TargetError(TvmstructError, ValueError):
    """A target string, CPU name or device is unknown or does not fit this machine."""


class PlanError(TvmstructError, ValueError):
    """A plan names an unknown layer or family, or parameters that do not fit the layer."""


class ArtifactError(TvmstructError, ValueError):
    """A saved model is damaged, was made by another version, or needs another CPU."""


class TuningError(TvmstructError, ValueError):
    """Tuning cannot start or go on: its options, its tracker, or the folder of its records."""


class ProfilingError(TvmstructError, RuntimeError):
    """The system does not let the profiler count, or a tool that it needs fails."""


class MissingDependencyError(TvmstructError, ImportError):
    """An optional package is needed; the message says which extra installs it."""


class VtaError(TvmstructError, ValueError):
    """Base of what is wrong with a VTA configuration, instruction, program or run."""


class VtaConfigError(VtaError):
    """A VTA configuration misses a key, has an unknown one, or sizes that no design can have."""


class VtaEncodingError(VtaError):
    """An instruction or micro-op does not fit its bit fields, or bits are no instruction."""


class VtaAssemblyError(VtaError):
    """A line of VTA assembly cannot be read; the message has its number."""


class VtaRunError(VtaError):
    """A VTA program cannot be run: what it addresses, its tokens, or more work than allowed.

    ``rule`` names what it breaks; ``instruction`` is the index in the stream, if there is one.
    """

    def __init__(self, rule: str, message: str, instruction: int | None = None) -> None:
        super().__init__(f"{rule}: {message}")
        self.rule, self.instruction = rule, instruction


class VtaMemoryError(VtaError):
    """Buffers of a VTA program do not fit into a scratchpad; nothing is ever spilled."""
