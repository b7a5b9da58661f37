"""A model and its tokenizer as a Hugging Face folder."""

from pathlib import Path

from rlad.models.adapters import has_adapter, save_adapter
from rlad.models.loading import LanguageModel


def save_model(language_model: LanguageModel, folder: Path) -> None:
    """Write weights and tokenizer as `AutoModelForCausalLM.from_pretrained` and
    `AutoTokenizer.from_pretrained` read them; of a LoRA student the adapter alone, as PEFT reads
    it.
    """
    if has_adapter(language_model.model):
        save_adapter(language_model.model, folder)
    else:
        language_model.model.save_pretrained(folder)
    try:
        language_model.tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is Exception:  # all that the tokenizers package says when the disk is full
            raise OSError(str(error)) from None
        raise
