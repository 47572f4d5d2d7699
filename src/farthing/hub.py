"""Find a model: the embedded one by name, a local directory, or a Hugging Face hub id.

Of a hub id, config.json is read and judged first; only then are the files downloaded that serving reads.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Collection, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import file_digest, sha1
from pathlib import Path

from farthing.checkpoint.reader import (
    CONFIG,
    PARAMS,
    has_config,
    quantization_in,
    read_config,
    read_quantization,
)
from farthing.checkpoint.shards import INDEX, MISTRAL_INDEX, SINGLE, read_index, unread_format
from farthing.model.config import ModelConfig
from farthing.model.gguf import SUFFIX, name_of, open_gguf
from farthing.process import Lines, Progress

log = logging.getLogger(__name__)
EMBEDDED = "mite"
_FORMER_NAME = "reference"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # "./x" and "../x" are paths
_DIGEST = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
_SMALL = ("*.json", "*.jinja", "tokenizer*", "tiktoken.model")  # of the top folder
_PARALLEL = 8  # files
_CLIENTS = ("httpx", "httpx2")  # of versions of huggingface_hub; each logs a line per request
_LOOK_EVERY = 0.5  # seconds, at the bytes that have arrived


@dataclass(frozen=True, slots=True)
class Found:
    """A model whose configuration is accepted. Of a hub id, its weights exist and fit the disk."""

    path: Path
    absent: tuple[str, ...] = ()  # files that `fetch` downloads
    _repository: _Repository | None = None

    def fetch(self, progress: Progress | None = None) -> Path:
        """The directory, with all files that serving reads. progress: in bytes; None: lines in the log.

        Raises OSError for a file that cannot be downloaded, or not as the hub describes it.
        """
        if self._repository is not None:
            self._repository.fetch(self.absent, self.path, progress or Lines(log.info))
        return self.path


def find_model(model: str | Path) -> Found:
    """Everything that can be known of a model before its weights are downloaded.

    Raises OSError, FileNotFoundError, ConfigError or CheckpointError, each with the accepted values.
    """
    local = _local(model)
    if local is None:
        return _find(str(model), weights=True)
    judge(local)
    return Found(local)


def resolve_model(model: str | Path) -> Path:
    """The directory of a model. A hub id is downloaded with huggingface_hub, after its config.json is judged.

    Raises FileNotFoundError or ValueError with the accepted values.
    """
    local = _local(model)
    return _find(str(model), weights=True).fetch() if local is None else local


def resolve_config(model: str | Path) -> Path:
    """A directory with the model's config.json, judged; of a hub id nothing else is downloaded.

    Raises FileNotFoundError, ConfigError or CheckpointError, each with the accepted values.
    """
    local = _local(model)
    if local is None:
        return _find(str(model), weights=False).path
    judge(local)
    return local


def judge(path: Path) -> None:
    """Raise ConfigError or CheckpointError for a config.json that cannot be served, before weights are
    looked for."""
    raw = read_config(path)
    ModelConfig.from_json(raw)
    if quantization := quantization_in(raw):
        read_quantization(quantization)


def _local(model: str | Path) -> Path | None:
    """The directory of a model on this machine; None for a hub id."""
    path = Path(model).expanduser()
    if has_config(path):
        return path
    if (file := _gguf_in(path)) is not None:
        return open_gguf(file)
    if str(model) == EMBEDDED:
        return _embedded()
    if path.exists():
        raise FileNotFoundError(f"model: got {str(model)!r}; {_defect(path)}")
    if str(model) == _FORMER_NAME:
        raise FileNotFoundError(
            f"model: got {_FORMER_NAME!r}, the former name of the embedded model; expected {EMBEDDED!r}"
        )
    if not _HUB_ID.fullmatch(str(model)):
        raise FileNotFoundError(
            f"model: got {str(model)!r}; expected '{EMBEDDED}', a directory, or a hub id like 'owner/name' "
            "(names of published models are known only to `farthing inspect` and `farthing plan`)"
        )
    return None


def _gguf_in(path: Path) -> Path | None:
    """A GGUF file: the path itself, or the only model in a folder."""
    if path.is_file():
        return path if path.suffix == SUFFIX else None
    files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else []
    if len({name_of(file) for file in files}) > 1:
        raise FileNotFoundError(
            f"model: got {str(path)!r}, with {len(files)} GGUF files such as {files[0].name}; expected the "
            "path of one of them"
        )
    return files[0] if files else None


def _defect(path: Path) -> str:
    """Why an existing path is not a model directory."""
    names = [file.name for file in path.iterdir()] if path.is_dir() else [path.name]
    expected = "expected a Hugging Face model directory"
    return unread_format(names, expected) or f"it has no {CONFIG}; {expected}"


def _embedded() -> Path:
    path = Path(__file__).parent / "assets" / EMBEDDED
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(
            f"the embedded model is not installed ({path} has no config.json); pass a directory or a hub id, "
            f"or train it with: farthing train {EMBEDDED}"
        )
    return path


def _find(model: str, weights: bool) -> Found:
    """A hub id whose configuration is downloaded, and with `weights` the list of what else serving reads."""
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError
    except ImportError as error:
        raise ValueError(
            f"model: got {model!r}, which is not a local directory; downloading it from the hub needs: "
            "pip install huggingface_hub"
        ) from error
    for client in _CLIENTS:
        if logging.getLogger(client).level == logging.NOTSET:
            logging.getLogger(client).setLevel(logging.WARNING)
    try:
        info = HfApi().model_info(model, files_metadata=True)
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"model: got {model!r}, which the hub does not show; expected the id of a public model, or "
            "HF_TOKEN set to a token that may read it"
        ) from error
    except Exception as error:  # the classes of connection errors differ between versions of the library
        return Found(_cached(model, _first_line(error), weights))
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if "/" not in file.rfilename}
    repository = _Repository(model, sizes)
    path = repository.config()
    return Found(path, repository.absent(path), repository) if weights else Found(path)


def _cached(model: str, reason: str, weights: bool) -> Path:
    """What the cache has of a model while the hub cannot be reached."""
    from huggingface_hub import try_to_load_from_cache

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
    sizes: Mapping[str, int]  # of the files in its top folder, bytes; 0 where the hub does not say

    def config(self) -> Path:
        """Fetch the configuration alone and judge it; returns its directory."""
        name = next((n for n in (CONFIG, PARAMS) if n in self.sizes), None)
        if name is None:
            expected = "expected a repository"
            said = unread_format(self.sizes, expected) or f"it has no {CONFIG}; {expected} with {CONFIG}"
            raise FileNotFoundError(f"model: got {self.model!r}; {said}")
        path = self._fetch(name, None).parent  # by the name of its branch, for the cache to know it
        judge(path)
        return path

    def absent(self, path: Path) -> tuple[str, ...]:
        """What serving reads and `path` lacks: one set of weights, and the small files beside them.

        The index is fetched. Raises OSError if the disk is too small for the rest.
        """
        indices = [name for name in (INDEX, MISTRAL_INDEX) if name in self.sizes]
        if indices:
            self._fetch(indices[0], path.name)
        small = [n for n in self.sizes if any(fnmatchcase(n, p) for p in _SMALL) and n not in indices[1:]]
        wanted = [*small, *_weights(self.model, self.sizes, path)]
        absent = [name for name in wanted if not (path / name).is_file()]  # `path` is named by the revision
        needed, free = sum(self.sizes.get(n, 0) for n in absent), shutil.disk_usage(path).free
        if needed > free:
            raise OSError(
                f"model: {self.model} needs {needed / 1e9:.1f} GB more, and {path} has {free / 1e9:.1f} GB "
                "free; free some space, or set HF_HOME to a directory on another disk"
            )
        return tuple(absent)

    def fetch(self, names: Collection[str], path: Path, progress: Progress) -> None:
        """Fetch files in parallel, each from where an earlier run ended, and compare their checksums."""
        blobs = path.parents[1] / "blobs"
        needed, before = sum(self.sizes.get(n, 0) for n in names), _bytes_in(blobs)
        with ThreadPoolExecutor(_PARALLEL) as pool:
            waiting = {pool.submit(self._fetch_checked, name, path.name) for name in names}
            while waiting:
                done, waiting = wait(waiting, _LOOK_EVERY, FIRST_EXCEPTION)
                if failed := next((each for each in done if each.exception()), None):
                    pool.shutdown(wait=False, cancel_futures=True)
                    failed.result()
                received = min(_bytes_in(blobs) - before, needed) if waiting else needed
                progress(f"downloading {self.model}", received, needed)

    def _fetch_checked(self, name: str, revision: str) -> None:
        file = self._fetch(name, revision).resolve()
        if (found := _checksum(file)) != file.name:
            file.unlink()
            raise OSError(
                f"model: {name} of {self.model}: the checksum is {found[:12]}…; expected {file.name[:12]}… "
                "(the file was removed: run the same command to download it again)"
            )

    def _fetch(self, name: str, revision: str | None) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import GatedRepoError

        try:
            return Path(hf_hub_download(self.model, name, revision=revision))
        except GatedRepoError as error:
            raise ValueError(
                f"model: got {self.model!r}, which is gated; expected HF_TOKEN set to a token of an account "
                "that has accepted its terms"
            ) from error
        except Exception as error:
            raise OSError(f"model: cannot download {name} of {self.model}: {_first_line(error)}") from error


def _bytes_in(blobs: Path) -> int:
    """Bytes of a repository's files in the cache, unfinished ones included."""
    total = 0
    for file in blobs.glob("*"):
        with suppress(FileNotFoundError):  # renamed once it is complete
            total += file.stat().st_size
    return total


def _checksum(blob: Path) -> str:
    """What a file of the hub's cache should be called: SHA-256 of large files, Git's SHA-1 of small ones; the
    name itself where it is no checksum, as of other hubs."""
    if not _DIGEST.fullmatch(blob.name):
        return blob.name
    with blob.open("rb") as file:
        if len(blob.name) == 64:
            return file_digest(file, "sha256").hexdigest()
        head = f"blob {blob.stat().st_size}\0".encode()
        return sha1(head + file.read(), usedforsecurity=False).hexdigest()


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
