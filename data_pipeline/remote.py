"""Corpora behind http(s), s3 and gs, through fsspec: small files mirrored, shards fetched into a bounded cache.

The dataset card and the indexes are copied once into a folder of the cache that is named by the address and the
card's content, and stay there. Shards are fetched whole, or sample by sample (`fetch: ranges`). A corpus without a
card is listed instead, where the server can list.

Every request asks for at most CHUNK bytes and has a time limit, whatever the backend does about time; one that
fails is tried again from where it stopped. fsspec is imported when the first address is met.
"""

import asyncio
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

from configs.errors import UserError
from configs.files import write_whole
from data_pipeline.config import RemoteConfig
from data_pipeline.retry import patiently
from data_pipeline.shard_cache import ShardCache

T = TypeVar("T")

SCHEMES = ("http", "https", "s3", "gs")
EXTRAS = {"http": "http", "https": "http", "s3": "s3", "gs": "gs"}
CHUNK = 8 * 2**20
AT_ONCE = 16  # small files fetched beside one another


def is_address(path: str) -> bool:
    """Whether `path` is an address of one of SCHEMES and not a folder."""
    return path.partition("://")[0] in SCHEMES and "://" in path


class Store:
    """The files under one address. Raises UserError for what is not there, may not be read, or keeps failing."""

    def __init__(self, address: str, config: RemoteConfig) -> None:
        self.address, self.config = address.rstrip("/"), config
        self.scheme = address.partition("://")[0]
        self._system: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_system": None}  # its thread and connections are this process's

    def url(self, name: str) -> str:
        """The address of a file."""
        return f"{self.address}/{name}"

    def names(self) -> list[str]:
        """The files that the server lists, [] where it lists none."""
        try:
            found = self._call(self.address, lambda: self._fs()._ls(self.address, detail=False))
        except FileNotFoundError:
            return []
        return sorted({str(path).rstrip("/").rpartition("/")[2] for path in found})

    def small(self, name: str) -> bytes | None:
        """A whole small file; None if there is none of that name."""
        try:
            return bytes(self._call(self.url(name), lambda: self._fs()._cat_file(self.url(name))))
        except FileNotFoundError:
            return None

    def copy(self, name: str, begin: int, size: int, file: FileIO) -> None:
        """Bytes `begin` to `begin + size` of a shard into a file; less where the shard ends before."""
        at, end = begin, begin + size
        while at < end:
            data = self._range(name, at, min(end, at + CHUNK))
            file.write(data)
            at += len(data)

    def _range(self, name: str, begin: int, end: int) -> bytes:
        url = self.url(name)
        try:
            data: bytes = self._call(url, lambda: self._fs()._cat_file(url, start=begin, end=end))
        except FileNotFoundError as error:
            raise UserError(
                f"The shard {url} is gone since the corpus was opened.",
                "Put it back, or build the corpus again.",
                exit_code=1,
            ) from error
        if len(data) > end - begin:
            raise UserError(
                f"Asked for {end - begin} bytes of {url}, the server sent {len(data)}: it does not know ranges.",
                "Serve the shards with one that does (nginx, Apache, any object store), or copy them here.",
                exit_code=1,
            )
        if len(data) < end - begin:
            raise UserError(
                f"The shard {url} is cut: bytes {begin} to {end} were asked for, {len(data)} came.",
                "Upload it again; `videomamba data verify` on the original names every fault.",
                exit_code=1,
            )
        return data

    def _call(self, url: str, request: Callable[[], Any]) -> Any:
        """The result of a coroutine of fsspec's, within the time limit, tried again where the fault is transient."""
        from fsspec.asyn import sync

        async def limited() -> Any:
            return await asyncio.wait_for(request(), self.config.timeout)

        try:
            return patiently(
                url,
                lambda: sync(self._fs().loop, limited),
                _is_transient,
                self.config.attempts,
                self.config.pause,
            )
        except Exception as error:
            if not _is_refusal(error):
                raise
            cure = "Check the address, and the credentials for its store."
            raise UserError(f"{url} may not be read ({error}).", cure) from error

    def _fs(self) -> Any:
        if self._system is None:
            try:
                import fsspec

                self._system = fsspec.filesystem(self.scheme, use_listings_cache=False, skip_instance_cache=True)
            except ImportError as error:
                raise UserError(
                    f"{self.address} needs a package that is not installed ({error}).",
                    f"pip install 'videomamba[{EXTRAS[self.scheme]}]'",
                ) from error
        return self._system


def _is_transient(error: Exception) -> bool:
    """Whether a fault of a request may be gone a moment later: not what is missing, refused, or our own mistake."""
    if isinstance(error, FileNotFoundError) or _is_refusal(error):
        return False
    return isinstance(error, OSError | EOFError) or _is_of_a_backend(error)  # a time-out is an OSError


def _is_of_a_backend(error: Exception) -> bool:
    """Whether a library beneath fsspec raised it; known by name, because these are imported only where installed."""
    return any(kind.__module__.partition(".")[0] in ("aiohttp", "botocore") for kind in type(error).__mro__)


def _is_refusal(error: Exception) -> bool:
    """Whether the request was refused for good: forbidden, malformed, or without credentials."""
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return True
    status = getattr(error, "status", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in (404, 408, 425, 429)


class RemoteShards:
    """Reads shards of a store through the cache; what `Corpus` asks of a reader."""

    def __init__(self, store: Store, cache: ShardCache, key: str, sizes: dict[str, int]) -> None:
        self.store, self.cache, self.key, self.sizes = store, cache, key, sizes

    def read(self, shard: str, begin: int, size: int) -> bytes:
        """`size` bytes from `begin` on."""
        whole = self.store.config.fetch == "shards"
        first, held = (0, self.sizes[shard]) if whole else (begin, size)
        name = hashlib.sha256(f"{self.key}/{shard}/{first}+{held}".encode()).hexdigest()[:32]
        with self.cache.open(name, held, partial(self.store.copy, shard, first, held)) as file:
            return os.pread(file.fileno(), size, begin - first)


def cache_folder(config: RemoteConfig) -> Path:
    """Where remote corpora are cached: as configured, else under the user's cache folder."""
    if config.cache is not None:
        return Path(config.cache)
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "videomamba" / "shards"


def mirror(store: Store, card: str) -> tuple[Path, list[str]]:
    """The folder that mirrors the small files of a store (`card` and indexes), fetched if need be, and its shards.

    Raises UserError where there is no shard, or one without an index.
    """
    described = store.small(card)
    listed = None if described is not None else [name for name in store.names() if name.endswith(".tar")]
    state = described if described is not None else "\n".join(listed or []).encode()
    slug = re.sub(r"[^A-Za-z0-9.-]+", "_", store.address.partition("://")[2])[-60:].strip("_.")
    key = hashlib.sha256(store.address.encode() + b"\n" + state).hexdigest()[:12]
    folder = cache_folder(store.config) / f"{slug}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of the ranks fetches, the others wait
        shards = listed if listed is not None else _shards_of(store, state)
        if not shards:
            raise UserError(
                f"{store.address} has no {card} and lists no shards (*.tar).",
                "Give the address of a folder that `videomamba data build` wrote.",
            )
        wanted = [name for name in (shard[:-4] + ".idx" for shard in shards) if not (folder / name).exists()]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for name, data in zip(wanted, pool.map(store.small, wanted), strict=True):
                if data is None:
                    raise UserError(
                        f"The shard {store.url(name[:-4] + '.tar')} has no index {name} beside it.",
                        "Upload the indexes too.",
                        exit_code=1,
                    )
                write_whole(folder / name, data)
        if described is not None:
            write_whole(folder / card, described)
    return folder, shards


def _shards_of(store: Store, card: bytes) -> list[str]:
    try:
        shards = json.loads(card)["shards"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"The card of {store.address} lists no shards ({error}).", "Upload the corpus again.", exit_code=1
        ) from error
    return sorted(str(name) for name in shards)
