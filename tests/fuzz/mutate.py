"""Mutates seeds without looking at coverage: for short runs, and where there is no atheris."""

import random
from collections.abc import Iterator, Sequence

#: Of which a byte, or a length, becomes one.
_EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0xC1, 0xD9, 0xDF)


def _once(dice: random.Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    at = dice.randrange(len(data) + 1)
    match dice.randrange(7):
        case 0 if at < len(data):
            data[at] ^= 1 << dice.randrange(8)
        case 1 if at < len(data):
            data[at] = dice.choice(_EDGES)
        case 2:
            del data[at : at + dice.choice((1, 1, 4, 60))]
        case 3:
            data[at:at] = dice.randbytes(dice.choice((1, 2, 8)))
        case 4:
            data[at:at] = data[at : at + dice.choice((1, 8, 200))] * dice.choice((1, 3))
        case 5:
            other = dice.choice(seeds)
            data[at:] = other[dice.randrange(len(other) + 1) :]
        case _:
            data[at : at + 4] = dice.choice((0, 1, 125, 126, 65_535, 2**31 - 1, 2**32 - 1)).to_bytes(
                4, dice.choice(("big", "little"))
            )


def mutations(dice: random.Random, seeds: Sequence[bytes]) -> Iterator[bytes]:
    """The seeds, and then mutants of them without an end."""
    yield from seeds
    while True:
        data = bytearray(dice.choice(seeds))
        for _ in range(dice.choice((1, 1, 2, 3, 6))):
            _once(dice, data, seeds)
        yield bytes(data)
