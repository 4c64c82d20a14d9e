"""Checkpoints in an S3 bucket: files first and meta.json last, so that one that has no meta.json is not there.

Any S3-compatible store will do. Address and keys come from the environment, under the names that AWS tools use:
AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from litchi.config import BadInput
from litchi.model.weights import read_meta
from litchi.record import need

META = "meta.json"

PART_BYTES = 32 << 20
"""Bytes of a part of an upload; S3 takes ten thousand parts of one file."""

PART_SECONDS = 120
"""How long one request may take."""

CHUNK_BYTES = 8 << 20
"""Bytes that are written at a time while a file comes in."""

RETRY_SECONDS = 60.0
"""How long a request is tried again before the store counts as gone."""

T = TypeVar("T")


class Bucket:
    """The place s3://BUCKET/PREFIX. Raises BadInput for another address, and without the extra "s3"."""

    def __init__(self, url: str, retry_seconds: float = RETRY_SECONDS) -> None:
        name, _, prefix = url.removeprefix("s3://").partition("/")
        if not url.startswith("s3://") or not name:
            raise BadInput(f"{url} is no address of a bucket: write s3://BUCKET/PREFIX")
        self.url, self.prefix = url, prefix.strip("/")
        self.obstore: Any = need("s3", "obstore")
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
        self.store = need("s3", "obstore.store").S3Store(
            name,
            client_options={
                "allow_http": endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=5),
                "timeout": timedelta(seconds=PART_SECONDS),
            },
            retry_config={"max_retries": 1000, "retry_timeout": timedelta(seconds=retry_seconds)},
        )

    def whole(self) -> list[str]:
        """The names of the checkpoints that are there, "step_0000200" and the like."""
        names = self.attempt(lambda: [name for name, sealed in self._names().items() if sealed])
        return sorted(names, key=by_step)

    def unseal(self, name: str) -> None:
        """From now on this checkpoint is not there, whatever files it has."""
        if name in self.whole():
            self.attempt(lambda: self.obstore.delete(self.store, self._key(name, META)))

    def put(self, name: str, folder: Path, files: Sequence[str]) -> None:
        for file in files:
            key, path = self._key(name, file), folder / file
            self.attempt(lambda key=key, path=path: self.obstore.put(self.store, key, path, chunk_size=PART_BYTES))

    def seal(self, name: str, folder: Path, keep: int) -> None:
        """All files are there: put meta.json, then remove what is older than the newest `keep`."""
        self.put(name, folder, [META])
        names = self.attempt(self._names)
        oldest = sorted((name for name, sealed in names.items() if sealed), key=by_step)[-keep:][0]
        for old in names:
            if by_step(old) < by_step(oldest):
                self._remove(old)

    def begin(self, name: str, folder: Path) -> list[str]:
        """Fetch meta.json of a checkpoint into a folder; gives the names of its files."""
        self.get(name, folder, [META])
        files = sorted(read_meta(folder)["files"])
        for file in files:
            if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
                raise BadInput(f"{self.url}/{name}: it names the file {file!r}, which is outside of it: do not use it")
        return files

    def get(self, name: str, folder: Path, files: Sequence[str]) -> None:
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            self.attempt(lambda file=file: self._stream(self._key(name, file), folder / file))

    def attempt(self, ask: Callable[[], T]) -> T:
        """What `ask` gives. Raises BadInput, naming the place, if the store refuses or does not answer."""
        try:
            return ask()
        except self.obstore.exceptions.BaseError as error:
            said, _, retries = " ".join(str(error).split()).removeprefix("Generic S3 error: ").partition(", after ")
            why = f"{said[:120]}: {retries.rpartition(' - ')[2][:120]}" if retries else said[:240]
            raise BadInput(f"{self.url}: the store did not do it ({why}): see to the server and its keys") from error

    def _stream(self, key: str, path: Path) -> None:
        with path.open("wb") as out:
            for chunk in self.obstore.get(self.store, key).stream(min_chunk_size=CHUNK_BYTES):
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())

    def _remove(self, name: str) -> None:
        """meta.json goes first."""
        prefix = self._key(name, "")
        keys = [entry["path"] for page in self.obstore.list(self.store, prefix=prefix) for entry in page]
        for key in sorted(keys, key=lambda key: not key.endswith(f"/{META}")):
            self.attempt(lambda key=key: self.obstore.delete(self.store, key))

    def _names(self) -> dict[str, bool]:
        """Every checkpoint of which there is anything, and whether it has its meta.json."""
        found: dict[str, bool] = {}
        for page in self.obstore.list(self.store, prefix=self.prefix or None):
            for entry in page:
                parts = entry["path"].removeprefix(self.prefix).strip("/").split("/")
                if parts[0].startswith("step_"):
                    found[parts[0]] = found.get(parts[0], False) or parts[1:] == [META]
        return found

    def _key(self, name: str, file: str) -> str:
        return "/".join(part for part in (self.prefix, name, file) if part)


def by_step(name: str) -> tuple[int, str]:
    """Sorts "step_0000200" after what came before it, even where a number outgrows its digits."""
    return len(name), name
