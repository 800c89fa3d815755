"""The JSON of a bitstream, the sizes that follow from it, and what is refused."""

import json
from dataclasses import replace

import pytest

from tvmstruct.errors import VtaConfigError
from tvmstruct.vta.config import BOARDS, DEFAULT, PRESETS, Config, Memory

JSON = json.loads(DEFAULT.to_json())


def test_derived_sizes_of_the_default() -> None:
    # VTA_ISA section 1, the columns "default"
    depths = {"UOP": 8192, "WGT": 1024, "INP": 2048, "ACC": 2048, "OUT": 2048, "ACC8": 2048}
    assert {m.name: DEFAULT.depth(m) for m in Memory} == depths
    sizes = {"UOP": 4, "WGT": 256, "INP": 16, "ACC": 64, "OUT": 16, "ACC8": 16}
    assert {m.name: DEFAULT.tile_bytes(m) for m in Memory} == sizes
    assert DEFAULT.sram_tile_bytes(Memory.ACC8) == 64
    assert DEFAULT.name == "1x16_i8w8a32_15_15_18_17"
    assert DEFAULT.macs_per_tile == 256


def test_derived_sizes_of_another_design() -> None:
    config = replace(DEFAULT, log_batch=1, log_block=5, log_wgt_width=2, log_wgt_buff_size=15)
    assert config.tile_shape(Memory.INP) == (2, 32)
    assert config.tile_shape(Memory.WGT) == (32, 32)
    assert config.tile_bytes(Memory.WGT) == 32 * 32 * 4 // 8
    assert config.depth(Memory.WGT) == 2**15 // 512
    assert config.depth(Memory.ACC) == 2**17 // (2 * 32 * 4) == config.depth(Memory.OUT)
    assert config.log_depths == {m: config.log_depth(m) for m in Memory}


def test_json_round_trip(tmp_path) -> None:
    config = replace(DEFAULT, target="zcu104", log_block=5, extensions=frozenset({"vvma"}))
    path = tmp_path / "vta_config.json"
    path.write_text(config.to_json(), encoding="utf-8")
    assert Config.from_json(path) == Config.from_json(str(path)) == config
    assert Config.from_json(config.to_json()) == config
    assert "EXTENSIONS" not in JSON


@pytest.mark.parametrize("name", PRESETS)
def test_presets_read_back(name: str) -> None:
    assert Config.from_json(PRESETS[name].to_json()) == PRESETS[name]


def test_peak_of_boards() -> None:
    assert BOARDS["pynq"].peak_gops(DEFAULT) == pytest.approx(51.2)
    assert BOARDS["zcu104"].peak_gops(DEFAULT) == pytest.approx(170.5, abs=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"LOG_BLOK": 4}, "unknown key LOG_BLOK"),
        ({"LOG_BLOCK_IN": 4, "LOG_BLOCK_OUT": 4}, "one LOG_BLOCK takes their place"),
        ({"LOG_BLOCK": None}, "missing key LOG_BLOCK"),
        ({"LOG_BLOCK": "4"}, "LOG_BLOCK is '4', want an integer"),
        ({"LOG_BLOCK": True}, "LOG_BLOCK is True, want an integer"),
        ({"LOG_BLOCK": 4.0}, "LOG_BLOCK is 4.0, want an integer"),
        ({"LOG_INP_WIDTH": 6}, "LOG_INP_WIDTH is 6, want 0 to 5"),
        ({"LOG_BATCH": -1}, "LOG_BATCH is -1, want 0 to 30"),
        ({"TARGET": 3}, "TARGET is 3, want a string"),
        ({"HW_VER": "9"}, "HW_VER 9 is unknown"),
        ({"EXTENSIONS": ["warp"]}, "unknown extension warp"),
        ({"EXTENSIONS": "vvma"}, "want a list of names"),
        ({"LOG_BLOCK": 7}, "a tile of wgt has 16384 bytes, over a page"),
        (
            {"LOG_BLOCK": 0, "LOG_INP_WIDTH": 0, "LOG_WGT_BUFF_SIZE": 8},
            "a tile of inp has 1 bits, under one byte",
        ),
        ({"LOG_INP_BUFF_SIZE": 3}, "the inp buffer is smaller than one tile"),
        ({"LOG_INP_BUFF_SIZE": 22}, r"holds 2\^18 tiles"),
        ({"LOG_UOP_BUFF_SIZE": 17}, "word 0 of GEMM and ALU needs 67 bits"),
        (
            {"LOG_INP_BUFF_SIZE": 16, "LOG_WGT_BUFF_SIZE": 19},
            "word 1 of GEMM needs 68 bits",
        ),
        ({"LOG_ACC_BUFF_SIZE": 18, "LOG_INP_BUFF_SIZE": 13}, "word 1 of ALU needs 68 bits"),
        (
            {"LOG_INP_BUFF_SIZE": 12, "LOG_WGT_BUFF_SIZE": 19},
            "a micro-op needs 33 bits",
        ),
    ],
)
def test_refused(change: dict, message: str) -> None:
    data = {k: v for k, v in (JSON | change).items() if v is not None}
    with pytest.raises(VtaConfigError, match=message):
        Config.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["{", '{"LOG_BLOCK": 1', "{" * 100_000])
def test_text_that_is_no_json(text: str) -> None:
    with pytest.raises(VtaConfigError, match="not JSON"):
        Config.from_json(text)


def test_file_that_is_no_object(tmp_path) -> None:
    path = tmp_path / "c.json"
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(VtaConfigError, match="want a JSON object"):
        Config.from_json(path)
    with pytest.raises(VtaConfigError, match="cannot read"):
        Config.from_json(tmp_path / "missing.json")
