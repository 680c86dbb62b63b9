"""Ship `recipes/`, which lies beside `src/`, as `nextn/recipes`; all else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages("src"), "nextn.recipes"],
    package_dir={"": "src", "nextn.recipes": "recipes"},
    package_data={"nextn": ["shipped/**/*"], "nextn.recipes": ["*.yaml"]},
)
