"""Which image files are meant: files, folders and glob patterns."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path

IMAGE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))


def find_images(
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], *, recursive: bool = False
) -> list[Path]:
    """List the image files that files, folders and glob patterns name, each once.

    A folder gives its files with an image's suffix, sorted by name; a pattern those that it matches, or where it
    matches none, the other files or the folders it matches; a file itself, whether or not it exists: whoever reads it
    reports it.

    Raises:
        FileNotFoundError: a folder or a pattern gives no file.
        ValueError: ``inputs`` is empty.
    """
    listed = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    if not listed:
        raise ValueError("inputs must name at least one image, folder or pattern, got none")
    found: dict[str, Path] = {}
    for entry in listed:
        for path in _expand(os.fspath(entry), recursive):
            found.setdefault(os.path.abspath(path), path)
    return list(found.values())


def _expand(entry: str, recursive: bool) -> list[Path]:
    if os.path.isdir(entry):
        return _images_in(Path(entry), recursive)
    if os.path.exists(entry) or not glob.has_magic(entry):
        return [Path(entry)]
    matches = sorted(glob.glob(entry, recursive=True))
    files = [Path(match) for match in matches if not os.path.isdir(match)]
    if files:
        # "photos/*" need not fail for the notes beside the photos, but "scans/*.dat" means what it says.
        return [path for path in files if _has_image_suffix(path)] or files
    if not matches:
        raise FileNotFoundError(f"the pattern {entry} matches no file")
    return [path for match in matches for path in _images_in(Path(match), recursive)]


def _images_in(folder: Path, recursive: bool) -> list[Path]:
    files = folder.rglob("*") if recursive else folder.iterdir()
    images = sorted(path for path in files if _has_image_suffix(path) and path.is_file())
    if not images:
        hint = "" if recursive else " (folders inside it are searched with recursive)"
        raise FileNotFoundError(f"the folder {folder} holds no image{hint}")
    return images


def _has_image_suffix(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES
