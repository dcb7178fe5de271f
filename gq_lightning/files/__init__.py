"""Where the package keeps files of its own, and how a file is written: whole, or not at all."""

from gq_lightning.files.run_folder import RunFolder
from gq_lightning.files.whole import Draft, cache_folder, whole_file, write_whole

__all__ = ["Draft", "RunFolder", "cache_folder", "whole_file", "write_whole"]
