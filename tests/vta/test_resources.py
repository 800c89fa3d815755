"""What designs take of a board."""

from dataclasses import replace

import pytest

from tvmstruct.vta.config import DEFAULT, Config
from tvmstruct.vta.resources import LIMITS, Resources, blocks, vta_resources


@pytest.mark.parametrize(
    ("width", "depth", "count"),
    [
        (64, 512, 1),
        (32, 1024, 1),
        (1, 32768, 1),
        (32, 8192, 8),  # micro-ops: 32 KiB
        (2048, 1024, 64),  # weights: 256 KiB
        (512, 2048, 32),  # accumulators: 128 KiB
        (65, 512, 2),
        (64, 513, 2),
        (8, 4097, 2),
    ],
)
def test_block_ram_of_a_memory(width, depth, count):
    assert blocks(width, depth) == count


@pytest.mark.parametrize("board", LIMITS)
def test_the_shipped_design_fits_every_board(board):
    """Bitstreams of the default configuration exist for all three."""
    assert vta_resources(DEFAULT, LIMITS[board]).fits(LIMITS[board])


def test_multipliers_beyond_the_slices_go_into_luts():
    pynq, zcu = (vta_resources(DEFAULT, LIMITS[board]) for board in ("pynq", "zcu104"))
    assert (pynq.dsp, zcu.dsp) == (220, 256)
    assert pynq.lut - zcu.lut == pytest.approx(36 * 71)


def test_everything_grows_with_the_design():
    limits = LIMITS["zcu104"]
    base = vta_resources(DEFAULT, limits)
    for change in ({"log_batch": 1}, {"log_block": 5}):
        more = vta_resources(replace(DEFAULT, **change), limits)
        assert more.lut > base.lut
        assert more.dsp > base.dsp
    less = vta_resources(Config(log_wgt_buff_size=17), limits)
    assert base.bram - less.bram == 32
    assert (less.lut, less.dsp) == (base.lut, base.dsp)


def test_vector_unit_takes_multipliers_and_a_second_port():
    limits = LIMITS["zcu104"]
    plain = vta_resources(DEFAULT, limits)
    more = vta_resources(replace(DEFAULT, extensions=frozenset({"vvma"})), limits)
    assert (more.dsp - plain.dsp, more.bram - plain.bram) == (16, 8)


def test_scarcest_kind_and_its_share():
    limits = Resources(lut=100, ff=100, dsp=10, bram=10)
    assert Resources(lut=50, dsp=9, bram=1).share(limits) == ("dsp", 0.9)
    assert Resources(lut=100, ff=100, dsp=10, bram=10).fits(limits)
    assert not Resources(bram=11).fits(limits)
