"""The GGUF files of a folder or repository: which ones are one model, and which quantization each is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

SUFFIX = ".gguf"
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_LABEL = re.compile(r"(?:^|[-._/])((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|BF16|FP?16|F32|MXFP4\w*))$", re.IGNORECASE)
_BESIDE = re.compile(r"mmproj|imatrix", re.IGNORECASE)  # vision towers, and statistics of calibration
DEFAULTS = ("Q4_K_M", "MXFP4", "Q4_0", "IQ4_NL", "Q8_0")  # in this order, where no name is given


@dataclass(frozen=True, slots=True)
class Variant:
    """One model: its files, in order, and their bytes."""

    label: str
    files: tuple[str, ...]
    size: int

    def __str__(self) -> str:
        return f"{self.label} ({self.size / 1e9:.1f} GB)"


def name_of(file: str) -> str:
    """The name of a file's model, equal for all parts of a split one."""
    part = _SPLIT.fullmatch(file)
    return part[1] if part else file.removesuffix(SUFFIX)


def parts_of(file: str) -> tuple[str, ...]:
    """The names of all files of a model of which `file` is one."""
    part = _SPLIT.fullmatch(file)
    if part is None:
        return (file,)
    return tuple(f"{part[1]}-{i + 1:05}-of-{part[3]}{SUFFIX}" for i in range(int(part[3])))


def variants_in(sizes: Mapping[str, int]) -> list[Variant]:
    """The models among files, by paths below the folder; vision towers are none."""
    models: dict[str, list[str]] = {}
    for file in sorted(sizes):
        if file.endswith(SUFFIX) and not _BESIDE.search(PurePosixPath(file).name):
            models.setdefault(name_of(file), []).append(file)
    return [
        Variant(_label(name), tuple(files), sum(map(sizes.__getitem__, files)))
        for name, files in models.items()
    ]


def _label(name: str) -> str:
    """The quantization that a name ends with, or that of its folder; else the name."""
    path = PurePosixPath(name)
    found = _LABEL.search(path.name) or _LABEL.search(path.parent.name)
    return found[1].upper() if found else path.name


def choose(model: str, sizes: Mapping[str, int], wanted: str = "", one: bool = False) -> Variant:
    """The only model, the one of the wanted quantization, or of the first of DEFAULTS.

    model: for the error, FileNotFoundError, which lists what there is. one: without a name all files are to
    be quantizations of one model, by their names, as in a repository; a folder may hold several models.
    """
    variants = variants_in(sizes)
    names = [PurePosixPath(v.files[0]).name for v in variants]
    several = one and len({_LABEL.sub("", name_of(name)) for name in names}) > 1  # models, not quantizations
    labels: Sequence[str] = (
        [wanted.upper(), f"UD-{wanted.upper()}"] if wanted else () if several else DEFAULTS
    )
    for label in labels:
        found = [v for v in variants if label in (v.label.upper(), PurePosixPath(v.files[0]).name.upper())]
        if len(found) == 1:
            return found[0]
    if len(variants) == 1 and not wanted:
        return variants[0]
    listed = names if several or len({v.label for v in variants}) < len(variants) else map(str, variants)
    raise FileNotFoundError(
        f"model: got {f'{model}:{wanted}' if wanted else model!r}, which has the GGUF models "
        f"{', '.join(listed) or 'none'}; expected {model}:NAME with one of these names"
    )
