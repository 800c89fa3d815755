"""Tokens between units: the order they allow, deadlock, misuse."""

import pytest

from tvmstruct.errors import VtaRunError
from tvmstruct.vta.assembly import assemble
from tvmstruct.vta.queues import Token, order

PIPELINE = """
load.inp push=next
load.inp pop=next push=next
gemm pop=prev push=prev,next
store.out pop=prev push=prev
gemm pop=prev,next
finish
"""


def test_each_pop_has_its_push() -> None:
    found = order(assemble(PIPELINE))
    assert found.sequence == (0, 2, 1, 3, 4, 5)
    assert found.sources == ((), (2,), (0,), (2,), (1, 3), ())
    assert not any(found.left.values())


def test_tokens_of_an_earlier_launch() -> None:
    found = order(assemble("load.inp pop=next push=next\nfinish"), {Token.G2L: 2})
    assert found.sources[0] == (-1,)
    assert found.left == {Token.L2G: 1, Token.G2L: 1, Token.G2S: 0, Token.S2G: 0}


def test_deadlock_names_what_every_unit_waits_for() -> None:
    text = "load.inp pop=next push=next\ngemm pop=prev,next push=prev\nfinish"
    with pytest.raises(VtaRunError) as caught:
        order(assemble(text))
    assert caught.value.rule == "deadlock"
    assert caught.value.instruction == 0
    assert str(caught.value).splitlines() == [
        "deadlock: no unit can go on",
        "  load unit: instruction 0 (load.inp   pop=next push=next) waits for g2l, 1 queued",
        "  compute unit: instruction 1 (gemm       pop=prev,next push=prev) waits for "
        "l2g and s2g, 2 queued",
        "  store unit: queue empty",
        "  tokens: l2g 0, g2l 0, g2s 0, s2g 0",
    ]


def test_a_full_queue_stops_fetch() -> None:
    # the load that gives the token is behind 513 stores, of which 512 fit
    stores = "store.out pop=prev\n" + "store.out\n" * 511
    rest = "gemm push=next\nfinish"
    assert len(order(assemble(stores + rest)).sequence) == 514
    with pytest.raises(VtaRunError, match="fetch: 3 instructions not dispatched"):
        order(assemble(stores + "store.out\n" + rest))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("load.inp pop=prev", "has pop_prev, but the load unit has no neighbour on that side"),
        ("load.wgt push=prev", "has push_prev"),
        ("store.out pop=next", "has pop_next, but the store unit"),
        ("store.out push=next", "has push_next"),
    ],
)
def test_bits_without_a_neighbour(line: str, message: str) -> None:
    with pytest.raises(VtaRunError, match=f"token-bits: instruction 1 .*{message}"):
        order(assemble(f"finish\n{line}"))


def test_tokens_over_the_counter() -> None:
    pushes = "load.inp push=next\n"
    assert order(assemble(pushes * 255 + "finish")).left[Token.L2G] == 255
    with pytest.raises(VtaRunError, match=r"token-overflow: instruction 255 .* token 256 onto l2g"):
        order(assemble(pushes * 256 + "finish"))


def test_no_finish() -> None:
    with pytest.raises(VtaRunError, match="finish-missing: none of 1 instructions"):
        order(assemble("load.inp"))
    with pytest.raises(VtaRunError, match="finish-missing: none of 0"):
        order([])


@pytest.mark.parametrize(
    "text", ["finish\nload.inp", "finish\nfinish", "store.out pop=prev\nfinish"]
)
def test_finish_before_others(text: str) -> None:
    with pytest.raises(VtaRunError, match=r"finish-last: instruction \d \(finish\) runs before"):
        order(assemble(text))
