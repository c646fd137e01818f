"""A virtual environment that holds the built wheel and what it declares to need: nothing else."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement


@dataclass(frozen=True)
class CleanEnvironment:
    """A virtual environment, used through its own programs."""

    folder: Path

    @property
    def programs(self) -> Path:
        return self.folder / ("Scripts" if sys.platform == "win32" else "bin")

    @property
    def python(self) -> Path:
        return self.programs / "python"

    def run(self, *command: str, cwd: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
        """Run one of its programs, which must end with ``status``."""
        program, *arguments = command
        done = subprocess.run(
            [self.programs / program, *arguments],
            cwd=cwd,
            env={"PATH": str(self.programs)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode != status:
            raise AssertionError(
                f"{' '.join(command)} exited with {done.returncode}, not {status}:\n"
                f"{done.stdout}\n{done.stderr}"
            )
        return done


def build_wheel(root: Path, folder: Path) -> Path:
    """Build with the installed backend, without network."""
    _checked("build", "--wheel", "--no-isolation", "--outdir", str(folder), str(root))
    (wheel,) = folder.glob("*.whl")
    return wheel


def make_environment(folder: Path) -> CleanEnvironment:
    """Empty, without even pip."""
    venv.create(folder, with_pip=False, symlinks=sys.platform != "win32")
    return CleanEnvironment(folder)


def install(environment: CleanEnvironment, wheel: Path, *options: str) -> None:
    """Install a wheel, with this environment's pip."""
    _checked("pip", "--quiet", "--python", str(environment.python), "install", *options, str(wheel))


def _checked(module: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        raise AssertionError(f"{module} {' '.join(arguments)}:\n{done.stdout}\n{done.stderr}")


def requirements(wheel: Path) -> list[str]:
    """Distributions that the wheel declares to need without extras, and what those need."""
    with ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
    lines = [
        line.removeprefix("Requires-Dist: ")
        for line in text.splitlines()
        if line.startswith("Requires-Dist: ")
    ]
    needed: list[str] = []
    while lines:
        requirement = Requirement(lines.pop())
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and requirement.name not in needed:
            needed.append(requirement.name)
            lines += importlib.metadata.requires(requirement.name) or []
    return sorted(needed)


def link_requirements(environment: CleanEnvironment, names: list[str]) -> None:
    """Make distributions of this environment importable there, by links, without network."""
    # lib64 may be a link to lib.
    (target,) = {p.resolve() for p in environment.folder.glob("[Ll]ib*/**/site-packages")}
    for name in names:
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            link = target / top
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))))
