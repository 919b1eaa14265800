"""What pyproject.toml cannot say: in the wheel, configs/ is the folder d2kd/configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["d2kd*"]), "d2kd.configs"],
    package_dir={"d2kd.configs": "configs"},
    package_data={"d2kd": ["py.typed"], "d2kd.configs": ["**/*.yaml"]},
)
