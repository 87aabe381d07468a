"""Packages of Debian: real archives, and those that are damaged, of others, or made to harm."""

from __future__ import annotations

import io
import lzma
import os
import resource
import runpy
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest

from avsr.errors import UserError
from avsr.tools.corpora.debian import packages
from avsr.tools.corpora.debian.packages import DRASCULA, MOST_BYTES, MOST_FILES, PACKAGES, read_package

tiny = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_debs.py"))))

FILE, LICENCE = "scummvm/drascula/en/1.ALS", tiny.licence("drascula")
FOLDER = "./usr/share/scummvm/drascula/en/"


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., dict[str, bytes]]:
    """``read(files, members)``: what is read of a package with these; all of the licence is."""

    def make(files: dict[str, bytes], more: Iterable[tuple[tarfile.TarInfo, bytes]] = ()) -> dict[str, bytes]:
        tiny.deb(tmp_path / "x.deb", {**files, **LICENCE}, more)
        found, licence = read_package(DRASCULA, tmp_path / "x.deb")
        assert licence == LICENCE["doc/drascula/copyright"]
        return found

    return make


def test_only_what_is_asked_for_is_read(read: Callable[..., dict[str, bytes]]) -> None:
    files = {FILE: b"one", "scummvm/drascula/en/sub/2.ALS": b"two", "scummvm/drascula/en/drascula.dat": b"data"}
    others = {"scummvm/drascula/en/x.txt": b"", "scummvm/drascula/1.ALS": b"", "doc/other/copyright": b"x"}
    assert read({**others, **files}) == {"1.ALS": b"one", "sub/2.ALS": b"two", "drascula.dat": b"data"}


def test_links_and_devices_are_not_read(read: Callable[..., dict[str, bytes]]) -> None:
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE)
    links = [
        member(f"{FOLDER}{n}{target.count('/')}.ALS", type=kind, linkname=target)
        for n, kind in enumerate(kinds)
        for target in ("/etc/passwd", "1.ALS")
    ]
    assert read({FILE: b"one"}, links) == {"1.ALS": b"one"}


def test_names_of_an_archive_are_no_paths(read: Callable[..., dict[str, bytes]], tmp_path: Path) -> None:
    """They are keys in a dictionary; absolute ones, and those above the folder, are not even that."""
    before = sorted(tmp_path.rglob("*"))
    names = ["/etc/x.ALS", "../../x.ALS", "./usr/share/x.ALS", f"{FOLDER}../x.ALS", f"{FOLDER}/etc/x.ALS"]
    found = read({FILE: b"one"}, [member(name, b"bad") for name in names])
    assert found == {"1.ALS": b"one", "../x.ALS": b"bad", "/etc/x.ALS": b"bad"}
    assert sorted(tmp_path.rglob("*")) == [*before, tmp_path / "x.deb"]


def xz(content: bytes) -> bytes:
    return lzma.compress(content, preset=0)


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def bomb(kind: bytes) -> bytes:
    """A member of 300 MB: a file, or a long name or pax header, which tarfile reads whole."""
    info = tarfile.TarInfo("./long")
    info.size, info.type = 300 << 20, kind
    packer = lzma.LZMACompressor(preset=0)
    parts = [packer.compress(info.tobuf())]
    parts += [packer.compress(b"a" * 2**20) for _ in range(300)]
    return b"".join(parts) + packer.flush()


def sparse() -> bytes:
    """A file of 600 bytes here that claims 8 GB of holes."""
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": f"{FOLDER}1.ALS"}
    headers["GNU.sparse.realsize"] = str(8 << 30)
    info, content = member(f"{FOLDER}1.ALS", b"1\n0\n1\n".ljust(512, b"\0") + b"x", pax_headers=headers)
    return tar((info, content))


def number(header: bytes, size: int) -> bytes:
    """A tar header with this size in base 256, and the checksum for it."""
    data = (
        header[:124]
        + (b"\xff" if size < 0 else b"\x80")
        + size.to_bytes(11, "big", signed=True)
        + header[136:148]
        + b" " * 8
        + header[156:]
    )
    return data[:148] + b"%06o\0 " % sum(data) + data[156:]


def with_size(size: int) -> bytes:
    return number(member(f"{FOLDER}1.ALS")[0].tobuf(), size) + bytes(2048)


def nested(count: int) -> bytes:
    """Long names one after the other: tarfile reads each by a call of its own within the one before."""
    return b"".join(member("x", type=b"L", size=1)[0].tobuf() + b"a".ljust(512, b"\0") for _ in range(count))


def archive(data: bytes, name: str = "data.tar.xz") -> dict[str, bytes]:
    return {name: data}


GOOD = tar(member(f"{FOLDER}1.ALS", b"one"))
HARMFUL: dict[str, tuple[Callable[[], dict[str, bytes]], str]] = {
    "no data": (dict, "it has no data.tar.xz"),
    "zstd": (
        lambda: archive(b"\x28\xb5\x2f\xfd", "data.tar.zst"),
        "packed with zstd, as Ubuntu does; download it from",
    ),
    "gzip": (lambda: archive(b"", "data.tar.gz"), "it has no data.tar.xz"),
    "no xz": (lambda: archive(b"no xz file"), "not a readable"),
    "empty": (lambda: archive(b""), "not a readable"),
    "half": (lambda: archive(xz(tar(member("x", os.urandom(5000))))[:3000]), "not a readable"),
    "no tar": (lambda: archive(xz(b"no tar file" * 100)), "not a readable"),
    "too large a dictionary": (
        lambda: archive(lzma.compress(GOOD, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 3 << 26}])),
        "not a readable.*[Mm]emory",
    ),
    "a file of 300 MB": (lambda: archive(bomb(tarfile.REGTYPE)), f"more than {MOST_BYTES} bytes"),
    "a name of 300 MB": (lambda: archive(bomb(b"L")), f"more than {MOST_BYTES} bytes"),
    "a header of 300 MB": (lambda: archive(bomb(b"x")), f"more than {MOST_BYTES} bytes"),
    "holes": (lambda: archive(xz(sparse())), f"more than {MOST_BYTES} bytes"),
    "a negative size": (lambda: archive(xz(with_size(-1024))), "not a readable"),
    "a huge size": (lambda: archive(xz(with_size(2**62))), f"more than {MOST_BYTES} bytes"),
    "long names": (lambda: archive(xz(nested(5000))), "not a readable"),
    "many files": (lambda: archive(xz(tar(*[member("x")] * (MOST_FILES + 1)))), f"or {MOST_FILES} files"),
    "another package": (lambda: archive(xz(tar(member("./usr/share/doc/drascula/copyright", b"x")))), "no .ALS"),
    "no licence": (lambda: archive(xz(GOOD)), "no ./usr/share/doc/drascula/copyright"),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_what_could_harm_is_refused_in_little_memory(name: str, tmp_path: Path) -> None:
    make, message = HARMFUL[name]
    tiny.pack(tmp_path / "x.deb", make())
    addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (addresses + (600 << 20), limits[1]))
    try:
        with pytest.raises(UserError, match=message) as caught:
            read_package(DRASCULA, tmp_path / "x.deb")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert str(tmp_path / "x.deb") in str(caught.value) and "\n" not in str(caught.value)


AR = b"!<arch>\n" + f"{'data.tar.xz':<48}{'%s':<10}`\n".encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no ar archive",
        AR[:30],
        *(AR.replace(b"%s", size) for size in (b"-9", b"99", b"1_", b"xx", b"  ", b"\xb2 ")),
    ],
)
def test_damaged_archives_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.deb").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.deb is not a readable Debian package: it is (no ar|truncated or damaged)"):
        read_package(DRASCULA, tmp_path / "x.deb")


# Finding them


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small packages, which are the known ones."""
    for name, digest in tiny.write_debs(tmp_path / "debs").items():
        monkeypatch.setitem(packages.SHA256, name, digest)
    return tmp_path / "debs"


def test_given_packages_are_checked(known: Path, tmp_path: Path) -> None:
    packages.check_packages(known)
    file = known / DRASCULA.file
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"x")
    with pytest.raises(
        UserError, match=f"{DRASCULA.file.replace('+', '.')} is damaged.*SHA-256 is not {DRASCULA.sha256}"
    ):
        packages.check_packages(known)
    file.unlink()
    with pytest.raises(UserError, match=r"debs has no drascula_1.0.ds4-2_all.deb: on Debian 12, apt-get download"):
        packages.check_packages(known)
    with pytest.raises(UserError, match="option debs: there is no folder"):
        packages.check_packages(tmp_path / "none")


APT = """#!{python}
import os, shutil, sys
with open({log!r}, "a") as log: print(*sys.argv[1:], os.environ["LC_ALL"], file=log)
for name in sys.argv[3:]:
    package, _, version = name.partition("=")
    shutil.copy(f"{source}/{{package}}_{{version}}_all.deb", ".")
"""


@pytest.fixture
def apt(known: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """``apt(script)``: makes it the only apt-get there is and returns its log; "" is one that works."""

    def install(script: str) -> Path:
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        (tmp_path / "bin").mkdir()
        log = tmp_path / "apt.log"
        command = tmp_path / "bin/apt-get"
        command.write_text(script or APT.format(python=sys.executable, log=str(log), source=known))
        command.chmod(0o755)
        return log

    return install


def test_apt_downloads_what_is_missing_or_damaged(apt: Callable[[str], Path], known: Path, tmp_path: Path) -> None:
    log, folder = apt(""), tmp_path / "downloads"
    packages.require_apt(folder)
    packages.download_packages(folder)
    wanted = " ".join(f"{package.name}={package.version}" for package in PACKAGES)
    assert log.read_text() == f"download --quiet=2 {wanted} C\n"
    (folder / DRASCULA.file).write_bytes(b"half")
    packages.download_packages(folder)
    packages.download_packages(folder)
    assert log.read_text().splitlines()[1:] == ["download --quiet=2 drascula=1.0+ds4-2 C"]
    for package in PACKAGES:
        assert (folder / package.file).read_bytes() == (known / package.file).read_bytes()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("#!/bin/sh\necho 'E: Version not found' >&2\necho 'W: more' >&2\nexit 100", r"\(E: Version not found\): run"),
        ("#!/bin/sh\nexit 3", r"\(status 3\): run apt-get update, or on Debian 12, apt-get download asterisk"),
        ("#!/bin/sh\nexit 0", r"gave no asterisk-core-sounds-en-g722_1.6.1-1_all.deb of Debian 12"),
    ],
)
def test_an_apt_that_fails_is_quoted(apt: Callable[[str], Path], tmp_path: Path, script: str, message: str) -> None:
    apt(script)
    with pytest.raises(UserError, match=message) as caught:
        packages.download_packages(tmp_path / "downloads")
    assert "\n" not in str(caught.value)


def test_without_apt_the_message_says_what_to_download(
    known: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(
        UserError, match=r"there is no apt-get here: on Debian 12, apt-get download .*; then give debs="
    ):
        packages.require_apt(tmp_path / "downloads")
    packages.require_apt(known)  # nothing is missing
