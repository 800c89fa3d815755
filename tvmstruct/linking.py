"""Compiled modules as bytes and back, with no compiler or linker on the machine.

TVM writes its object files with the LLVM inside its wheel; where ``export_library`` would
then call a linker, ``to_bytes`` keeps the objects, and ``load_bytes`` hands them to LLVM's ORC
JIT linker (PyPI ``apache-tvm-ffi-orcjit``) in memory. Nothing is compiled again at load.
The bytes are native code: load only what a checksum has vouched for.
"""

import struct
from pathlib import Path

from tvm.runtime import Executable, Module

from .errors import ArtifactError, MissingDependencyError

MAGIC = b"TVMSOBJ1"
COUNT, SIZE = struct.Struct("<I"), struct.Struct("<Q")
ELF = b"\x7fELF"
JIT_PACKAGE = "apache-tvm-ffi-orcjit==0.1.3"


def to_bytes(module: Executable | Module) -> bytes:
    """Return a compiled module, bytecode of a Relax executable included, as bytes."""
    module = module.mod if isinstance(module, Executable) else module
    objects: list[bytes] = []

    def keep(_name: str, files: list[str], **_options: object) -> None:
        objects.extend(Path(file).read_bytes() for file in files)

    module.export_library("objects.o", fcompile=keep)
    for data in objects:
        if not data.startswith(ELF):
            raise ArtifactError(
                f"module of kind {module.kind!r} exports source, not object code; "
                "only modules compiled for an llvm target can be saved"
            )
    return b"".join([MAGIC, COUNT.pack(len(objects)), *map(_with_size, objects)])


def load_bytes(data: bytes | bytearray | memoryview) -> Module:
    """Return the module that ``to_bytes`` saved; ``relax.VirtualMachine`` takes it as it is."""
    objects = _split(memoryview(data))
    try:
        from tvm_ffi_orcjit import default_session
    except ImportError as error:
        raise MissingDependencyError(
            f"loading a saved model needs the package {JIT_PACKAGE}; "
            f'install it with: pip install "{JIT_PACKAGE}"'
        ) from error
    return default_session().load_module(objects)


def _with_size(data: bytes) -> bytes:
    return SIZE.pack(len(data)) + data


def _split(data: memoryview) -> list[bytes]:
    """Return the object files, each with its bounds checked."""
    start = len(MAGIC) + COUNT.size
    if bytes(data[: len(MAGIC)]) != MAGIC or len(data) < start:
        raise ArtifactError("compiled code: wrong magic bytes; compile and save the model again")
    (count,) = COUNT.unpack_from(data, len(MAGIC))
    objects: list[bytes] = []
    for index in range(count):
        body = start + SIZE.size
        end = body + SIZE.unpack_from(data, start)[0] if body <= len(data) else body
        if end > len(data) or bytes(data[body : body + len(ELF)]) != ELF:
            raise ArtifactError(
                f"compiled code: object {index} of {count} runs to byte {end} of {len(data)} or is "
                "no ELF file; the file is damaged, compile and save the model again"
            )
        objects.append(bytes(data[body:end]))
        start = end
    if start != len(data) or not objects:
        raise ArtifactError(
            f"compiled code: {len(data) - start} bytes follow {count} objects; "
            "the file is damaged, compile and save the model again"
        )
    return objects
