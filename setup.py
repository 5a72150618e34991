"""Reads settings.ini, the one source of versions and dependencies."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(HERE / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
readme = HERE / "README.md"
study = cfg["study_requirements"].split()  # papermill, statistics, figures, the site
dev = study + cfg["dev_requirements"].split()  # tests, and the libraries that they compare with

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"],
    author=cfg["author"],
    url=cfg["git_url"],
    license="Apache-2.0",
    packages=find_packages(include=["stylelora", "stylelora.*"]),
    include_package_data=True,
    package_data={"stylelora": ["py.typed", "assets/**/*"]},
    install_requires=cfg["requirements"].split(),
    extras_require={"study": study, "dev": dev},
    python_requires=">=" + cfg["min_python"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    zip_safe=False,
    entry_points={"console_scripts": cfg["console_scripts"].split("\n")},
)
