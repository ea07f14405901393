"""Reads and writes the files of checkpoints, on a file system or an object store, so that none is left half written."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow.fs


class CheckpointFiles:
    """The files below one folder.

    Args:
        uri: Folder on a local or shared file system, or a URI that pyarrow's file systems know (`s3://…`).
    """

    def __init__(self, uri: str) -> None:
        self._files, self.root = pyarrow.fs.FileSystem.from_uri(uri)

    def read(self, path: str) -> bytes:
        """A file's content; raises OSError."""
        with self._files.open_input_stream(path) as stream:
            content: bytes = stream.read()
            return content

    def write(self, path: str, content: bytes) -> None:
        """Makes a file appear whole or not at all, and makes it last through a power failure; raises OSError."""
        if not isinstance(self._files, pyarrow.fs.LocalFileSystem):
            with self._files.open_output_stream(path) as stream:  # an object appears when its upload is complete
                stream.write(content)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f"{target.name}.{os.getpid()}.aside")
        try:
            with aside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(target)
            for folder in (target.parent, target.parent.parent):
                _sync_folder(folder)
        except OSError:
            aside.unlink(missing_ok=True)  # half a file would fill what is left of a full disk
            raise

    def names(self) -> list[str]:
        """Names of the files and folders directly below the root."""
        return [info.base_name for info in self._files.get_file_info(pyarrow.fs.FileSelector(self.root))]

    def find(self, name: str) -> list[str]:
        """Paths of all files of a name below the root; none where the root does not exist."""
        selector = pyarrow.fs.FileSelector(self.root, allow_not_found=True, recursive=True)
        return [info.path for info in self._files.get_file_info(selector) if info.base_name == name]

    def delete(self, folder: str, first: str) -> None:
        """Deletes a folder, of its files one first, which may be missing; raises OSError."""
        if self._files.get_file_info(f"{folder}/{first}").type == pyarrow.fs.FileType.File:
            self._files.delete_file(f"{folder}/{first}")
        self._files.delete_dir(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
