"""Config files and command lines: one definition per key, resolved and checked."""

from opensora.config.load import config_to_text, load_config, naming_places, parse_config
from opensora.utils.main import run_main

__all__ = ["config_to_text", "load_config", "naming_places", "parse_config", "run_main"]
