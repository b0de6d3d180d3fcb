"""Settings of a connector: from flags, environment and a file, each value with its source."""

from cachegen.settings.load import load_settings
from cachegen.settings.model import Settings

__all__ = ["Settings", "load_settings"]
