"""Models: loading from whatever users have, saving as a Hugging Face directory or .pth, and a digest of what they compute."""

from minicache.models.layers import checkpoint_activations, layers_of
from minicache.models.load import LoadedModel, load_model, save_model, save_tokenizer, split_source
from minicache.models.minimind_save import save_pth

__all__ = [
    "LoadedModel",
    "checkpoint_activations",
    "layers_of",
    "load_model",
    "save_model",
    "save_pth",
    "save_tokenizer",
    "split_source",
]
