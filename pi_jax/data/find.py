"""Finds the text files of the paths that a user names: files, folders and globs."""

import collections
import contextlib
import glob
import os
import pathlib
import re
from collections.abc import Iterator, Sequence

from pi_jax.errors import LFS_BYTES, InputError, require_downloaded

ENDINGS = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst", ".parquet")
"""Extensions of supported files."""

TEXT = (".txt", ".md")
"""Extensions of files that are one document."""
_ABOUT_FOLDER = ("readme", "license", "licence", "copying", "notice", "dataset_info", "dataset_infos")
"""Files that say something of the folder they are in, whatever their extension; no part of its text."""
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip")
_KINDS = 10
"""Kinds of skipped files to list."""


def find_files(paths: Sequence[str]) -> list[str]:
    """Expands files, folders (searched recursively, in sorted order) and globs to a list of files.

    Links are followed, and a file that is reached twice is listed once. In a folder, hidden files, links to a folder
    around it, and a README or LICENSE are left out; a glob can select them.

    Raises:
      InputError: if a path does not exist, a file has another extension than `ENDINGS`, a folder has no such file, a
        link is broken, or a file is a Git LFS pointer.
    """
    return search(paths)[0]


def ending(file: str) -> str | None:
    """Returns which of `ENDINGS` a file has."""
    return next((known for known in ENDINGS if file.lower().endswith(known)), None)


def search(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the files, and for each folder a sentence about what was skipped in it."""
    files: dict[str, str] = {}  # by their real paths
    skipped: dict[str, dict[str, str]] = {}
    for path in paths:
        matches = [path] if os.path.lexists(path) else sorted(_glob(path))
        if not matches:
            kind = "no file matches it" if glob.has_magic(path) else "there is no such file or folder"
            raise InputError(f"{path}: {kind}")
        found = []
        for match in matches:
            if os.path.isdir(match):
                inside, skipped[match] = _files_in(match)
                found += inside
            else:
                found.append(match)
        if not found:
            only = ", ".join(filter(None, (_counted(skipped[match], {}) for match in matches)))
            kinds = f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"
            raise InputError(f"{path}: there is no {kinds} file in it" + (f", only {only}" if only else ""))
        for file in found:
            files.setdefault(os.path.realpath(file), _checked_file(file))
    counts = {folder: _counted(kinds, files) for folder, kinds in skipped.items()}
    return list(files.values()), [f"skipped in {folder}: {count}" for folder, count in counts.items() if count]


def _glob(pattern: str) -> list[str]:
    """As `glob.glob` with `recursive`, which in effect never ends if links make loops."""
    parts = re.split(r"(?:^|(?<=/))\*\*(?:/|$)", pattern, maxsplit=1)
    if len(parts) == 1:
        return glob.glob(pattern)
    roots = glob.glob(parts[0] or "./")
    if not parts[1]:
        return roots
    folders = [here for root in roots for here, _, _ in _walk(root)]
    return [p.removeprefix("./") for here in folders for p in _glob(os.path.join(glob.escape(here), parts[1]))]


def _walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yields each folder in `folder`, itself first, with the names of its files and of the folders not entered.

    These are hidden folders and links to a folder that contains them. No folder is entered twice.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be listed: {error.strerror}")

    entered = set()
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(here)
        closed = [name for name in folders if name.startswith(".") or _contains(os.path.join(here, name), real)]
        folders[:] = sorted(set(folders) - set(closed)) if real not in entered else []
        if real not in entered:
            yield here, sorted(names), sorted(closed)
        entered.add(real)


def _contains(link: str, folder: str) -> bool:
    target = os.path.realpath(link)
    return os.path.islink(link) and os.path.commonpath([target, folder]) == target


def _files_in(folder: str) -> tuple[list[str], dict[str, str]]:
    """Returns the files to read, and what was skipped: real path -> a word for its kind."""
    found, skipped = [], {}
    for here, names, closed in _walk(folder):
        for name in closed:
            skipped[os.path.join(here, name)] = "hidden" if name.startswith(".") else "link to a folder around it"
        for name in names:
            path = os.path.join(here, name)
            if kind := _reason_to_skip(path):
                skipped[os.path.realpath(path)] = kind
            else:
                found.append(path)
    return sorted(found), skipped


def _reason_to_skip(path: str) -> str:
    """Returns the kind of a file that is not read because it is in a folder; empty if it is read."""
    name, suffixes = os.path.basename(path), pathlib.PurePath(path.lower()).suffixes
    if name.startswith("."):
        return "hidden"
    if os.path.islink(path) and not os.path.exists(path):
        # Without an extension, this could be a folder with text.
        return "" if ending(path) or not suffixes else f"broken link {name}"
    if ending(path):
        about = name.lower().split(".")[0] in _ABOUT_FOLDER and ending(path) in (*TEXT, ".json")
        return name if about or not os.path.isfile(path) else ""
    if not suffixes:
        return "without extension"
    return "".join(suffixes[-2:] if suffixes[-1] in _COMPRESSED else suffixes[-1:])


def _counted(skipped: dict[str, str], files: dict[str, str]) -> str:
    """'3 .pdf, 1 .csv', without what is read under another name."""
    counts = collections.Counter(kind for real, kind in skipped.items() if real not in files)
    kinds = [f"{count} {kind}" for kind, count in counts.most_common()]
    return ", ".join(kinds[:_KINDS]) + (f" and {len(kinds) - _KINDS} more kinds" if len(kinds) > _KINDS else "")


def _checked_file(file: str) -> str:
    if os.path.islink(file) and not os.path.exists(file):
        raise InputError(
            f"{file} is a link to {os.readlink(file)}, which does not exist: restore it or remove the link"
        )
    if not ending(file):
        raise InputError(f"{file}: the extension must be one of {', '.join(ENDINGS)}")
    with contextlib.suppress(OSError):  # reading it raises the error
        if os.path.isfile(file) and os.path.getsize(file) < LFS_BYTES:
            require_downloaded(file, pathlib.Path(file).read_bytes())
    return file
