"""The timeline of a program, as text and as a picture."""

import re

import pytest

from tests.vta.streams import load_and_multiply
from tvmstruct.errors import InputError, MissingDependencyError
from tvmstruct.vta import timeline
from tvmstruct.vta.cycles import predict
from tvmstruct.vta.isa import Alu, AluOp, Deps, Finish, Gemm, Load, Memory, Store, Unit, nop


@pytest.fixture(scope="module")
def found():
    return predict(load_and_multiply(3, 1))


def test_text_has_a_row_for_each_instruction_and_its_blocker(found):
    lines = timeline.text(found).splitlines()
    rows = lines[1 : lines.index("")]
    assert [int(row.split()[0]) for row in rows] == list(range(len(found.stream)))
    start, end = found.spans[3].start, found.spans[3].end
    assert re.search(rf"compute +GEMM 256 .* {start} +{end}  l2g of 2 for ", rows[3])
    assert re.search(r"load +LOAD inp 1x16 .* g2l of 3 for ", rows[4])
    assert rows[1].endswith("dma for 7")  # the micro-ops before it
    assert rows[2].endswith("queue of 1")


def test_summary_adds_up(found):
    text = timeline.summary(found)
    assert f"{found.cycles} cycles" in text
    assert "768 tile operations" in text
    assert sum(found.waits.values()) > 0
    for unit, busy in found.busy.items():
        assert f"{unit} {busy / found.cycles:.1%}" in text


def test_part_of_a_timeline(found):
    lines = timeline.text(found, first=4, count=2).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["4", "5"]
    assert lines[3] == ""


@pytest.mark.parametrize(("first", "count"), [(-1, None), (11, None), (0, 0)])
def test_part_outside_the_program_is_refused(found, first, count):
    with pytest.raises(InputError, match="instructions 0 to 10"):
        timeline.text(found, first, count)


@pytest.mark.parametrize(
    ("instruction", "words"),
    [
        (Gemm(reset=True, iter_in=3), "GEMM reset 3"),
        (Alu(alu_opcode=AluOp.MAX, use_imm=True, imm=-8), "ALU max -8: 1"),
        (Alu(alu_opcode=AluOp.ADD, uop_end=4), "ALU add tile: 4"),
        (Load(memory=Memory.ACC8, y_size=2, x_size=3), "LOAD acc8 2x3"),
        (Store(y_size=1, x_size=9), "STORE out 1x9"),
        (nop(Unit.STORE), "NOP"),
        (Finish(), "FINISH"),
    ],
)
def test_instructions_in_words(instruction, words):
    assert timeline.describe(instruction) == words


def test_instructions_that_never_start_have_dashes():
    stream = [Finish(), Gemm(iter_out=50, deps=Deps(pop_prev=True))]
    assert timeline.text(predict(stream)).splitlines()[2].endswith("-        -  did not start")


def test_png_is_a_picture_of_every_bar(found):
    assert timeline.to_png(found).startswith(b"\x89PNG")
    bars = timeline._bars(found, 0, len(found.spans))
    ran = [piece for pieces in bars.values() for piece in pieces]
    lengths = {(s.start, s.end - s.start) for s in found.spans}
    assert lengths <= set(ran)
    waiting = [
        p for (_, colour), pieces in bars.items() if colour == timeline.WAITING for p in pieces
    ]
    assert (found.spans[2].end, found.spans[4].start - found.spans[2].end) in waiting


def test_png_needs_matplotlib(found, monkeypatch):
    monkeypatch.setattr("tvmstruct.profiling.plots.find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match=r"tvmstruct\[plot\]"):
        timeline.to_png(found)
