"""Downloads pictures to use in place of DATA, if no folder is given.

without_data:
  class_path: gq_lightning.data.Imagenette      a data module that downloads and verifies
  init_args: {root: datasets/imagenette}        its root is relative to the project's folder
  folder: datasets/imagenette/imagenette2-160   what DATA stands for then
  name: imagenette                              appended to the profile's name, so that results of other pictures are never mixed
"""

import importlib
from pathlib import Path
from typing import Any

from arms import ROOT, SpecError


def download(without_data: dict[str, Any]) -> Path:
    """The folder of the pictures, downloaded first where they are missing.

    Raises:
        SpecError: they cannot be had.
    """
    from gq_lightning.errors import UserError  # arms run in processes of their own: nothing else here wants the package

    module, _, name = without_data["class_path"].rpartition(".")
    given = without_data["init_args"]
    try:
        getattr(importlib.import_module(module), name)(**given | {"root": str(ROOT / given["root"])}).prepare_data()
    except UserError as error:
        raise SpecError(f"{error}; or give a folder of your own pictures, --data FOLDER (make: DATA=FOLDER)") from error
    folder = ROOT / without_data["folder"]
    if not folder.is_dir():
        raise SpecError(f"without_data: {folder} is not there after the download; correct its folder in the spec")
    return folder
