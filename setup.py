"""What pyproject.toml cannot say: that the folder `configs` is installed within the package."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["gq_lightning*"]), "gq_lightning.configs"], package_dir={"gq_lightning.configs": "configs"})
