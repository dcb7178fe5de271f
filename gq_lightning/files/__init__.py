"""How files are opened and written, and where the package keeps its own."""

from gq_lightning.files.inputs import open_input
from gq_lightning.files.run_folder import RunFolder
from gq_lightning.files.whole import Draft, cache_folder, whole_file, write_whole

__all__ = ["Draft", "RunFolder", "cache_folder", "open_input", "whole_file", "write_whole"]
