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


notebooks, docs, dev = (requirements(f"{extra}_requirements") for extra in ("notebooks", "docs", "dev"))

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
    packages=find_packages(include=["cmcgns", "cmcgns.*"]) + ["cmcgns.pages", "cmcgns.published"],
    package_dir={"cmcgns.pages": "nbs/reproduce", "cmcgns.published": "data"},  # pages and published numbers travel with the library
    package_data={"cmcgns.pages": ["*.ipynb"], "cmcgns.published": ["published_results.csv"]},
    install_requires=requirements("requirements"),
    extras_require={"notebooks": notebooks, "docs": docs, "dev": notebooks + dev},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    zip_safe=False,
)
