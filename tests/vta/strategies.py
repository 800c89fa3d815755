"""Random instructions."""

from dataclasses import fields

from hypothesis import strategies as st

from tvmstruct.vta import isa
from tvmstruct.vta.config import DEFAULT
from tvmstruct.vta.isa import (
    Alu,
    AluOp,
    Deps,
    Finish,
    Gemm,
    Load,
    Memory,
    Opcode,
    Store,
    VectorGemm,
)


@st.composite
def instructions(draw: st.DrawFn, config=DEFAULT):
    known = [k for k in Opcode if k is not Opcode.VGEMM or "vvma" in config.extensions]
    opcode = draw(st.sampled_from(known))
    ranges = {f.name: st.integers(f.smallest, f.largest) for f in isa.layout(opcode, config)}
    ranges |= {"memory": st.sampled_from(Memory), "alu_opcode": st.sampled_from(AluOp)}
    kind = {0: Load, 1: Store, 2: Gemm, 3: Finish, 4: Alu, 5: VectorGemm}[opcode]
    names = [f.name for f in fields(kind) if f.name != "deps"]
    values = {n: draw(ranges[n]) if n in ranges else 0 for n in names}
    values |= {n: bool(v) for n, v in values.items() if n in ("reset", "use_imm")}
    return kind(**values, deps=Deps(*draw(st.tuples(*[st.booleans()] * 4))))
