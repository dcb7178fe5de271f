"""What pyproject.toml cannot say: that the folder `configs` is installed within the package. Folders of data are listed as packages too."""

from setuptools import find_namespace_packages, setup

configs = find_namespace_packages(include=["configs*"])
setup(
    packages=[*find_namespace_packages(include=["gq_lightning*"]), *(f"gq_lightning.{name}" for name in configs)],
    package_dir={"gq_lightning.configs": "configs"},
)
