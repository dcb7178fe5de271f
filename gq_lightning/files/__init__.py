"""Run folders and the cache folder, and safe opening, reading and writing of files."""

from gq_lightning.files.opening import open_regular, parse_json
from gq_lightning.files.run_folder import RunFolder
from gq_lightning.files.whole import Draft, cache_folder, one_writer, whole_file, write_whole

__all__ = ["Draft", "RunFolder", "cache_folder", "one_writer", "open_regular", "parse_json", "whole_file", "write_whole"]
