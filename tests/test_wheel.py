"""The wheel is complete: installed elsewhere, away from the source tree, it still builds a model directory."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from helpers import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    target = tmp_path_factory.mktemp("wheel")
    source = target / "source"  # setuptools leaves a build folder behind, and would pack what an older one holds
    for folder in ("telechat_mindie", "model_dir_template"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(target), str(source)]
    subprocess.run(command, check=True, timeout=300, cwd=target)
    return next(target.glob("*.whl"))


def test_every_package_and_data_file_is_in_it(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    for source in (ROOT / "telechat_mindie").rglob("*"):
        if source.is_file() and "__pycache__" not in source.parts:
            assert str(source.relative_to(ROOT)) in packed
    for template in (ROOT / "model_dir_template").iterdir():
        if template.is_file():
            assert f"telechat_mindie/model_dir_template/{template.name}" in packed


def test_it_works_from_any_directory(wheel, tmp_path):
    """Unpacked into a folder of its own and found before the source tree; the dependencies are this environment's."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'Editable' not in repr(finder)]\n"
        "import telechat_mindie; assert telechat_mindie.__file__.startswith(sys.path[0])\n"
        "from telechat_mindie.__main__ import main\n"
    )
    for arguments in (["nano", "ckpt"], ["build", "model", "--checkpoint", "ckpt"], ["info", "model"]):
        done = subprocess.run(
            [sys.executable, "-c", f"{code}sys.argv[1:] = {arguments!r}; main()"],
            cwd=tmp_path, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout: an sdist is made of what git holds")
def test_the_sdist_holds_what_its_tests_need(tmp_path):
    subprocess.run(["git", "clone", "--quiet", str(ROOT), "source"], check=True, cwd=tmp_path, timeout=60)
    listing = ["git", "-C", "source", "ls-files"]
    tracked = subprocess.run(listing, check=True, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    command = [sys.executable, "-m", "build", "--sdist", "--outdir", str(tmp_path), str(tmp_path / "source")]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=300, stdout=subprocess.DEVNULL)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert set(tracked.stdout.split()) <= packed
