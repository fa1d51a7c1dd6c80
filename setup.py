"""What pyproject.toml cannot say: a wheel has recipes and cluster profiles inside the package.

They lie at the top of the repository, for people; `iwopd_megatron/files/shipped.py` finds them in
either place. The rest of the build is in pyproject.toml.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("recipes", "cluster/profiles")


class BuildWithShippedFiles(build_py):
    """Copies SHIPPED into iwopd_megatron/shipped of what is built; an editable install has none."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder in SHIPPED:
            for file in sorted(Path(folder).rglob("*")):
                place = Path(self.build_lib, "iwopd_megatron", "shipped", file)
                if file.is_file():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    self.copy_file(str(file), str(place))


setup(cmdclass={"build_py": BuildWithShippedFiles})
