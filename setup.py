"""Which folders are installed: the packages, and data/ as a part of gsoft_diffusion. All else is in pyproject.toml."""

from setuptools import find_packages, setup

packages = find_packages(include=["gsoft", "gsoft.*", "gsoft_diffusion", "gsoft_diffusion.*", "eval", "eval.*"])

setup(
    packages=[*packages, "gsoft_diffusion.data"],
    package_dir={"gsoft_diffusion.data": "data"},
    package_data={"gsoft_diffusion.app": ["*.css"], "gsoft_diffusion.data": ["**/*"], "eval": ["experiments/*"]},
)
