"""A model's settings, whether they hold for all layers or for each by itself."""

from typing import Any


def setting(config: Any, name: str) -> Any:
    """A setting of a transformers config; a list of each layer's if layers have their own; None if there is none.

    Gemma 4's layers have heads of different widths; transformers then refuses to read the width from the config itself.
    """
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return [getattr(layer, name, None) for layer in config.per_layer_config]
