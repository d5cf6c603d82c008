"""An input is whole, live or piped; what each kind has, and lacks."""

from typing import Any

import pytest

from protocol.wire.structs import InputInfo
from protocol.wire.validators import parse_struct

SHA256 = "0" * 64
SOURCE = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    "wire",
    [
        {"media_type": "audio/wav", "size": 3, "sha256": SHA256},
        {"media_type": "", "size": 0, "sha256": SHA256},
        {"media_type": "text/plain", "live": True},
        {"from": SOURCE},
        {"from": SOURCE, "media_type": "text/plain"},
    ],
)
def test_each_kind_is_written_as_it_is_read(wire: dict[str, Any]) -> None:
    info = parse_struct(InputInfo, wire)
    assert info.to_map() == wire
    assert info.is_fed == ("size" not in wire)


@pytest.mark.parametrize(
    ("wire", "fault"),
    [
        ({}, "lacks media_type, size, sha256"),
        ({"live": False}, "lacks media_type, size, sha256"),
        ({"media_type": "audio/wav", "size": 3}, "lacks sha256"),
        ({"media_type": "audio/wav", "size": 3, "sha256": ""}, "lacks sha256"),
        ({"live": True}, "lacks media_type"),
        ({"live": True, "media_type": "text/plain", "size": 3}, "has a size or sha256, which nobody knows"),
        ({"from": SOURCE, "sha256": SHA256}, "has a size or sha256, which nobody knows"),
        ({"from": SOURCE, "live": True}, "is either live or from another request"),
        ({"from": "abc"}, "^from: 'abc' is not a request id"),
    ],
)
def test_a_mixture_is_refused_in_words(wire: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        parse_struct(InputInfo, wire)
