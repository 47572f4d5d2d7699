"""Writes a Hugging Face directory tensor by tensor: sharded safetensors, index, config.

A shard gets its final name only when complete, so a killed run resumes after its last shard.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from farthing.checkpoint.shards import INDEX, SINGLE
from farthing.files import replace_json, replace_tensors

if TYPE_CHECKING:
    from torch import Tensor

# Files of a model directory besides weights, copied unchanged.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer.model",
)
_NEXT_CONFIG = "config.json.next"  # renamed to config.json once every shard has its final name


class CheckpointWriter:
    """Streams tensors into shards of at most `max_shard_bytes` (one larger tensor gets its own).

    With `resume`, existing shards in `path` are kept and their tensors count as written.
    """

    def __init__(self, path: Path, max_shard_bytes: int = 2**30, resume: bool = False) -> None:
        self.path = Path(path)
        self.max_shard_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._addresses: set[int] = set()  # addresses of queued tensors
        self._shards: list[list[str]] = []
        self._written: set[str] = set()
        self.total_bytes = 0
        self.path.mkdir(parents=True, exist_ok=True)
        for file in sorted(self.path.glob("part-*.safetensors")):
            if resume:
                self._recover(file)
            else:
                file.unlink()

    def add(self, name: str, tensor: Tensor) -> None:
        """Queue one tensor; writes a shard when enough is queued. Raises ValueError for a duplicate name."""
        if self.has(name):
            raise ValueError(f"{name} was written before; expected every tensor once")
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_shard_bytes:
            self.flush()
        tensor = tensor.detach().contiguous()
        if tensor.data_ptr() in self._addresses:
            tensor = tensor.clone()  # safetensors rejects tensors that share memory
        self._addresses.add(tensor.data_ptr())
        self._pending[name] = tensor
        self._pending_bytes += size

    def has(self, name: str) -> bool:
        """Whether the tensor is written or queued."""
        return name in self._pending or name in self._written

    @property
    def shards(self) -> int:
        """Number of complete shards on disk."""
        return len(self._shards)

    def flush(self) -> None:
        """Write queued tensors as a shard, which then survives a kill. Raises OSError on a full disk."""
        if not self._pending:
            return
        replace_tensors(self._part(len(self._shards) + 1), self._pending)
        self._shards.append(list(self._pending))
        self._written.update(self._pending)
        self.total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0
        self._addresses.clear()

    def close(self, config: dict[str, Any], copy_from: Path | None = None) -> None:
        """Name the shards as Hugging Face does, write index and config.json, copy tokenizer files.

        Everything that needs disk space is written before the shards are renamed, so a run that fails here
        can still resume.
        """
        self.flush()
        if copy_from is not None:
            copy_companions(copy_from, self.path)
        for stale in self.path.glob("model*.safetensors*"):
            stale.unlink()
        count = len(self._shards)
        names = (
            [SINGLE]
            if count == 1
            else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        )
        if count > 1:
            weight_map = {t: names[i] for i, shard in enumerate(self._shards) for t in shard}
            index = {
                "metadata": {"total_size": self.total_bytes},
                "weight_map": dict(sorted(weight_map.items())),
            }
            replace_json(self.path / INDEX, index)
        replace_json(self.path / _NEXT_CONFIG, config, indent=2)
        for i, name in enumerate(names):
            self._part(i + 1).replace(self.path / name)
        (self.path / _NEXT_CONFIG).replace(self.path / "config.json")

    def _part(self, number: int) -> Path:
        return self.path / f"part-{number:05d}.safetensors"

    def _recover(self, file: Path) -> None:
        with safe_open(file, framework="pt") as shard:
            self._shards.append(list(shard.keys()))
            self._written.update(self._shards[-1])
            self.total_bytes += sum(_bytes(shard.get_tensor(n)) for n in shard.keys())  # noqa: SIM118


def copy_companions(source: Path, target: Path) -> None:
    """Copy a model directory's files besides weights and config to another directory."""
    for file in COMPANIONS:
        if (source / file).is_file() and source.resolve() != target.resolve():
            shutil.copyfile(source / file, target / file)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
