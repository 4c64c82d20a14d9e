"""Whether the readers of weight files survive what no honest program wrote: each input is read or refused, in bounds.

An input is a small valid file with bits flipped, ends cut, pieces of other files in it, integers set to extremes or
its header rewritten around them; one in twenty is random bytes. It is opened and every tensor in it is read. All else
than success and BadInput is a crash, and so is memory of more than twice the file's bytes and ALLOWANCE to open it,
or of more than WORKING beside the tensor to read one.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import struct
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.row import append
from litchi.config import BadInput
from litchi.model.tensorfile import open_tensors

BOUND, ALLOWANCE = 2, 64 << 10
"""Bytes of memory to open a file: so many for each of its own, and so many for the parser's objects and an error."""

WORKING = 2 << 20
"""Bytes of memory to decode a piece of a tensor."""

EXTREMES = (0, 1, 2, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**60, 2**63 - 1, 2**63, 2**64 - 1)
DIGITS = re.compile(rb"\d+")


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of the inputs; `share` is the most memory to open a file, as a share of what is allowed."""

    read: int
    refused: int
    crashes: tuple[str, ...]
    share: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = fuzz(args.inputs, args.seed, Path(folder))
    for crash in tally.crashes[:20]:
        print(crash, file=sys.stderr)
    measure = (
        f"crashes in {args.inputs} broken files, {tally.refused} refused, {tally.read} read,"
        f" at most {tally.share:.3f} of {BOUND} bytes of memory a byte and {ALLOWANCE >> 10} KiB"
    )
    append("fuzz_readers", measure, len(tally.crashes), "crashes")
    return int(bool(tally.crashes))


def fuzz(inputs: int, seed: int, folder: Path) -> Tally:
    """Read so many broken files, which are written one after the other to `folder`; the seed names all of them."""
    read, refused, crashes, share = 0, 0, [], 0.0
    valid, path = valid_files(), folder / "input"
    tracemalloc.start()
    try:
        for data in valid:  # once before anything is watched, for what is imported and cached at the first time
            path.write_bytes(data)
            read_all(path, Watch(), Watch())
        for index in range(inputs):
            data = broken_file(valid, random.Random(f"{seed} {index}"))
            path.unlink(missing_ok=True)  # some file systems flush what is truncated and written again
            path.write_bytes(data)
            opening, reading = Watch(), Watch()
            try:
                read_all(path, opening, reading)
                read += 1
            except BadInput:
                refused += 1
            except Exception as error:
                crashes.append(f"seed {seed}, input {index}: {type(error).__name__}: {error}")
            used = opening.most / (BOUND * len(data) + ALLOWANCE)
            share = max(share, used)
            if used > 1 or reading.most > WORKING:
                crashes.append(f"seed {seed}, input {index}: {opening.most} + {reading.most} bytes for {len(data)}")
    finally:
        tracemalloc.stop()
    return Tally(read, refused, tuple(crashes), share)


def read_all(path: Path, opening: Watch, reading: Watch) -> None:
    """Open a file and read everything in it. Raises BadInput, and nothing else."""
    with opening:
        file = open_tensors(path)
    with file, reading:
        for name in file.entries:
            file.read(name)
    dict(file.metadata)  # not watched: a list of Python's takes several times the bytes that were found for it


class Watch:
    """The most bytes that Python and numpy held for what runs inside; torch's tensors do not count."""

    def __init__(self) -> None:
        self.before = self.most = 0

    def __enter__(self) -> None:
        self.before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()

    def __exit__(self, *error: object) -> None:
        self.most = tracemalloc.get_traced_memory()[1] - self.before


# ---- breaking -----------------------------------------------------------------------------------------------------


def broken_file(valid: Sequence[bytes], rng: random.Random) -> bytes:
    if rng.random() < 0.05:
        return rng.choice((b"", b"GGUF", b"GGUF\3\0\0\0")) + rng.randbytes(rng.randrange(400))
    data = rng.choice(valid)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        data = rng.choice(DAMAGES)(data, valid, rng)
    return data


Damage = Callable[[bytes, Sequence[bytes], random.Random], bytes]


def flip(data: bytes, valid: Sequence[bytes], rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 32))):
        if changed:
            changed[place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, valid: Sequence[bytes], rng: random.Random) -> bytes:
    return data[: place(data, rng)]


def splice(data: bytes, valid: Sequence[bytes], rng: random.Random) -> bytes:
    """Put a piece of another file, or of this one, over or between the bytes of this one."""
    other = rng.choice((data, rng.choice(valid)))
    begin, at = place(other, rng), place(data, rng)
    piece = other[begin : begin + rng.choice((1, 8, 40, 400))]
    return data[:at] + piece + data[at + rng.choice((0, len(piece))) :]


def set_integer(data: bytes, valid: Sequence[bytes], rng: random.Random) -> bytes:
    size, at = rng.choice((1, 4, 8)), place(data, rng)
    value = rng.choice((*EXTREMES, len(data), len(data) + 1)) % 256**size
    return data[:at] + value.to_bytes(size, "little") + data[at + size :]


def set_digits(data: bytes, valid: Sequence[bytes], rng: random.Random) -> bytes:
    """Set an integer that is written in decimals, and the length of the header with it."""
    length = int.from_bytes(data[:8], "little")
    numbers = list(DIGITS.finditer(data, 8, 8 + length)) if length <= len(data) else []
    if not numbers:
        return data
    number = rng.choice(numbers)
    value = rng.choice((*EXTREMES, -1, 10**30, int(number[0]) + 1, int(number[0]) + 4)) if len(number[0]) < 99 else 0
    header = data[8 : number.start()] + str(value).encode() + data[number.end() : 8 + length]
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def rewrite_header(data: bytes, valid: Sequence[bytes], rng: random.Random) -> bytes:
    """Damage a header of JSON and set its length to what it is then."""
    length = int.from_bytes(data[:8], "little")
    if length > len(data):
        return data
    header = rng.choice((flip, cut, splice))(data[8 : 8 + length], valid, rng)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


DAMAGES: tuple[Damage, ...] = (flip, cut, splice, set_integer, set_integer, set_digits, rewrite_header)


def place(data: bytes, rng: random.Random) -> int:
    """A place in `data`, most often near its beginning, where headers are."""
    end = rng.choice((32, 400, len(data)))
    return rng.randrange(max(1, min(end, len(data))))


# ---- valid files --------------------------------------------------------------------------------------------------


def valid_files() -> list[bytes]:
    """Of each format a file of all types of tensors and one that is mostly weights."""
    rng = random.Random(0)
    header, data = {"__metadata__": {"format": "pt", "note": 'a "word"\n'}}, b""
    for dtype, size in (("F32", 4), ("BF16", 2), ("F16", 2), ("F64", 8), ("I64", 8), ("U8", 1), ("BOOL", 1)):
        header[dtype.lower()] = {"dtype": dtype, "shape": [2, 3], "data_offsets": [len(data), len(data) + 6 * size]}
        data += bytes(6 * size)
    weights = {"w": {"dtype": "BF16", "shape": [64, 512], "data_offsets": [0, 65536]}}
    pairs = [
        ("general.architecture", 8, text("llama")),
        ("general.alignment", 4, struct.pack("<I", 32)),
        (
            "tokenizer.ggml.tokens",
            9,
            struct.pack("<IQ", 8, 9) + b"".join(text(word) for word in "a bc ü def g h 1 2 3".split()),
        ),
        ("tokenizer.ggml.scores", 9, struct.pack("<IQ9f", 6, 9, *range(9))),
        (
            "nested",
            9,
            struct.pack("<IQ", 9, 2) + struct.pack("<IQ3B", 0, 3, 1, 2, 3) + struct.pack("<IQ2?", 7, 2, 1, 0),
        ),
        *(
            (f"number.{kind}", kind, bytes(size))
            for kind, size in ((0, 1), (1, 1), (2, 2), (3, 2), (5, 4), (6, 4), (7, 1))
        ),
        *((f"number.{kind}", kind, bytes(8)) for kind in (10, 11, 12)),
    ]
    blocks = {0: 4, 1: 2, 30: 2, 2: 18, 3: 20, 6: 22, 7: 24, 8: 34, 12: 144, 13: 176, 14: 210}
    widths = {0: 1, 1: 1, 30: 1, 12: 256, 13: 256, 14: 256}
    tensors = [(f"t{kind}", (widths.get(kind, 32), 2), kind, rng.randbytes(2 * size)) for kind, size in blocks.items()]
    return [
        safetensors_bytes(header, data),
        safetensors_bytes(weights, rng.randbytes(65536)),
        gguf_bytes(pairs, tensors),
        gguf_bytes(pairs[:2], [("w", (512, 64), 2, rng.randbytes(18 * 1024))], version=2),
    ]


def safetensors_bytes(header: dict | bytes, data: bytes) -> bytes:
    packed = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(packed).to_bytes(8, "little") + packed + data


def gguf_bytes(
    pairs: Sequence[tuple[str, int, bytes]],
    tensors: Sequence[tuple[str, Sequence[int], int, bytes]],
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """Pairs of (key, type, packed value) and tensors of (name, dims, type, bytes), as GGUF has them."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs))
    for key, kind, value in pairs:
        header += text(key) + struct.pack("<I", kind) + value
    data = b""
    for name, dims, kind, raw in tensors:
        header += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, len(data))
        data += raw + bytes(-len(raw) % alignment)
    return header + bytes(-len(header) % alignment) + data


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


if __name__ == "__main__":
    sys.exit(main())
