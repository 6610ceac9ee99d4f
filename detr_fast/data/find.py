"""Which image and video files are meant: files, folders and glob patterns."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypeAlias

IMAGE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
VIDEO_SUFFIXES = frozenset((".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"))
# Not ".ts", which is also TypeScript: such a file is named, not found in a folder.
VIDEO_NAMES = VIDEO_SUFFIXES | {".ts"}

Inputs: TypeAlias = "str | os.PathLike[str] | Iterable[str | os.PathLike[str]]"


def find_images(inputs: Inputs, *, recursive: bool = False) -> list[Path]:
    """List the image files that files, folders and glob patterns name, each once.

    A folder gives its files with an image's suffix, sorted by name; a pattern those that it matches, or where it
    matches none, the other files or the folders it matches; a file itself, whether or not it exists: whoever reads it
    reports it.

    Raises:
        FileNotFoundError: a folder or a pattern gives no file.
        ValueError: ``inputs`` is empty.
    """
    return _find(inputs, _Wanted("image", IMAGE_SUFFIXES, recursive))


def find_images_and_videos(inputs: Inputs, *, recursive: bool = False) -> tuple[list[Path], list[Path]]:
    """``find_images`` that finds videos too; what has no video's suffix stands among the images."""
    found = _find(inputs, _Wanted("image or video", IMAGE_SUFFIXES | VIDEO_SUFFIXES, recursive))
    videos = [path for path in found if path.suffix.lower() in VIDEO_NAMES]
    return [path for path in found if path not in videos], videos


class _Wanted(NamedTuple):
    """The files that a folder gives."""

    kind: str
    suffixes: frozenset[str]
    recursive: bool

    def has(self, path: Path) -> bool:
        return path.suffix.lower() in self.suffixes


def _find(inputs: Inputs, wanted: _Wanted) -> list[Path]:
    listed = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    if not listed:
        raise ValueError(f"inputs must name at least one {wanted.kind}, folder or pattern, got none")
    found: dict[str, Path] = {}
    for entry in listed:
        for path in _expand(os.fspath(entry), wanted):
            found.setdefault(os.path.abspath(path), path)
    return list(found.values())


def _expand(entry: str, wanted: _Wanted) -> list[Path]:
    if os.path.isdir(entry):
        return _files_in(Path(entry), wanted)
    if os.path.exists(entry) or not glob.has_magic(entry):
        return [Path(entry)]
    matches = sorted(glob.glob(entry, recursive=True))
    files = [Path(match) for match in matches if not os.path.isdir(match)]
    if files:
        # "photos/*" need not fail for the notes beside the photos, but "scans/*.dat" means what it says.
        return [path for path in files if wanted.has(path)] or files
    if not matches:
        raise FileNotFoundError(f"the pattern {entry} matches no file")
    return [path for match in matches for path in _files_in(Path(match), wanted)]


def _files_in(folder: Path, wanted: _Wanted) -> list[Path]:
    files = folder.rglob("*") if wanted.recursive else folder.iterdir()
    found = sorted(path for path in files if wanted.has(path) and path.is_file())
    if not found:
        hint = "" if wanted.recursive else " (folders inside it are searched with recursive)"
        raise FileNotFoundError(f"the folder {folder} holds no {wanted.kind}{hint}")
    return found
