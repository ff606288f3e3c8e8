"""Folders that a hostile program filled: removed, whatever it made of them."""

import contextlib
import os


def remove(folder: str) -> None:
    """Delete ``folder`` and all in it; nothing where it is not there. Its processes must have ended.

    Folders inside folders are first moved up into ``folder``: however deep they lie, nothing recurses and no path
    becomes too long. Those made unreadable are opened. Raises OSError for what stays.
    """
    with contextlib.suppress(FileNotFoundError):
        os.chmod(folder, 0o700)
        while folders := _without_files(folder):
            for path in folders:
                os.chmod(path, 0o700)
                for inner in _without_files(path):
                    os.chmod(inner, 0o700)
                    os.rename(inner, os.path.join(folder, os.urandom(16).hex()))
                os.rmdir(path)
        os.rmdir(folder)


def crowded(folder: str, most: int, entries: int) -> bool:
    """Whether what lies in ``folder`` takes over ``most`` bytes of the disk, or is over ``entries`` files and folders.

    A program works in it meanwhile: what vanishes while it is looked at does not count.
    """
    seen = taken = 0
    pending = [folder]
    while pending:
        path = pending.pop()
        with contextlib.suppress(OSError):
            if path != folder:
                os.chmod(path, 0o700)  # one made unreadable hides nothing
            with os.scandir(path) as listed:
                for entry in listed:
                    seen += 1
                    if seen > entries:
                        return True
                    with contextlib.suppress(OSError):
                        taken += entry.stat(follow_symlinks=False).st_blocks * 512
                        if entry.is_dir(follow_symlinks=False):
                            pending.append(entry.path)
    return taken > most


def _without_files(folder: str) -> list[str]:
    """Delete the files of ``folder``; the paths of the folders in it."""
    folders = []
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            folders.append(entry.path)
        else:
            os.unlink(entry.path)
    return folders
