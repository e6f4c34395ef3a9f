"""Models: loading from whatever users have, saving as a Hugging Face directory, and a digest of their content."""

from minicache.models.load import LoadedModel, checkpoint_activations, load_model, save_model, save_tokenizer

__all__ = ["LoadedModel", "checkpoint_activations", "load_model", "save_model", "save_tokenizer"]
