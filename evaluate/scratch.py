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


def _without_files(folder: str) -> list[str]:
    """Delete the files of ``folder``; the paths of the folders in it."""
    folders = []
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            folders.append(entry.path)
        else:
            os.unlink(entry.path)
    return folders
