"""Packages of Debian's main archive that hold transcribed human English: fetched by apt, read without unpacking.

A ``.deb`` is an ``ar`` archive with two tar files; files are read from these into memory by their names, so that no
name in an archive becomes a path on disk.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from avsr.errors import UserError
from avsr.runtime.folders import sha256

_MAGIC, _HEADER = b"!<arch>\n", 60  # of an ar archive and of each of its members


@dataclass(frozen=True)
class Package:
    """A package of the version that the corpus is made of.

    Attributes:
        name: of the package.
        version: of it.
        sha256: of its ``.deb``.
        folder: where the files that are read lie in it, below ``usr/share``.
        suffixes: of these files.
    """

    name: str
    version: str
    sha256: str
    folder: str
    suffixes: tuple[str, ...]

    @property
    def file(self) -> str:
        """The name of its ``.deb``."""
        return f"{self.name}_{self.version}_all.deb"


ASTERISK_SOUNDS = Package(
    "asterisk-core-sounds-en-g722",
    "1.6.1-1",
    "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
    "asterisk/sounds/en_US_f_Allison",
    (".g722",),
)
ASTERISK_TEXTS = Package(
    "asterisk-core-sounds-en",
    "1.6.1-1",
    "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
    "doc/asterisk-core-sounds-en",
    ("core-sounds-en.txt.gz",),
)
QUEEN = Package(
    "flight-of-the-amazon-queen",
    "1.0.0-9",
    "40c08fd258d6fe95c46c1eaf5e9137f84ba330657995a281bd887c94a560a0f1",
    "scummvm/flight-of-the-amazon-queen",
    ("queen.1c",),
)
DRASCULA = Package(
    "drascula",
    "1.0+ds4-2",
    "ed4af8e2d41ad446e2f3b73533daa1804e2f13f62f596c0b02b8dc39544f22b4",
    "scummvm/drascula/en",
    (".ALS", "drascula.dat"),
)
PACKAGES = (ASTERISK_SOUNDS, ASTERISK_TEXTS, QUEEN, DRASCULA)


def find_packages(given: Path | None, downloads: Path) -> dict[Package, Path]:
    """The checked ``.deb`` of every package.

    Args:
        given: a folder that has them; None: ``apt-get download`` fetches what ``downloads`` lacks.
        downloads: a folder for them.

    Raises:
        UserError: there is no such file and no apt, the download failed, or a file is not the one that is known.
    """
    folder = downloads if given is None else given
    missing = [package for package in PACKAGES if not (folder / package.file).is_file()]
    if missing and given is None:
        _download(missing, downloads)
    elif missing:
        raise UserError(f"{given}: there is no {', '.join(package.file for package in missing)} of Debian 12")
    for package in PACKAGES:
        if sha256(folder / package.file) != package.sha256:
            raise UserError(f"{folder / package.file} is damaged or another file: its SHA-256 is not {package.sha256}")
    return {package: folder / package.file for package in PACKAGES}


def _download(packages: list[Package], folder: Path) -> None:
    names = " ".join(f"{package.name}={package.version}" for package in packages)
    advice = f"on a Debian machine, apt-get download {names}; then give debs=FOLDER"
    if shutil.which("apt-get") is None:
        raise UserError(f"there is no apt-get here: {advice}")
    folder.mkdir(parents=True, exist_ok=True)
    # no root is needed: it writes into its working folder
    command = ["apt-get", "download", "--quiet=2", *names.split()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode or any(not (folder / package.file).is_file() for package in packages):
        said = done.stderr.strip().splitlines()
        raise UserError(f"apt-get download failed ({said[-1] if said else 'no message'}): apt-get update, or {advice}")


def read_package(package: Package, path: Path) -> tuple[dict[str, bytes], bytes]:
    """The files of ``package`` by their paths in its folder, and its licence (Debian's copyright file).

    Raises:
        UserError: the file is no ``.deb``, or damaged.
    """
    prefix, licence = f"./usr/share/{package.folder}/", f"./usr/share/doc/{package.name}/copyright"
    files, copyright_ = {}, b""
    try:
        with _data(path) as stream, tarfile.open(fileobj=stream, mode="r:*") as archive:
            for member in archive:
                wanted = member.name.startswith(prefix) and member.name.endswith(package.suffixes)
                if member.isfile() and (wanted or member.name == licence):
                    content = archive.extractfile(member)
                    assert content is not None  # of a file
                    if wanted:
                        files[member.name.removeprefix(prefix)] = content.read()
                    else:
                        copyright_ = content.read()
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{path} is not a readable Debian package: {error}") from error
    if not files:
        raise UserError(f"{path} holds no {', '.join(package.suffixes)} in usr/share/{package.folder}")
    return files, copyright_


@contextmanager
def _data(path: Path) -> Iterator[IO[bytes]]:
    """The tar file with the package's files, of the ``ar`` archive ``path``."""
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError("it is no ar archive")
        while header := file.read(_HEADER):
            name, size = header[:16].decode("ascii").strip(), int(header[48:58])
            if name.startswith("data.tar"):
                yield io.BytesIO(file.read(size))
                return
            file.seek(size + size % 2, io.SEEK_CUR)
    raise ValueError("it has no data.tar")
