"""Packages of Debian's main archive that hold transcribed human English: fetched by apt, read without unpacking.

A ``.deb`` is an ``ar`` archive with two tar files. Files are read from the second one into memory by their names: no
name in an archive becomes a path on disk, and what an archive may unpack to is limited.
"""

from __future__ import annotations

import lzma
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from avsr.errors import UserError
from avsr.runtime.folders import sha256

_MAGIC, _HEADER = b"!<arch>\n", 60  # of an ar archive and of each of its members
_DATA = "data.tar.xz"
MOST_BYTES, MOST_FILES = 2**27, 10_000  # of a package, unpacked: the largest has 62 MB, and 1,152 files
_XZ_MEMORY = 2**27  # bytes: xz -9 needs 65 MB


@dataclass(frozen=True)
class Package:
    """A package of the version that the corpus is made of.

    Attributes:
        name: of the package.
        version: of it.
        folder: where the files that are read lie in it, below ``usr/share``.
        suffixes: of these files.
    """

    name: str
    version: str
    folder: str
    suffixes: tuple[str, ...]

    @property
    def file(self) -> str:
        """The name of its ``.deb``."""
        return f"{self.name}_{self.version}_all.deb"

    @property
    def sha256(self) -> str:
        """Of its ``.deb``."""
        return SHA256[self.name]


ASTERISK_SOUNDS = Package("asterisk-core-sounds-en-g722", "1.6.1-1", "asterisk/sounds/en_US_f_Allison", (".g722",))
ASTERISK_TEXTS = Package(
    "asterisk-core-sounds-en", "1.6.1-1", "doc/asterisk-core-sounds-en", ("core-sounds-en.txt.gz",)
)
QUEEN = Package("flight-of-the-amazon-queen", "1.0.0-9", "scummvm/flight-of-the-amazon-queen", ("queen.1c",))
DRASCULA = Package("drascula", "1.0+ds4-2", "scummvm/drascula/en", (".ALS", "drascula.dat"))
PACKAGES = (ASTERISK_SOUNDS, ASTERISK_TEXTS, QUEEN, DRASCULA)
SHA256 = {
    "asterisk-core-sounds-en-g722": "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
    "asterisk-core-sounds-en": "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
    "flight-of-the-amazon-queen": "40c08fd258d6fe95c46c1eaf5e9137f84ba330657995a281bd887c94a560a0f1",
    "drascula": "ed4af8e2d41ad446e2f3b73533daa1804e2f13f62f596c0b02b8dc39544f22b4",
}


def check_packages(folder: Path) -> None:
    """Raises a ``UserError`` unless ``folder`` has the ``.deb`` of every package, and each is the one that is known."""
    if not folder.is_dir():
        raise UserError(f"option debs: there is no folder {folder}")
    missing = [package.file for package in PACKAGES if not (folder / package.file).is_file()]
    if missing:
        raise UserError(f"option debs: {folder} has no {', '.join(missing)}: {_advice(PACKAGES)}")
    for package in PACKAGES:
        if not _is_known(folder, package):
            path = folder / package.file
            raise UserError(
                f"{path} is damaged or not Debian's: its SHA-256 is not {package.sha256}: download it again"
            )


def require_apt(folder: Path) -> None:
    """Raises a ``UserError`` if :func:`download_packages` into ``folder`` needs apt-get and there is none."""
    if shutil.which("apt-get") is None and _missing(folder):
        raise UserError(f"there is no apt-get here: {_advice(PACKAGES)}")


def download_packages(folder: Path) -> None:
    """Lets ``apt-get download`` fetch what ``folder`` lacks or has damaged.

    Raises:
        UserError: it failed, or gave other files.
    """
    packages = _missing(folder)
    if not packages:
        return
    folder.mkdir(exist_ok=True)
    for package in packages:
        (folder / package.file).unlink(missing_ok=True)
    # no root is needed: it writes into its working folder
    command = ["apt-get", "download", "--quiet=2", *_names(packages)]
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        env={**os.environ, "LC_ALL": "C"},
    )
    if done.returncode:
        said = (done.stderr.strip() or f"status {done.returncode}").splitlines()
        reason = next((line for line in said if line.startswith("E:")), said[-1])
        raise UserError(f"apt-get download failed ({reason}): run apt-get update, or {_advice(packages)}")
    other = _missing(folder)
    if other:
        raise UserError(f"apt-get download gave no {other[0].file} of Debian 12: {_advice(packages)}")


def _missing(folder: Path) -> list[Package]:
    return [package for package in PACKAGES if not _is_known(folder, package)]


def _is_known(folder: Path, package: Package) -> bool:
    path = folder / package.file
    try:
        return path.is_file() and sha256(path) == package.sha256
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _advice(packages: Iterable[Package]) -> str:
    return f"on Debian 12, apt-get download {' '.join(_names(packages))}; then give debs=FOLDER"


def _names(packages: Iterable[Package]) -> list[str]:
    return [f"{package.name}={package.version}" for package in packages]


def read_package(package: Package, path: Path) -> tuple[dict[str, bytes], bytes]:
    """The files of ``package`` by their paths in its folder, and its licence (Debian's copyright file).

    Raises:
        UserError: the file is no ``.deb`` that this reads, damaged, or unpacks to more than :data:`MOST_BYTES`.
    """
    prefix, licence = f"./usr/share/{package.folder}/", f"./usr/share/doc/{package.name}/copyright"
    files, copyright_, claimed = {}, b"", 0
    try:
        stream = cast(IO[bytes], _Unpacked(_data(path)))
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for number, member in enumerate(archive):
                claimed += member.size  # of a sparse file more than the archive has
                if number >= MOST_FILES or member.size < 0 or claimed > MOST_BYTES:
                    raise ValueError(_TOO_MUCH)
                wanted = member.name.startswith(prefix) and member.name.endswith(package.suffixes)
                content = archive.extractfile(member) if member.isreg() else None
                if content is not None and wanted:
                    files[member.name.removeprefix(prefix)] = content.read()
                elif content is not None and member.name == licence:
                    copyright_ = content.read()
    except (OSError, tarfile.TarError, lzma.LZMAError, EOFError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a readable Debian package: {error}") from error
    if not files or not copyright_:
        listed = f"{', '.join(package.suffixes)} in usr/share/{package.folder}" if copyright_ else licence
        raise UserError(f"{path} is another package: it has no {listed}")
    return files, copyright_


_TOO_MUCH = f"it unpacks to more than {MOST_BYTES} bytes or {MOST_FILES} files"


def _data(path: Path) -> bytes:
    """``data.tar.xz`` of the ``ar`` archive ``path``, packed."""
    names = []
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError("it is no ar archive")
        end = os.fstat(file.fileno()).st_size
        while header := file.read(_HEADER):
            digits = header[48:58].rstrip(b" ")
            if len(header) < _HEADER or not digits.isdigit() or int(digits) > end - file.tell():
                raise ValueError("it is truncated or damaged")
            names.append(header[:16].decode("ascii").rstrip(" /"))
            if names[-1] == _DATA:
                return file.read(int(digits))
            file.seek(int(digits) + int(digits) % 2, os.SEEK_CUR)
    if "data.tar.zst" in names:
        raise ValueError("it is packed with zstd, as Ubuntu does; download it from Debian 12")
    raise ValueError(f"it has no {_DATA}")


class _Unpacked:
    """What an xz file unpacks to, read once, as tarfile reads a stream."""

    def __init__(self, packed: bytes) -> None:
        self._packed, self._left = packed, MOST_BYTES
        self._xz = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes.

        Raises:
            ValueError: these are more than :data:`MOST_BYTES` in all; a pax header or a long name, which tarfile reads
                whole, may have any number.
        """
        if self._xz.eof:
            return b""
        data = self._xz.decompress(self._packed, size)
        self._packed = b""
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(_TOO_MUCH)
        return data
