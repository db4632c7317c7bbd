"""Records of ArrayRecord shards: many at a time, in the order asked for, in constant memory.

Each record is hashed by the format, and read through the hash: a damaged byte is found when its record is read, a
damaged index or a file cut short when the shard is opened. `Records` says what happens then. `columns` decodes many
`tf.train.Example`s at once.
"""

import dataclasses
import functools
import math
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flaxmodels.registry import UserError

OnCorrupt = Literal["raise", "skip"]

# For records from all over a file: no reading ahead, no threads of the reader's own; and a small buffer, as each record
# would cost the reading of a whole one (1 MiB by default: a third of the records a second of MNIST).
_OPTIONS, _BUFFER = "readahead_buffer_size:0,max_parallelism:0", 4096
# Layouts of examples of one length that `columns` looks for, before it leaves the rest to others.
_LAYOUTS = 16


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of shards, one shard after the other: numbers 0 up to `size`. Plain data; threads may share it.

    Attributes:
      files: paths of the shards.
      lengths: records in each of them.
      on_corrupt: what becomes of a record that is damaged, or whose shard is missing, cut off, or has another number of
        records: "raise" a UserError, or "skip": None takes its place.
    """

    files: tuple[str, ...]
    lengths: tuple[int, ...]
    on_corrupt: OnCorrupt = "raise"

    @property
    def size(self) -> int:
        """Number of records of all shards."""
        return sum(self.lengths)

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.lengths, dtype=np.int64)

    def read(self, index: np.ndarray) -> list[bytes | None]:
        """Read records, in the order of `index`: one batch of reads a shard.

        Args:
          index: (B,) integers of 0 .. size - 1; the same one may stand there many times.

        Raises:
          UserError: a record can't be read, and the policy is "raise"; or a file is there and the system refuses it.
        """
        shards = np.searchsorted(self._ends, index, side="right")
        records: list[bytes | None] = [None] * len(index)
        by_shard = np.argsort(shards, kind="stable")
        starts = np.flatnonzero(np.diff(shards[by_shard], prepend=-1))
        for places in np.split(by_shard, starts[1:]) if len(index) else ():
            shard = int(shards[places[0]])
            positions = index[places] - (self._ends[shard] - self.lengths[shard])
            for place, record in zip(places.tolist(), self._read_shard(shard, positions.tolist())):
                records[place] = record
        return records

    def _read_shard(self, shard: int, positions: list[int]) -> list[bytes | None]:
        file, length = self.files[shard], self.lengths[shard]
        reader, count, why = None, 0, RuntimeError("the file is missing")
        try:
            reader = _reader(file)
            count = reader.num_records()
        except FileNotFoundError:
            pass
        except OSError as error:  # too many open files, no permission: leaving records out would mend nothing
            raise UserError(f"{file} can't be read: {error.strerror}.") from error
        except RuntimeError as error:
            why = error
        if reader is not None and count != length:
            why = RuntimeError(f"the file has {count} records, expected {length}")
            count = 0 if self.on_corrupt == "raise" else count
        # Beyond the end nothing is asked for: of a file without records, array_record gives empty ones.
        there = iter(_salvage(reader, [p for p in positions if p < count]))
        found = [next(there) if p < count else why for p in positions]
        for position, record in zip(positions, found):
            if isinstance(record, RuntimeError) and self.on_corrupt == "raise":
                _reader.cache_clear()  # whoever mends the file may go on in this process
                first = int(self._ends[shard]) - length
                raise corrupt((file, position), first + position, str(record)) from record
        return [None if isinstance(record, RuntimeError) else record for record in found]

    def where(self, number: int) -> tuple[str, int]:
        """The file of a record, and its number within it."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return self.files[shard], number - int(self._ends[shard]) + self.lengths[shard]


def corrupt(where: tuple[str, int], number: int, why: str) -> UserError:
    """The error about one record: (file, number within it), its number of all, and what is wrong."""
    return UserError(
        f"{where[0]}: record {where[1]} (number {number} of all) can't be read: {why.partition(';')[0]}. "
        'Remove the folder and prepare the data again, or leave out what is damaged: data.on_corrupt="skip".'
    )


def _most_open() -> int:
    """Shards to keep open, a file descriptor each: half of those that the system grants, as the rest is not ours."""
    granted = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 2**14 if granted == resource.RLIM_INFINITY else max(1, min(2**14, granted // 2))


@functools.lru_cache(maxsize=_most_open())
def _reader(file: str) -> Any:
    """An open shard, shared by all threads of the process: reads carry their positions, and no error stays behind.

    Raises:
      OSError: the system's own error.
      RuntimeError: nothing of it can be read.
    """
    from array_record.python import array_record_module

    with Path(file).open("rb"):  # array_record turns what the system says into a RuntimeError, as it does with damage
        pass
    reader = array_record_module.ArrayRecordReader(file, _OPTIONS, file_reader_buffer_size=_BUFFER)
    if not reader.ok():
        reader.read([0])  # raises: opening does not
    return reader


def _salvage(reader: Any, positions: list[int]) -> list["bytes | RuntimeError"]:
    """Each record, or what array_record says of it: a read of many fails as a whole, so halve until it does not."""
    if not positions:
        return []
    try:
        return list(reader.read(positions))
    except RuntimeError as error:
        if len(positions) == 1:
            return [error]
    half = len(positions) // 2
    return _salvage(reader, positions[:half]) + _salvage(reader, positions[half:])


@dataclasses.dataclass(frozen=True)
class Field:
    """A feature of fixed shape, as a `tf.train.Example` holds it.

    Attributes:
      key: its name there.
      kind: the list that holds it: "bytes" is one string with all values as they lie in memory, "float" is a float32
        for each value, "int" a varint for the only one.
      dtype: of the values.
      shape: of the values; () for "int".
    """

    key: str
    kind: Literal["bytes", "float", "int"]
    dtype: str
    shape: tuple[int, ...]


def columns(records: Sequence[bytes | None], fields: Sequence[Field]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Decode examples, all at once: those of one layout differ in their values alone, so numpy cuts these out.

    The layout is parsed once, from one example, by the wire format of protocol buffers
    (https://protobuf.dev/programming-guides/encoding); each other one must have the same bytes wherever no value is.

    Args:
      records: (B,) serialised `tf.train.Example`s; None is left out.
      fields: what to take from them.

    Returns:
      key -> (B, *shape) array, and (B,) bool: whether the row is decoded. Rows that are not are zeros: their example is
      written in another way than TFDS's, or not at all.
    """
    values = {field.key: np.zeros((len(records), *field.shape), field.dtype) for field in fields}
    decoded = np.zeros(len(records), bool)
    lengths = np.array([0 if record is None else len(record) for record in records], np.int64)
    for length in np.unique(lengths[lengths > 0]).tolist():
        left = np.flatnonzero(lengths == length)
        table = np.frombuffer(b"".join([records[i] or b"" for i in left.tolist()]), np.uint8).reshape(-1, length)
        for _ in range(_LAYOUTS):
            layout = _layout(table[0].tobytes(), fields)
            if layout is None:
                break
            mask, spans = layout
            fixed = np.flatnonzero(mask)
            alike = (((table[:, fixed] ^ table[0, fixed]) & mask[fixed]) == 0).all(1)
            rows, fits = left[alike], np.ones(int(alike.sum()), bool)
            for field, (start, stop) in zip(fields, spans):
                cut = _numbers(np.ascontiguousarray(table[alike, start:stop]), field)
                values[field.key][rows] = cut
                if field.kind == "int":
                    fits &= values[field.key][rows] == cut
            alike[alike] = fits
            decoded[left[alike]] = True
            left, table = left[~alike], table[~alike]
            if not len(left):
                break
    for field in fields:
        values[field.key][~decoded] = 0
    return values, decoded


def _numbers(cut: np.ndarray, field: Field) -> np.ndarray:
    """The bytes of one field (N, bytes) -> its values (N, *shape)."""
    if field.kind == "int":  # seven bits a byte, the lowest first; 64 of them at most, two's complement
        parts = (cut & np.uint8(127)).astype(np.uint64) << (7 * np.arange(cut.shape[1], dtype=np.uint64))
        return np.bitwise_or.reduce(parts, axis=1).view(np.int64)
    numbers = cut.view("<f4" if field.kind == "float" else field.dtype)
    return numbers.reshape(-1, *field.shape)


def _layout(record: bytes, fields: Sequence[Field]) -> tuple[np.ndarray, list[tuple[int, int]]] | None:
    """Where the values of an example lie; None if it is not written as TFDS writes them.

    Returns:
      (bytes,) uint8, the bits of each byte that are no value; and (start, stop) of the bytes of each field.
    """
    mask = np.full(len(record), 255, np.uint8)
    try:
        features = _entries(record)
        spans = [_span(record, features[field.key], field) for field in fields]
    except (ValueError, KeyError, IndexError):
        return None
    wanted = {field.key for field in fields}
    for key, (start, stop) in features.items():
        if key not in wanted:
            mask[start:stop] = 0  # whatever it is: nobody looks at it
    for field, (start, stop) in zip(fields, spans):
        mask[start:stop] = 128 if field.kind == "int" else 0  # the highest bit says that a varint goes on
    return mask, spans


def _entries(record: bytes) -> dict[str, tuple[int, int]]:
    """The features of an example: name -> (start, stop) of a `tf.train.Feature`. Raises ValueError, IndexError."""
    ((_, features),) = _parts(record, (0, len(record)), {1})
    found: dict[str, tuple[int, int]] = {}
    for _, entry in _parts(record, features, {1}):
        (one, key), (two, feature) = sorted(_parts(record, entry, {1, 2}))
        name = record[slice(*key)].decode()
        if (one, two) != (1, 2) or name in found:
            raise ValueError(record)
        found[name] = feature
    return found


def _span(record: bytes, feature: tuple[int, int], field: Field) -> tuple[int, int]:
    """(start, stop) of the values of a field. Raises ValueError, IndexError."""
    ((_, values),) = _parts(record, feature, {{"bytes": 1, "float": 2, "int": 3}[field.kind]})
    ((_, (start, stop)),) = _parts(record, values, {1})
    if field.kind == "int":
        right = [byte > 127 for byte in record[start:stop]] == [True] * (stop - start - 1) + [False]
    else:
        size = 4 if field.kind == "float" else np.dtype(field.dtype).itemsize
        right = stop - start == size * math.prod(field.shape)
    if not right:
        raise ValueError(record)
    return start, stop


def _parts(record: bytes, span: tuple[int, int], numbers: set[int]) -> list[tuple[int, tuple[int, int]]]:
    """The fields of a message: (number, (start, stop)), if all have a length. Raises ValueError, IndexError."""
    found = []
    start, end = span
    while start < end:
        number, kind = divmod(record[start], 8)
        size = shift = 0
        while True:
            start += 1
            size |= (record[start] & 127) << shift
            shift += 7
            if record[start] < 128 or shift > 28:
                break
        start += 1
        found.append((number, (start, start + size)))
        start += size
        if kind != 2 or number not in numbers or start > end:
            raise ValueError(record)
    return found
