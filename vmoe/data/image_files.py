"""Finds picture files, for every room: one list of formats, and one rule for ignored files."""

import glob
import os
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from vmoe.errors import UserError
from vmoe.text import counted

# Pillow's name of a format -> the suffixes of its files
FORMATS: dict[str, tuple[str, ...]] = {
    "AVIF": (".avif",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
ARRAY_SUFFIX = ".npy"  # a picture as an array, for data with `channels`
IMAGE_SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
# Folders of archivers, network drives and file systems
SYSTEM_FOLDERS = frozenset(
    {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
)
# Reason -> its texts for one file and for several
_REASONS = {
    "format": ("file of another format", "files of other formats"),
    "hidden": ("name that begins with a dot", "names that begin with a dot"),
    "system": ("folder of the system's own", "folders of the system's own"),
    "link": ("link to what is there already", "links to what is there already"),
    "special": ("pipe, socket, device or broken link", "pipes, sockets, devices or broken links"),
    "outside": ("picture outside the class folders", "pictures outside the class folders"),
}
_MOST_ENDINGS = 4  # the most suffixes in a line


def is_image_name(name: str, arrays: bool = False) -> bool:
    """Whether a file name (without folder) is that of a picture: it has such a suffix and is not hidden.

    With `arrays` .npy files count as pictures.
    """
    ending = os.path.splitext(name)[1].lower()
    return not name.startswith(".") and (ending in IMAGE_SUFFIXES or (arrays and ending == ARRAY_SUFFIX))


class IgnoredFiles:
    """Counts of the ignored files of some folders, by reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._endings: Counter[str] = Counter()  # suffixes of files of other formats
        self._first: dict[str, str] = {}  # the first path for each reason

    def add(self, reason: str, path: str) -> None:
        """Counts a path for a reason, a key of `_REASONS`."""
        self.counts[reason] += 1
        self._first.setdefault(reason, path)
        if reason == "format":
            self._endings[os.path.splitext(path)[1].lower() or "no ending"] += 1

    def update(self, other: "IgnoredFiles") -> None:
        """Adds the counts of another."""
        self.counts += other.counts
        self._endings += other._endings
        self._first = other._first | self._first

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        """A text such as "2 files of other formats (.heic, .txt; the first is a/b.heic)"; "" without counts."""
        parts = []
        for reason, words in _REASONS.items():
            if count := self.counts[reason]:
                first = self._first[reason]
                details = [first if count == 1 else f"the first is {first}"]
                if reason == "format":
                    common = [ending for ending, _ in self._endings.most_common(_MOST_ENDINGS)]
                    details.insert(0, ", ".join(common) + ", ..." * (len(self._endings) > len(common)))
                parts.append(f"{counted(count, *words)} ({'; '.join(details)})")
        return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def list_class_folders(folder: str | Path, ignored: IgnoredFiles) -> list[str]:
    """The names of the folders directly in `folder`, sorted, without hidden ones and the system's own."""
    names = []
    for entry in _entries(folder):
        if not _is_ignored(entry, ignored):
            if entry.is_dir():
                names.append(entry.name)
            elif is_image_name(entry.name):
                ignored.add("outside", entry.path)
    return names


def find_pictures(folders: Sequence[str | Path], ignored: IgnoredFiles, arrays: bool = False) -> list[list[str] | None]:
    """The picture files of some folders and of all their subfolders, sorted by folder and name.

    Each real file and each real folder is taken once over all `folders`. A link is ignored if its target is taken
    already, or if it is a folder that contains one of `folders`.

    Args:
        folders: The folders to search. None is inside another.
        ignored: Counts ignored files.
        arrays: Whether .npy files count as pictures.

    Returns:
        The files of each folder; None for a folder that is a link to one that is taken already.

    Raises:
        UserError: A folder cannot be read.
    """
    walk = _Walk([os.fspath(folder) for folder in folders], ignored, arrays)
    return walk.found()


class _Walk:
    """Walks through folders: first through all real ones, then through links to folders elsewhere."""

    def __init__(self, folders: list[str], ignored: IgnoredFiles, arrays: bool) -> None:
        self.folders, self.ignored, self.arrays = folders, ignored, arrays
        self.files: list[list[tuple[str, str]] | None] = [[] for _ in folders]  # (folder, name)
        self.file_links: list[tuple[int, str, str]] = []  # index in `folders`, folder, name
        self.folder_links: list[tuple[int, str]] = []
        self.real_folders: dict[str, str] = {}  # path of a folder -> its real path
        # parents of the folders count as visited: a link to one would be a loop
        self.seen = {os.fspath(above) for folder in folders for above in Path(os.path.realpath(folder)).parents}

    def found(self) -> list[list[str] | None]:
        for index in sorted(range(len(self.folders)), key=lambda each: os.path.islink(self.folders[each])):
            real = os.path.realpath(self.folders[index])
            if real in self.seen:
                self.ignored.add("link", self.folders[index])
                self.files[index] = None
            self.seen.add(real)
        for index, folder in enumerate(self.folders):
            if self.files[index] is not None:
                self._enter(index, folder, os.path.realpath(folder))
        for index, folder in self.folder_links:  # the list grows during the loop
            real = os.path.realpath(folder)
            if real in self.seen:
                self.ignored.add("link", folder)
            else:
                self._enter(index, folder, real)
        self._take_file_links()
        return [None if files is None else [os.path.join(*file) for file in sorted(files)] for files in self.files]

    def _enter(self, index: int, folder: str, real: str) -> None:
        waiting = [(folder, real)]
        while waiting:
            folder, real = waiting.pop()
            self.seen.add(real)
            self.real_folders[folder] = real
            for entry in _entries(folder):
                if _is_ignored(entry, self.ignored):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    inside = os.path.join(real, entry.name)
                    if inside in self.seen:  # another link has led here
                        self.ignored.add("link", entry.path)
                    else:
                        waiting.append((entry.path, inside))
                elif entry.is_dir():
                    self.folder_links.append((index, entry.path))
                elif not entry.is_file():
                    self.ignored.add("special", entry.path)
                elif not is_image_name(entry.name, self.arrays):
                    self.ignored.add("format", entry.path)
                elif entry.is_symlink():
                    self.file_links.append((index, folder, entry.name))
                else:
                    self.files[index].append((folder, entry.name))

    def _take_file_links(self) -> None:
        if not self.file_links:  # nearly always; this avoids a set of a million paths
            return
        taken = {
            os.path.join(self.real_folders[folder], name)
            for files in self.files
            if files is not None
            for folder, name in files
        }
        for index, folder, name in self.file_links:
            real = os.path.realpath(os.path.join(folder, name))
            if real in taken:
                self.ignored.add("link", os.path.join(folder, name))
            else:
                taken.add(real)
                self.files[index].append((folder, name))


def find_images(paths: Iterable[str | Path], ignored: IgnoredFiles, arrays: bool = False) -> list[Path]:
    """The image files of `paths`. `ignored` counts ignored files in folders.

    A folder gives the pictures in it and in all its subfolders, with `arrays` .npy files too. A named file is taken
    with any suffix. Patterns are expanded if no shell has done so.

    Raises:
        UserError: A path does not exist or is no regular file, a folder holds no picture, a pattern matches nothing, or
            a path is an address or "-".
    """
    found: list[Path] = []
    for path in (path for given in paths for path in _expanded(os.fspath(given))):
        if path.is_dir():
            here = IgnoredFiles()
            (inside,) = find_pictures([path], here, arrays)
            if not inside:
                left = f" (ignored: {here})" if here else ""
                raise UserError(f"{path}: this folder holds no image file{left}; give images, or a folder that does")
            found += map(Path, inside)
            ignored.update(here)
        elif not os.path.exists(path):
            why = (
                "is a broken link; give the file that it should lead to" if path.is_symlink() else "no such image file"
            )
            raise UserError(f"{path}: {why}")
        else:
            require_regular(path)
            found.append(path)
    return found


def none_readable(lines: Sequence[str]) -> UserError:
    """The error if no file could be read as an image. Each file has a line in `lines`."""
    return UserError(lines[0] if len(lines) == 1 else f"none of {len(lines)} files is an image: {lines[0]}")


def _expanded(given: str) -> list[Path]:
    """The paths of a word of the command line, which may be a pattern."""
    if given == "-":
        raise UserError("-: pictures are not read from standard input; write the picture to a file and give that")
    if "://" in given:
        raise UserError(f"{given}: addresses are not fetched; download the picture and give the file")
    if os.path.lexists(given) or not glob.has_magic(given):
        return [Path(given)]
    matches = sorted(glob.glob(given, recursive=True))
    if not matches:
        raise UserError(f"{given}: no file matches this pattern")
    return [Path(match) for match in matches]


def require_regular(path: str | Path) -> None:
    """Refuses pipes, sockets and devices, since reading them may never end.

    Raises:
        UserError: The path is one of these. A missing file raises only when it is opened.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{path}: is no regular file but a pipe, a socket or a device; give a file")


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror or error})") from error


def _is_ignored(entry: os.DirEntry[str], ignored: IgnoredFiles) -> bool:
    reason = "hidden" if entry.name.startswith(".") else "system" if entry.name in SYSTEM_FOLDERS else None
    if reason is not None:
        ignored.add(reason, entry.path)
    return reason is not None
