"""The SQLite database: its tables, and the conversion of records and changes to rows.

Blocks; `relayd.store.sqlite` runs it in threads.
"""

import contextlib
import json
import logging
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import attrs
import msgpack

from protocol.wire.errors import ProtocolError
from protocol.wire.messages import LIVE_STATES, Submit
from protocol.wire.structs import AudioFormat, InputRule
from protocol.wire.validators import parse_struct
from relayd.config.schema import ConfigError, SpaceConfig
from relayd.store.base import StorageFull, StoreError
from relayd.store.record_rules import RecordT, checked
from relayd.store.records import (
    MAX_UPTIME_S,
    AppendInput,
    Change,
    ClearInput,
    DeleteDrain,
    DeleteInvite,
    DeleteRequest,
    DeleteSession,
    DeleteSpace,
    DeleteTalk,
    DeleteToken,
    DeleteTurns,
    DeleteWorker,
    InviteRecord,
    Loaded,
    PutDrain,
    PutHeard,
    PutInvite,
    PutRequest,
    PutSession,
    PutSpace,
    PutTalk,
    PutToken,
    PutTurn,
    PutUptime,
    PutUser,
    PutWorker,
    RequestRecord,
    SessionRecord,
    SpaceRecord,
    StoredInput,
    TalkRecord,
    TokenLimits,
    TokenRecord,
    TurnRecord,
    UpdateRequest,
    UserRecord,
)
from relayd.store.state_dir import file_error, open_private

DATABASE_NAME = "relayd.db"
#: "rlyd" in ASCII; identifies the database as relayd's, also to `file`.
APPLICATION_ID = 0x726C7964
#: How long to wait for a lock, such as that of a transaction in the sqlite3 shell.
BUSY_TIMEOUT_S = 5.0
#: With less free space than this, an I/O error is reported as a full disk, its almost certain cause.
FULL_BELOW_BYTES = 1024 * 1024
#: A larger file is not checked at the start: this takes a third of a second, and clients wait.
CHECK_BELOW_BYTES = 64 * 1024 * 1024

#: Whatever the bytes of a row are, they cost only that row.
_PARSE_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    ProtocolError,
    ConfigError,
    msgpack.UnpackException,
)

#: The standard library's: commands without structlog read the store, too.
log = logging.getLogger(__name__)

Statement = tuple[str, tuple[Any, ...]]

#: Steps from one schema version to the next; the first creates version 1 in an empty file. Append only.
_MIGRATIONS = (
    """
    CREATE TABLE spaces (name TEXT PRIMARY KEY, config TEXT NOT NULL, paused INTEGER NOT NULL, made_by TEXT NOT NULL,
        engine TEXT NOT NULL, params BLOB NOT NULL, inputs BLOB NOT NULL, format BLOB, created_at REAL NOT NULL);
    CREATE TABLE tokens (token_id TEXT PRIMARY KEY, principal TEXT NOT NULL, role TEXT NOT NULL, spaces TEXT NOT NULL,
        sha256 BLOB NOT NULL UNIQUE, limits TEXT NOT NULL, created_at REAL NOT NULL, expires_at REAL, revoked_at REAL);
    CREATE TABLE requests (request_id TEXT PRIMARY KEY, principal TEXT NOT NULL, ticket INTEGER NOT NULL,
        submit BLOB NOT NULL, state TEXT NOT NULL, attempt INTEGER NOT NULL, losses INTEGER NOT NULL,
        has_output INTEGER NOT NULL, reproducible TEXT NOT NULL, created_at REAL NOT NULL, ended_at REAL,
        code TEXT, message TEXT);
    CREATE TABLE inputs (request_id TEXT NOT NULL, name TEXT NOT NULL, data BLOB NOT NULL,
        PRIMARY KEY (request_id, name));
    """,
    "ALTER TABLE requests ADD COLUMN stopping TEXT;",
    "ALTER TABLE requests ADD COLUMN worker_id TEXT;",
    "ALTER TABLE requests ADD COLUMN promoted INTEGER NOT NULL DEFAULT 0;",
    """
    ALTER TABLE requests ADD COLUMN since REAL;
    ALTER TABLE requests ADD COLUMN away_since REAL;
    CREATE TABLE clock (uptime_s REAL NOT NULL);
    """,
    "CREATE TABLE drains (worker_id TEXT NOT NULL UNIQUE);",
    "ALTER TABLE requests ADD COLUMN outcome BLOB;",
    "ALTER TABLE tokens ADD COLUMN readonly INTEGER NOT NULL DEFAULT 0;",
    "ALTER TABLE requests ADD COLUMN highest_attempt INTEGER NOT NULL DEFAULT 0;",
    """
    CREATE TABLE input_pieces (request_id TEXT NOT NULL, name TEXT NOT NULL, offset INTEGER NOT NULL,
        data BLOB NOT NULL, last INTEGER NOT NULL, PRIMARY KEY (request_id, name, offset));
    """,
    """
    CREATE TABLE talks (talk_id TEXT PRIMARY KEY, principal TEXT NOT NULL, user TEXT NOT NULL, session TEXT NOT NULL,
        instructions TEXT NOT NULL, created_at REAL NOT NULL, touched_at REAL NOT NULL,
        UNIQUE (principal, user, session));
    CREATE TABLE turns (talk_id TEXT NOT NULL, number INTEGER NOT NULL, role TEXT NOT NULL, content TEXT NOT NULL,
        state TEXT NOT NULL, heard_chars INTEGER, code TEXT, message TEXT, text_request TEXT, speech_request TEXT,
        options BLOB, at REAL NOT NULL, PRIMARY KEY (talk_id, number));
    CREATE INDEX unended_turns ON turns (talk_id, number) WHERE options IS NOT NULL;
    """,
    "CREATE TABLE workers (worker_id TEXT NOT NULL, space TEXT NOT NULL, PRIMARY KEY (worker_id, space));",
    """
    CREATE TABLE users (user_id TEXT PRIMARY KEY, name TEXT NOT NULL COLLATE NOCASE UNIQUE, role TEXT NOT NULL,
        password TEXT NOT NULL, created_at REAL NOT NULL, seen_at REAL, removed_at REAL);
    CREATE TABLE sessions (session_id TEXT PRIMARY KEY, user_id TEXT NOT NULL, sha256 BLOB NOT NULL UNIQUE,
        created_at REAL NOT NULL, used_at REAL NOT NULL);
    CREATE TABLE invites (invite_id TEXT PRIMARY KEY, sha256 BLOB NOT NULL UNIQUE, role TEXT NOT NULL,
        created_at REAL NOT NULL, expires_at REAL NOT NULL);
    """,
    "ALTER TABLE drains ADD COLUMN cordon INTEGER NOT NULL DEFAULT 0;",
)
SCHEMA_VERSION = len(_MIGRATIONS)
#: What is read of each table; one that lacks any of it is damaged.
COLUMNS = {
    "spaces": "name, config, paused, made_by, engine, params, inputs, format, created_at",
    "tokens": "token_id, principal, role, spaces, sha256, limits, readonly, created_at, expires_at, revoked_at",
    "users": "user_id, name, role, password, created_at, seen_at, removed_at",
    "sessions": "session_id, user_id, sha256, created_at, used_at",
    "invites": "invite_id, sha256, role, created_at, expires_at",
    "requests": (
        "request_id, principal, ticket, submit, state, attempt, highest_attempt, losses, has_output, reproducible, "
        "stopping, worker_id, promoted, since, away_since, created_at, ended_at, code, message, outcome"
    ),
    "clock": "uptime_s",
    "drains": "worker_id, cordon",
    "workers": "worker_id, space",
    "inputs": "request_id, name, data",
    "talks": "talk_id, principal, user, session, instructions, created_at, touched_at",
    "turns": (
        "talk_id, number, role, content, state, heard_chars, code, message, text_request, speech_request, options, at"
    ),
    "input_pieces": "request_id, name, offset, length(data), typeof(data), last",
}
#: The tables whose columns are the fields of a record.
_TABLES = {TalkRecord: "talks", UserRecord: "users", SessionRecord: "sessions", InviteRecord: "invites"}


class BadChange(StoreError):
    """SQLite refuses this change, regardless of the state of the disk."""


class Database:
    """Two connections to one file, for writing and for reading; each may be used by one thread at a time."""

    def __init__(self, path: Path, writer: sqlite3.Connection, reader: sqlite3.Connection) -> None:
        self._path = path
        self._writer = writer
        self._reader = reader
        #: Number of committed transactions.
        self.transactions = 0

    @classmethod
    def open(cls, state_dir: Path) -> Self:
        """Open the database in an existing, locked folder; it is created or migrated if necessary.

        Raises:
            StoreError: the database cannot be opened, is damaged, belongs to another program, or was written by a
                newer relayd.
        """
        path = state_dir / DATABASE_NAME
        try:
            os.close(open_private(path))
        except OSError as fault:
            raise file_error(fault, f"cannot open {path}", "it must belong to the daemon's user") from fault
        with contextlib.ExitStack() as opened:
            try:
                writer = opened.enter_context(contextlib.closing(_connect(path)))
                _migrate(writer, path)
                if path.stat().st_size <= CHECK_BELOW_BYTES:
                    _check(writer, path)
                writer.execute("PRAGMA journal_mode = WAL")
                # In WAL mode, FULL syncs every commit; NORMAL does not (sqlite.org/pragma.html).
                writer.execute("PRAGMA synchronous = FULL")
                # Truncates the WAL after a huge transaction.
                writer.execute(f"PRAGMA journal_size_limit = {64 * 1024 * 1024}")
                reader = opened.enter_context(contextlib.closing(_connect(path)))
                reader.execute("PRAGMA query_only = ON")
                # Bytes that are not UTF-8 cost only their row, not the whole table.
                reader.text_factory = lambda data: data.decode(errors="surrogateescape")
                for table, columns in COLUMNS.items():
                    reader.execute(f"SELECT {columns} FROM {table} LIMIT 0")
            except sqlite3.Error as fault:
                raise _to_store_error(fault, path) from fault
            except UnicodeDecodeError as fault:  # SQLite's own message quotes a damaged schema
                raise _damaged(path, fault) from fault
            opened.pop_all()
        return cls(path, writer, reader)

    def close(self) -> None:
        """Close both connections; the last one to close merges the WAL into the file."""
        self._reader.close()
        self._writer.close()

    # -- writing -

    def statements(self, changes: Iterable[Change]) -> list[Statement]:
        """Convert `changes` to SQL."""
        return [statement for change in changes for statement in _statements(change)]

    def write(self, statements: Sequence[Statement]) -> StoreError | None:
        """Execute all of `statements` durably, or none of them and return the error."""
        if not statements:
            return None
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            for sql, values in statements:
                self._writer.execute(sql, values)
            self._writer.execute("COMMIT")
        except (sqlite3.Error, ArithmeticError, ValueError, TypeError) as fault:  # also a value that SQLite cannot hold
            error = _to_store_error(fault, self._path)
            error.__cause__ = fault
            return error
        finally:
            if self._writer.in_transaction:
                # The original error is being handled; if the rollback fails too, nothing is written either.
                with contextlib.suppress(sqlite3.Error):
                    self._writer.execute("ROLLBACK")
        self.transactions += 1
        return None

    # -- reading -

    def load(self) -> Loaded:
        """See `Store.load`; returns only committed records."""
        damaged: dict[tuple[str, object], str] = {}

        def records(
            table: str, order: str, parse: Callable[[sqlite3.Row], RecordT], where: str = ""
        ) -> tuple[RecordT, ...]:
            rows = self._reader.execute(f"SELECT {COLUMNS[table]} FROM {table} {where} ORDER BY {order}")
            return tuple(_parsed(rows, table, parse, damaged))

        try:
            drains = [tuple(row) for row in self._reader.execute("SELECT worker_id, cordon FROM drains ORDER BY rowid")]
            workers = [tuple(row) for row in self._reader.execute("SELECT worker_id, space FROM workers")]
            times = [time for (time,) in self._reader.execute("SELECT uptime_s FROM clock")]
            spaces, tokens = records("spaces", "name", _space), records("tokens", "created_at, token_id", _token)
            requests = records("requests", "ticket, request_id", _request)
            unended = records("turns", "talk_id, number", _row_of(TurnRecord), "WHERE options IS NOT NULL")
            live_inputs = self._load_live_inputs({each.request_id for each in requests}, damaged)
            return Loaded(
                spaces=spaces,
                tokens=tokens,
                users=records("users", "created_at, user_id", _row_of(UserRecord)),
                sessions=records("sessions", "created_at, session_id", _row_of(SessionRecord)),
                invites=records("invites", "created_at, invite_id", _row_of(InviteRecord)),
                requests=tuple(each for each in requests if ("requests", each.request_id) not in damaged),
                live_inputs=live_inputs,
                drains=tuple((name, bool(cordon)) for name, cordon in drains if isinstance(name, str)),
                workers=tuple(
                    (one, space) for one, space in workers if isinstance(one, str) and isinstance(space, str)
                ),
                uptime_s=max((time for time in times if isinstance(time, float) and time < MAX_UPTIME_S), default=0.0),
                talks=records("talks", "created_at, talk_id", _row_of(TalkRecord)),
                unended_turns=unended,
                damaged=tuple(damaged.values()),
                damaged_keys=frozenset(damaged),
            )
        except sqlite3.Error as fault:
            raise _to_store_error(fault, self._path) from fault

    def _load_live_inputs(
        self, known: set[str], damaged: dict[tuple[str, object], str]
    ) -> dict[str, dict[str, StoredInput]]:
        """Return what is stored of each live input; a request whose pieces do not follow each other is damaged."""
        found: dict[str, dict[str, StoredInput]] = {}
        rows = self._reader.execute(
            f"SELECT {COLUMNS['input_pieces']} FROM input_pieces ORDER BY request_id, name, offset"
        )
        for request_id, name, offset, size, kind, last in rows:
            if request_id not in known:
                continue
            its = found.setdefault(request_id, {})
            before = its.get(name) or StoredInput(0, ended=False)
            if before.ended or offset != before.size or kind != "blob" or last not in (0, 1):
                why = f"the pieces of its input {name!r} do not follow each other at byte {before.size}"
                damaged.setdefault(("requests", request_id), f"requests: {request_id!r}: {why}")
            else:
                its[name] = StoredInput(before.size + size, bool(last))
        return found

    def read_input(self, request_id: str, name: str) -> bytes:
        """See `Store.read_input`."""
        try:
            row = self._reader.execute(
                "SELECT data FROM inputs WHERE request_id = ? AND name = ?", (request_id, name)
            ).fetchone()
        except sqlite3.Error as fault:
            raise _to_store_error(fault, self._path) from fault
        if row is None:
            raise KeyError(name)
        data = row["data"]
        if not isinstance(data, bytes):  # a number would be that many zeros
            raise StoreError(f"input {name!r} of request {request_id} is damaged: it is no BLOB")
        return data

    def read_turns(self, talk_id: str) -> tuple[TurnRecord, ...]:
        """See `Store.read_turns`."""
        damaged: dict[tuple[str, object], str] = {}
        query = f"SELECT {COLUMNS['turns']} FROM turns WHERE talk_id = ? ORDER BY number"
        try:
            turns = tuple(_parsed(self._reader.execute(query, (talk_id,)), "turns", _row_of(TurnRecord), damaged))
        except sqlite3.Error as fault:
            raise _to_store_error(fault, self._path) from fault
        for what in damaged.values():
            log.error("a damaged turn of a conversation is left out: %s", what)
        return turns

    def read_live_input(self, request_id: str, name: str, offset: int, most: int) -> bytes:
        """See `Store.read_live_input`."""
        its = (request_id, name)
        data, start = bytearray(), offset
        try:
            rows = self._reader.execute(
                "SELECT offset, data FROM input_pieces WHERE request_id = ? AND name = ? AND offset < ? AND offset >= "
                "(SELECT max(offset) FROM input_pieces WHERE request_id = ? AND name = ? AND offset <= ?) "
                "ORDER BY offset",
                (*its, offset + most, *its, offset),
            )
            for at, piece in rows:
                if not isinstance(piece, bytes) or (at != start + len(data) if data else at > offset):
                    raise StoreError(f"input {name!r} of request {request_id} is damaged at byte {at}")
                if not data:
                    start = at
                data += piece
        except sqlite3.Error as fault:
            raise _to_store_error(fault, self._path) from fault
        return bytes(data[offset - start : offset - start + most])


def _connect(path: Path) -> sqlite3.Connection:
    # Not bound to a thread; callers ensure that only one thread at a time uses it.
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    return connection


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if application != APPLICATION_ID and (application or version or tables):
        raise StoreError(f"{path} is the database of another program; choose another folder with --state-dir")
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{path} was written by a newer relayd (schema {version}; this one knows {SCHEMA_VERSION}): "
            "upgrade relayd, or choose another folder with --state-dir"
        )
    for number, script in enumerate(_MIGRATIONS[version:], start=version + 1):
        # One transaction per step, so that a crash leaves a complete version.
        connection.executescript(
            f"BEGIN IMMEDIATE; {script} PRAGMA application_id = {APPLICATION_ID}; "
            f"PRAGMA user_version = {number}; COMMIT;"
        )


def _check(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse a file that would fail at the first write; rebuild an index that does not match its table."""

    def fault(pragma: str) -> str:
        found = [str(message) for (message,) in connection.execute(f"PRAGMA {pragma}(1000)")]
        # A value of the wrong type costs only its row; `load` handles that.
        return next((message for message in found if message != "ok" and " value in " not in message), "")

    if not (found := fault("integrity_check")):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute("REINDEX")
        still = fault("quick_check")
        connection.execute("ROLLBACK" if still else "COMMIT")
    except sqlite3.Error as error:
        still = str(error)
    if still:
        raise _damaged(path, still)
    log.warning("an index of %s was damaged, and was rebuilt: %s", path, found)


def _damaged(path: Path, why: object) -> StoreError:
    message = " ".join(str(why).split())
    return StoreError(f"{path} is damaged, or not a SQLite database ({message}): move it away, or restore a backup")


def _to_store_error(fault: Exception, path: Path) -> StoreError:
    """Convert an error of SQLite, with what to do about it."""
    code = getattr(fault, "sqlite_errorcode", 0) & 0xFF
    full = code == sqlite3.SQLITE_FULL
    if code == sqlite3.SQLITE_IOERR:
        with contextlib.suppress(OSError):
            full = shutil.disk_usage(path.parent).free < FULL_BELOW_BYTES
    if full:
        return StorageFull(f"no space left for {path}: free some space on its disk")
    wrong_schema = code == sqlite3.SQLITE_ERROR  # our statements are right for our tables
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or wrong_schema:
        return _damaged(path, fault)
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return StoreError(f"{path} cannot be written ({fault}): it and its folder must belong to the daemon's user")
    kind = StoreError if isinstance(fault, sqlite3.OperationalError) else BadChange
    return kind(f"{path}: {fault}")


# -- changes to rows ----------------------------------------------------------------------------------------------


def _statements(change: Change) -> list[Statement]:
    match change:
        case PutSpace(space):
            return [_put_space(space)]
        case DeleteSpace(name):
            return [("DELETE FROM spaces WHERE name = ?", (name,))]
        case PutToken(token):
            return [_put_token(token)]
        case DeleteToken(token_id):
            return [("DELETE FROM tokens WHERE token_id = ?", (token_id,))]
        case DeleteSession(session_id):
            return [("DELETE FROM sessions WHERE session_id = ?", (session_id,))]
        case DeleteInvite(invite_id):
            return [("DELETE FROM invites WHERE invite_id = ?", (invite_id,))]
        case PutRequest(request, inputs):
            return [
                _replace("requests", {**_columns(request), "submit": msgpack.packb(request.submit.to_map())}),
                *_drop_inputs(request.request_id),
                *(
                    ("INSERT INTO inputs (request_id, name, data) VALUES (?, ?, ?)", (request.request_id, name, data))
                    for name, data in inputs.items()
                ),
            ]
        case AppendInput():
            return [_append_input(change)]
        case ClearInput(request_id, name):
            return [("DELETE FROM input_pieces WHERE request_id = ? AND name = ?", (request_id, name))]
        case UpdateRequest(request_id=request_id):
            fields = change.fields()
            columns = ", ".join(f"{name} = ?" for name in fields)
            update = (f"UPDATE requests SET {columns} WHERE request_id = ?", (*fields.values(), request_id))
            return [update, *_drop_inputs(request_id)] if change.ends else [update]
        case DeleteRequest(request_id):
            return [("DELETE FROM requests WHERE request_id = ?", (request_id,)), *_drop_inputs(request_id)]
        case PutDrain(worker_id, cordon):
            return [("INSERT OR REPLACE INTO drains (worker_id, cordon) VALUES (?, ?)", (worker_id, cordon))]
        case DeleteDrain(worker_id):
            return [("DELETE FROM drains WHERE worker_id = ?", (worker_id,))]
        case PutWorker(worker_id, space):
            return [("INSERT OR IGNORE INTO workers (worker_id, space) VALUES (?, ?)", (worker_id, space))]
        case DeleteWorker(worker_id):
            return [("DELETE FROM workers WHERE worker_id = ?", (worker_id,))]
        case PutTalk(record) | PutUser(record) | PutSession(record) | PutInvite(record):
            return [_replace(_TABLES[type(record)], _columns(record))]
        case DeleteTalk(talk_id):
            return [(f"DELETE FROM {table} WHERE talk_id = ?", (talk_id,)) for table in ("talks", "turns")]
        case PutTurn(turn):
            return [_put_turn(turn)]
        case PutHeard(talk_id, number, heard_chars):
            where = "WHERE talk_id = ? AND number = ?"
            return [(f"UPDATE turns SET heard_chars = ? {where}", (heard_chars, talk_id, number))]
        case DeleteTurns(talk_id, first, last):
            return [("DELETE FROM turns WHERE talk_id = ? AND number BETWEEN ? AND ?", (talk_id, first, last))]
        case PutUptime(uptime_s):
            return [("REPLACE INTO clock (rowid, uptime_s) VALUES (1, ?)", (uptime_s,))]


def _append_input(piece: AppendInput) -> Statement:
    states = ", ".join(f"'{state}'" for state in LIVE_STATES)
    is_live = f"EXISTS (SELECT 1 FROM requests WHERE request_id = ? AND state IN ({states}))"
    insert = f"INSERT INTO input_pieces (request_id, name, offset, data, last) SELECT ?, ?, ?, ?, ? WHERE {is_live}"
    return (insert, (piece.request_id, piece.name, piece.offset, piece.data, piece.last, piece.request_id))


def _put_turn(turn: TurnRecord) -> Statement:
    columns = _columns(turn)
    places = ", ".join("?" * len(columns))
    select = f"SELECT {places} WHERE EXISTS (SELECT 1 FROM talks WHERE talk_id = ?)"
    return (f"REPLACE INTO turns ({', '.join(columns)}) {select}", (*columns.values(), turn.talk_id))


def _drop_inputs(request_id: str) -> list[Statement]:
    return [(f"DELETE FROM {table} WHERE request_id = ?", (request_id,)) for table in ("inputs", "input_pieces")]


def _columns(record: Any) -> dict[str, Any]:
    return attrs.asdict(record, recurse=False)


def _replace(table: str, columns: dict[str, Any]) -> Statement:
    places = ", ".join("?" * len(columns))
    return (f"REPLACE INTO {table} ({', '.join(columns)}) VALUES ({places})", tuple(columns.values()))


def _put_space(record: SpaceRecord) -> Statement:
    return _replace(
        "spaces",
        {
            **_columns(record),
            "config": json.dumps(record.config.to_map()),
            "params": msgpack.packb(record.params),
            "inputs": msgpack.packb({name: rule.to_map() for name, rule in record.inputs.items()}),
            "format": msgpack.packb(record.format.to_map()) if record.format else None,
        },
    )


def _put_token(record: TokenRecord) -> Statement:
    columns = {**_columns(record), "spaces": json.dumps(record.spaces), "limits": json.dumps(_columns(record.limits))}
    return _replace("tokens", columns)


# -- rows to records ----------------------------------------------------------------------------------------------


def _parsed(
    rows: Iterable[sqlite3.Row],
    table: str,
    parse: Callable[[sqlite3.Row], RecordT],
    damaged: dict[tuple[str, object], str],
) -> Iterable[RecordT]:
    for row in rows:
        try:
            for value in row:
                if isinstance(value, str):
                    value.encode()  # not where its bytes are no UTF-8
            yield checked(parse(row))
        except _PARSE_ERRORS as fault:
            damaged[table, row[0]] = f"{table}: {row[0]!r}: {type(fault).__name__}: {fault}"


def _space(row: sqlite3.Row) -> SpaceRecord:
    # Ignores settings of a newer relayd instead of losing the space.
    known = {key: value for key, value in json.loads(row["config"]).items() if key in SpaceConfig.field_names()}
    return SpaceRecord(
        name=row["name"],
        config=SpaceConfig.from_map(known),
        paused=bool(row["paused"]),
        made_by=row["made_by"],
        engine=row["engine"],
        params=msgpack.unpackb(row["params"]),
        inputs={name: parse_struct(InputRule, rule) for name, rule in msgpack.unpackb(row["inputs"]).items()},
        format=parse_struct(AudioFormat, msgpack.unpackb(row["format"])) if row["format"] else None,
        created_at=row["created_at"],
    )


def _token(row: sqlite3.Row) -> TokenRecord:
    limits = json.loads(row["limits"])
    known = {field.name for field in attrs.fields(TokenLimits)}
    return TokenRecord(
        token_id=row["token_id"],
        principal=row["principal"],
        role=row["role"],
        spaces=tuple(json.loads(row["spaces"])),
        sha256=row["sha256"],
        limits=TokenLimits(**{key: value for key, value in limits.items() if key in known}),
        readonly=bool(row["readonly"]),
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        revoked_at=row["revoked_at"],
    )


def _row_of(record: Callable[..., RecordT]) -> Callable[[sqlite3.Row], RecordT]:
    """Parse a row whose columns are the fields of a record."""
    return lambda row: record(**dict(zip(row.keys(), row, strict=True)))


def _request(row: sqlite3.Row) -> RequestRecord:
    columns = dict(zip(row.keys(), row, strict=True))
    columns["submit"] = Submit.from_map(msgpack.unpackb(row["submit"]))
    columns["has_output"] = bool(row["has_output"])
    return RequestRecord(**columns)
