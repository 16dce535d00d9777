# SPDX-License-Identifier: Apache-2.0
"""index.sqlite: what an index knows of files and windows. The vectors lie beside it (segments.py).

    settings   name -> JSON: `description` (see [`Description`]) and `commit`, which every change of the index raises
    roots      folders that were given to `camoe index`
    contents   what files hold, by hash: encoded once, however many files hold it and wherever they move
    files      root, relative path, size and time; the content, or the cause: why it could not be read
    windows    parts of a content; `row` is the place of the vector. Neither row nor cause: not encoded yet
    segments   files of vectors: how many rows are valid, and which of them are dead
    bias       the query bank's correction: float32 values of the rows from `row` on
    bank       texts and vectors of the query bank, and the row that each of them likes best (NULL: look it up)
    sent       what a Milvus collection was told (milvus_store.py)

and what came later, which an older index of this format gets when it is opened for writing:

    pictures   width and height of a content's picture
    metadata   of files: name and value, from metadata.jsonl beside them; a list has a row per element
    texts      of files: names, captions, subtitles with their times; `words` is their full-text index (FTS5)
    sidecars   what a file's metadata and texts were read from (sidecars.py)

WAL mode: a reader sees the state of one commit while a writer adds the next. A kill at any moment rolls back what was
not committed.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from .errors import SearchError


try:
    import fcntl  # POSIX only
except ImportError:
    fcntl = None

FORMAT = 2
FILE = "index.sqlite"
BUSY_SECONDS = 60.0  # processes of one run take turns to write; each needs milliseconds
# One statement may name this many rows (SQLite's limit is 32,766 variables from 3.32 on).
MAX_VARIABLES = 10_000
INSERTED_ROWS = 100  # in one statement: more are not faster
LOG_PAGES = 1 << 14  # of the write-ahead log, 64 MB, that a writer copies into the database, with the disk waiting
# The whole path of a file, in statements that join `files` and `roots`. The root of all files ends with a separator.
PATH = f"rtrim(roots.path, '{os.sep}') || '{os.sep}' || files.path"

SCHEMA = """
CREATE TABLE settings(name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE roots(id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE);
CREATE TABLE contents(
    id INTEGER PRIMARY KEY AUTOINCREMENT, hash TEXT NOT NULL UNIQUE, duration REAL, cause TEXT);
CREATE TABLE files(
    id INTEGER PRIMARY KEY AUTOINCREMENT, root INTEGER NOT NULL REFERENCES roots, path TEXT NOT NULL,
    size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, content INTEGER REFERENCES contents, cause TEXT,
    UNIQUE(root, path));
CREATE INDEX files_of_content ON files(content);
CREATE TABLE windows(
    id INTEGER PRIMARY KEY AUTOINCREMENT, content INTEGER NOT NULL REFERENCES contents, number INTEGER NOT NULL,
    start REAL NOT NULL, end REAL NOT NULL, whole INTEGER NOT NULL, row INTEGER UNIQUE, cause TEXT);
CREATE INDEX windows_of_content ON windows(content);
CREATE INDEX pending_windows ON windows(id) WHERE row IS NULL AND cause IS NULL;
CREATE TABLE segments(id INTEGER PRIMARY KEY AUTOINCREMENT, rows INTEGER NOT NULL, dead BLOB NOT NULL);
CREATE TABLE bias(row INTEGER PRIMARY KEY, "values" BLOB NOT NULL);
CREATE TABLE bank(
    query INTEGER PRIMARY KEY, text TEXT NOT NULL, vector BLOB NOT NULL, best INTEGER, score REAL);
CREATE TABLE sent(file INTEGER, window INTEGER, path TEXT, bank TEXT, hub INTEGER, key TEXT, UNIQUE(file, window));
INSERT INTO settings VALUES('commit', '0');
"""

# Triggers remove what belongs to a file or content with it, whichever version of the program does that.
ADDITIONS = """
CREATE TABLE IF NOT EXISTS pictures(content INTEGER PRIMARY KEY, width INTEGER, height INTEGER);
CREATE TABLE IF NOT EXISTS metadata(file INTEGER NOT NULL, name TEXT NOT NULL, value NOT NULL);
CREATE INDEX IF NOT EXISTS metadata_of_file ON metadata(file, name);
CREATE INDEX IF NOT EXISTS metadata_by_name ON metadata(name);
CREATE TABLE IF NOT EXISTS texts(
    id INTEGER PRIMARY KEY, file INTEGER NOT NULL, kind TEXT NOT NULL, start REAL, end REAL, text TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS texts_of_file ON texts(file);
CREATE TABLE IF NOT EXISTS sidecars(file INTEGER PRIMARY KEY, stamp TEXT NOT NULL);
CREATE TRIGGER IF NOT EXISTS content_removed AFTER DELETE ON contents BEGIN
    DELETE FROM pictures WHERE content = OLD.id;
END;
CREATE TRIGGER IF NOT EXISTS file_removed AFTER DELETE ON files BEGIN
    DELETE FROM metadata WHERE file = OLD.id;
    DELETE FROM texts WHERE file = OLD.id;
    DELETE FROM sidecars WHERE file = OLD.id;
END;
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5(
    text, content='texts', content_rowid='id', tokenize="porter unicode61 remove_diacritics 2");
CREATE TRIGGER IF NOT EXISTS text_added AFTER INSERT ON texts BEGIN
    INSERT INTO words(rowid, text) VALUES(NEW.id, NEW.text);
END;
CREATE TRIGGER IF NOT EXISTS text_removed AFTER DELETE ON texts BEGIN
    INSERT INTO words(words, rowid, text) VALUES('delete', OLD.id, OLD.text);
END;
"""


@dataclasses.dataclass(frozen=True)
class Description:
    """What an index is: how its vectors are made, and where they are searched."""

    model: str  # folder or Hub id
    weights: str  # hash of the weights: only vectors of the same weights are comparable
    experts: list[str]
    dim: int  # D, entries of an expert's part of a vector
    num_frames: int  # decoded of each moment
    sampling: str  # how frames are chosen: "uniform" or "keyframe"
    on_damage: str = "error"  # or "around": frames of a damaged file are taken around the damage
    window: float | None = None  # seconds; 0: whole files; None: depends on the duration
    stride: float | None = None  # seconds; None: half a window
    windows: str = "time"  # what cuts a video: "time", or "shots" (shots.py)
    dtype: str = "float32"  # of the stored vectors
    exclude: list[str] = dataclasses.field(default_factory=list)  # patterns of files that are left out
    tau: float | None = None  # temperature of the query bank, None without one
    bank: str = ""  # hash of the bank's texts and of tau
    text_encoder: str = (
        ""  # why there is no ONNX text encoder in the folder; "" if there is one, or none was asked for
    )
    cache: dict | None = None  # of an approximate index, see approximate.py
    milvus: dict | None = None  # where Milvus holds a copy, see milvus_store.py
    format: int = FORMAT

    @property
    def width(self) -> int:
        """K, entries of a folded vector."""
        return len(self.experts) * self.dim


def exists(folder: str | os.PathLike) -> bool:
    """Whether the folder holds an index."""
    return (Path(folder) / FILE).is_file()


def connect(folder: str | os.PathLike, write: bool = False) -> sqlite3.Connection:
    """Open the database of an index; transactions are explicit.

    Raises:
        SearchError: there is no index, or one that this version cannot read.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        if (Path(folder) / "index.json").is_file():
            raise SearchError(
                f"{folder} holds an index of an earlier version: make it again with "
                f"`camoe index VIDEOS --model MODEL --index {folder} --rebuild`"
            )
        raise SearchError(
            f"{folder} holds no index: make one with `camoe index VIDEOS --model MODEL --index {folder}`"
        )
    connection = _open(path, write)
    try:
        read_description(connection)
        if write and not has_table(connection, "words"):
            with transaction(connection):
                add_missing(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def has_table(connection: sqlite3.Connection, name: str) -> bool:
    return connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (name,)).fetchone() is not None


def add_missing(connection: sqlite3.Connection):
    """The tables of ADDITIONS; inside a transaction, which `executescript` would commit."""
    statement = ""
    for line in ADDITIONS.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            connection.execute(statement)
            statement = ""


def _open(path: Path, write: bool) -> sqlite3.Connection:
    """A connection that works: in a folder where nothing may be written, readers need `immutable`."""
    mode = "rw" if write else "ro"
    last = None
    for options in (f"mode={mode}",) if write else (f"mode={mode}", "mode=ro&immutable=1"):
        wal = path.with_name(path.name + "-wal")
        if "immutable" in options and wal.exists() and wal.stat().st_size:
            continue  # without the log the file may be old, or half of a change
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?{options}", uri=True, timeout=BUSY_SECONDS, isolation_level=None,
            check_same_thread=False,
        )  # fmt: skip
        try:
            if write:
                # NORMAL: the log is synced at checkpoints. A kill loses nothing that was committed; a power failure
                # may lose the last commits, and leaves the state of an earlier one.
                connection.executescript(
                    f"PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA wal_autocheckpoint = {LOG_PAGES};"
                )
            connection.execute("SELECT count(*) FROM settings").fetchone()
        except sqlite3.Error as error:
            connection.close()
            last = error
            continue
        connection.create_function("lower", 1, str.lower, deterministic=True)  # SQLite's own knows ASCII alone
        return connection
    raise SearchError(f"{path} cannot be opened ({last}): is the folder complete, and may it be read and written?")


def create(folder: Path, description: Description):
    """Make an empty index. A reader sees it when it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{FILE}.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    try:
        with contextlib.closing(sqlite3.connect(temporary)) as connection:
            connection.executescript(SCHEMA + ADDITIONS)
            write_description(connection, description)
            connection.commit()
    except sqlite3.Error as error:
        temporary.unlink(missing_ok=True)
        raise SearchError(f"cannot write to {folder}: {error}") from error
    for end in ("-wal", "-shm"):  # of a database that somebody removed: SQLite would put its changes into this one
        (folder / f"{FILE}{end}").unlink(missing_ok=True)
    os.replace(temporary, folder / FILE)


def read_description(connection: sqlite3.Connection) -> Description:
    """
    Raises:
        SearchError: this version cannot read the index.
    """
    try:
        ((text,),) = connection.execute("SELECT value FROM settings WHERE name = 'description'")
        values = json.loads(text)
    except (sqlite3.Error, ValueError) as error:
        raise SearchError(f"{FILE} is damaged ({error}): index the videos again with --rebuild") from error
    if values.get("format") != FORMAT:
        raise SearchError(f"the index has format {values.get('format')}, this version reads {FORMAT}: use --rebuild")
    return Description(**values)


def write_description(connection: sqlite3.Connection, description: Description):
    """Inside a transaction."""
    values = dataclasses.asdict(description)
    if description.windows == "time":
        del values["windows"]  # so that versions before it can go on reading the index
    text = json.dumps(values, ensure_ascii=False)
    connection.execute("INSERT OR REPLACE INTO settings VALUES('description', ?)", (text,))


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """A change of the index: all of it, or nothing.

    Raises:
        SearchError: the disk is full, or the folder cannot be written.
    """
    try:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("UPDATE settings SET value = value + 1 WHERE name = 'commit'")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
    except sqlite3.OperationalError as error:
        raise SearchError(f"the index was left as it was: {error}") from error


@contextlib.contextmanager
def snapshot(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Everything read inside is the state of one commit."""
    connection.execute("BEGIN")
    try:
        yield connection
    finally:
        connection.execute("ROLLBACK")


def select_in(connection: sqlite3.Connection, statement: str, values: list, *more) -> list[tuple]:
    """Rows of a statement with `IN ({})` for any number of values; `more` are the parameters after them."""
    rows = []
    for first in range(0, len(values), MAX_VARIABLES):
        part = values[first : first + MAX_VARIABLES]
        rows += connection.execute(statement.format(",".join("?" * len(part))), (*part, *more)).fetchall()
    return rows


def insert_many(connection: sqlite3.Connection, statement: str, rows: list[tuple]):
    """Run "INSERT INTO table(columns) VALUES {}" for rows of equal length, many to a statement.

    Two to three times as fast as `executemany`, where SQLite notes the last number of an AUTOINCREMENT for every row.
    """
    for first in range(0, len(rows), INSERTED_ROWS):
        part = rows[first : first + INSERTED_ROWS]
        one = f"({','.join('?' * len(part[0]))})"
        connection.execute(statement.format(",".join([one] * len(part))), list(itertools.chain.from_iterable(part)))


@contextlib.contextmanager
def write_lock(folder: Path) -> Iterator[None]:
    """Only one process at a time changes an index. The system releases the lock of a process that dies.

    Raises:
        SearchError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SearchError(f"another process is writing to {folder}: wait until it ends") from None
        yield
