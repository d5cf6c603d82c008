"""Holds docs/protocol.md to the code: its tables are the message classes, its examples are what the codec writes."""

import ast
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any, cast

import attrs
import pytest

from protocol.client.watch import COUNTS_ON, ROW_KEYS
from protocol.link import backoff, dial, limits
from protocol.wire import codec, messages
from protocol.wire.codec import decode, encode
from protocol.wire.errors import ErrorCode
from protocol.wire.frames import Audio
from protocol.wire.messages import (
    FROM_ANYONE,
    FROM_CLIENT,
    FROM_OPERATOR,
    FROM_RELAY,
    FROM_WORKER,
    Hello,
    Submit,
    Table,
)
from protocol.wire.validators import Message, Struct, wire_name
from relayd.config.schema import Limits, PrincipalLimits, SpaceConfig
from relayd.connections.operator import ACTIONS, OperatorHandler
from relayd.logs import recent
from relayd.requests.summary import summarize
from relayd.talk import talk_row
from relayd.views import rows, token_rows
from relayd.views.request_detail import request_detail

DOC = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")
#: Heading -> text up to the next heading of any level. The same heading may stand twice in other sections.
SECTIONS = re.findall(r"^#{2,4} (.+)\n((?:(?!#{2,4} ).*\n?)*)", DOC, re.MULTILINE)
MESSAGE_CLASSES = [
    cls for cls in vars(messages).values() if inspect.isclass(cls) and issubclass(cls, Message) and hasattr(cls, "TYPE")
]
PARTS = [messages.AudioFormat, messages.VideoFormat, messages.InputInfo, messages.InputRule, messages.Running]


def section(heading: str) -> str:
    """The text under the one heading that matches."""
    found: list[str] = [text for name, text in SECTIONS if re.fullmatch(heading, name)]
    assert len(found) == 1, f"{len(found)} sections are called {heading}"
    return found[0]


def folded(text: str) -> str:
    """The text with every run of whitespace as one space, so that a phrase is found wherever its lines are wrapped."""
    return " ".join(text.split())


def table(text: str) -> list[list[str]]:
    """Rows of the first table in `text`, its head left out; a cell is stripped."""
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    if lines is None:
        return []
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[0].splitlines()[2:]]


def code(cell: str) -> str:
    """The first thing in backticks."""
    found = re.search(r"`([^`]+)`", cell)
    assert found, f"nothing in backticks in {cell!r}"
    return found[1]


def default_in_words(attribute: "attrs.Attribute[Any]") -> str:
    """As the third column says it."""
    default: Any = attribute.default
    if default is attrs.NOTHING:
        return "required"
    if factory := getattr(default, "factory", None):  # attrs.Factory is a class to Python and a function to mypy
        default = factory()
    if default is None:
        return "absent"
    if isinstance(default, tuple):
        default = list(default)
    words = f'"{default}"' if isinstance(default, str) else str(default)
    return f"`{words.lower() if isinstance(default, bool) else words}`"


def fields_in_words(cls: type[Struct]) -> list[list[str]]:
    return [[f"`{wire_name(a)}`", default_in_words(a)] for a in attrs.fields(cast(Any, cls))]


def examples() -> dict[str, bytes]:
    """Type -> bytes of the annotated examples."""
    blocks = re.findall(r"^```hex (\w+)\n(.*?)^```", DOC, re.MULTILINE | re.DOTALL)
    return {name: bytes.fromhex("".join(line.split("#")[0] for line in body.splitlines())) for name, body in blocks}


@pytest.mark.parametrize("cls", MESSAGE_CLASSES, ids=lambda cls: cls.__name__)
def test_every_message_class_has_a_table_with_its_fields_and_their_defaults(cls: type[Message]) -> None:
    sender = {"Status": r"C → R", "StatusReply": r"R → C", "Spaces": r"C → R", "SpacesReply": r"R → C"}
    who = re.escape(sender[cls.__name__]) if cls.__name__ in sender else ".+"
    text = section(rf"`{cls.TYPE}` \({who}\)")
    assert [[row[0], row[2]] for row in table(text)] == fields_in_words(cls)


@pytest.mark.parametrize("cls", PARTS, ids=lambda cls: cls.__name__)
def test_every_part_has_a_table_with_its_fields_and_their_defaults(cls: type[Struct]) -> None:
    text = section(f"part `{cls.__name__}`")
    assert [[row[0], row[2]] for row in table(text)] == fields_in_words(cls)


def test_the_overview_says_of_every_type_who_may_send_it() -> None:
    senders: dict[str, Table] = {
        "client": FROM_CLIENT | FROM_ANYONE,  # type: ignore[operator]
        "worker": FROM_WORKER | FROM_ANYONE,  # type: ignore[operator]
        "operator": FROM_OPERATOR | FROM_ANYONE,  # type: ignore[operator]
        "relay": FROM_RELAY,
    }
    types = {kind for takes in senders.values() for kind in takes}
    expected = {kind: {who for who, sends in senders.items() if kind in sends} for kind in types}
    told = {code(row[0]): set(row[1].split(", ")) for row in table(section("1 Overview"))}
    assert told == expected


def test_every_error_code_is_there_with_whether_it_is_retryable() -> None:
    told = {code(row[0]): row[1] for row in table(section("11 Error codes"))}
    assert told == {each.value: "yes" if each.retryable else "no" for each in ErrorCode}


@pytest.mark.parametrize(
    ("message", "takes"),
    [
        (Hello(version=1, role="client", token="rly_c_example", agent="demo/1"), FROM_ANYONE),
        (
            Submit(request_id="0123456789abcdef0123456789abcdef", space="tts", params={"text": "你好", "speed": 1.5}),
            FROM_CLIENT,
        ),
        (
            Audio(
                request_id="0123456789abcdef0123456789abcdef",
                attempt=1,
                seq=1,
                pcm=b"\x00\x00\x01\x00\xff\xff\x00\x80",
            ),
            FROM_RELAY,
        ),
    ],
    ids=["hello", "submit", "audio"],
)
def test_the_hex_examples_are_what_the_codec_reads_and_writes(message: Message, takes: Table) -> None:
    data = examples()[message.TYPE]
    assert decode(data, takes) == message
    assert encode(message) == data


def test_the_annotations_of_the_hex_examples_quote_the_bytes_beside_them() -> None:
    lines = re.findall(r'^([0-9a-f ]+?) +# +(?:key|= string of \d+ bytes:) "(.+)"$', DOC, re.MULTILINE)
    assert len(lines) > 25
    for hexed, quoted in lines:
        assert bytes.fromhex(hexed)[1:].decode() == quoted


def test_the_lengths_told_of_the_hello_frame_are_those_of_the_example() -> None:
    size = len(examples()["hello"])
    assert f"`{0x80 | size:02x}` (masked, {size} bytes)" in folded(DOC)


def test_the_fixed_limits_are_those_of_the_codec() -> None:
    limits = [
        messages.MAX_MESSAGE_BYTES,
        messages.MAX_CONTROL_BYTES,
        codec.MAX_DEPTH,
        codec.MAX_MAP,
        codec.MAX_ARRAY,
        codec.MAX_VALUES,
        codec.MAX_CONTAINERS,
        messages.MAX_INPUT_CHUNK_BYTES,
        messages.MAX_PCM_BYTES,
        messages.MAX_TEXT_CHARS,
    ]
    values = [row[1].split()[0] for row in table(section("4 Limits"))]
    assert [value for value in values if value[0].isdigit()] == [f"{limit:,}" for limit in limits]


def test_the_times_told_for_connecting_and_for_liveness_are_those_of_the_reference_client() -> None:
    closing, liveness = folded(section("2.5 Closing")), folded(section("2.4 Liveness"))
    assert f"may take {dial.CONNECT_TIMEOUT_S:g} s up to the 101" in closing
    assert f"then {dial.LOGIN_TIMEOUT_S:g} s more up to `welcome`" in closing
    assert f"starts at {backoff.FIRST_S:g} s and doubles to {backoff.LONGEST_S:g} s" in closing
    assert f"after a login that held for {backoff.HELD_S:g} s" in closing
    assert f"`ping_interval_s` (in `welcome`; {limits.PING_INTERVAL_S:g} s by default)" in liveness
    assert f"the larger of {limits.DEAD_AFTER_S:g} s and 3 × `ping_interval_s`" in liveness


def test_a_refused_login_is_tried_again_exactly_where_its_code_is_retryable() -> None:
    rows_ = table(section("2.3 `hello` and `welcome`"))
    told = {code(row[0]): row[2].startswith("later") for row in rows_}
    assert told == {each: ErrorCode(each).retryable for each in told}


def test_every_limit_that_a_relay_can_be_set_to_is_named() -> None:
    text, of_one = section("4 Limits"), section("4.1 One principal's share")
    for setting in attrs.fields(Limits):
        assert setting.name == "principal" or f"`{setting.name}`" in text
    rows_ = {code(row[0].partition(",")[0]): row[1] for row in table(of_one)}
    assert rows_.keys() == {setting.name for setting in attrs.fields(PrincipalLimits)}
    for name in ("max_connections", "max_queued", "max_uploads", "max_readers", "max_retained", "max_priority"):
        assert int(rows_[name].replace(",", "")) == getattr(PrincipalLimits(), name)


def test_every_option_of_create_space_is_named() -> None:
    text = section("9.2 Steer")
    for name in SpaceConfig.field_names():
        assert f"`{name}`" in text


def test_the_table_of_steers_is_the_operators_table() -> None:
    assert [code(row[0]) for row in table(section("9.2 Steer"))] == list(ACTIONS)


def keys_of(function: Any) -> set[str]:
    """The keys that a function of `relayd.views.rows` gives its row: those of its literals and its assignments."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    keys: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict) and len(node.keys) > 1:
            keys |= {key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and isinstance(node.slice, ast.Constant):
            keys.add(str(node.slice.value))
    return keys


@pytest.mark.parametrize(
    ("topic", "functions"),
    [
        ("relay", [rows.relay_row]),
        ("spaces", [rows.space_row, rows.watched_space_row]),
        ("workers", [rows.worker_row]),
        ("requests", [rows.request_row]),
        ("talks", [talk_row.talk_row]),
        ("clients", [rows.client_row]),
        ("history", [rows.history_row]),
        ("log", [recent.log_row, recent.RecentRows.add]),
        ("audit", [OperatorHandler._audit, recent.RecentRows.add]),
    ],
)
def test_every_key_of_an_operators_row_is_named(topic: str, functions: list[Any]) -> None:
    paragraph = re.search(rf"^\*\*`{topic}` rows:\*\*(.*?)\n\n", DOC, re.MULTILINE | re.DOTALL)
    assert paragraph
    for function in functions:
        assert keys_of(function)
        assert keys_of(function) - {"inputs", "params"} <= set(re.findall(r"`(\w+)`", paragraph[1]))


def test_every_key_of_a_description_is_named() -> None:
    told = set(re.findall(r"`(\w+)`", folded(section("9.2 Steer")).partition("`describe` returns everything")[2]))
    assert keys_of(request_detail) | keys_of(summarize) <= told


def test_the_values_that_count_on_are_told() -> None:
    ages = re.search(r"^\*\*Ages\.\*\*(.*?)\n\n", DOC, re.MULTILINE | re.DOTALL)
    assert ages
    for topic, keys in COUNTS_ON.items():
        counted = re.search(rf"`{topic}`: (.*?)(?=\.\s`|\. The relay|$)", folded(ages[1]))
        assert counted
        assert set(keys) == set(re.findall(r"`(\w+_s)`", counted[1]))


def test_every_key_of_a_space_and_of_a_token_is_named() -> None:
    told = {name for row in table(section("5.4 Status and spaces")) for name in re.findall(r"`(\w+)`", row[0])}
    assert told == keys_of(rows.space_row)
    tokens = folded(section("9.2 Steer")).partition("Rows of `list_tokens`")[2]
    assert keys_of(token_rows.token_row) <= set(re.findall(r"`(\w+)`", tokens))


def test_the_topics_are_those_of_the_relay() -> None:
    told = {code(row[0]): code(row[1]) for row in table(section("9.1 Watch"))}
    assert tuple(told) == rows.TOPICS
    assert told == ROW_KEYS


def test_links_of_the_contents_lead_to_headings() -> None:
    anchors = {re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-") for name, _text in SECTIONS}
    links = re.findall(r"\]\(#([^)]+)\)", DOC)
    assert links
    assert set(links) <= anchors
