"Build cmcgns from settings.ini, the one place where its metadata stands."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
cfg = ConfigParser(delimiters=["="])
cfg.read(here / "settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]


def requirements(key):
    return cfg.get(key, "").split()


notebooks, dev = requirements("notebooks_requirements"), requirements("dev_requirements")

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["cmcgns", "cmcgns.*"]) + ["cmcgns.pages"],
    package_dir={"cmcgns.pages": "nbs/reproduce"},  # the reproduction pages travel with the library
    package_data={"cmcgns.pages": ["*.ipynb"]},
    install_requires=requirements("requirements"),
    extras_require={"notebooks": notebooks, "dev": notebooks + dev},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    zip_safe=False,
)
