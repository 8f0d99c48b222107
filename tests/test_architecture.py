"""What may know what, asked of fresh processes, and what the wheel holds."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "statement",
    [
        "import vaefeat",
        "import vaefeat.encoder, vaefeat.decoder, vaefeat.bundle, vaefeat.remote, vaefeat.data",
        "from vaefeat.features import VAEFeatures; from vaefeat.transformer import VAETransformer",
        "from vaefeat import FineTuneClassifier",
        "from vaefeat import VAEClassifier",
        "from vaefeat import OnnxPredictor, export_pipeline",
        "import vaefeat.cli",
        "import serving.app, serving.codec, serving.local_engine",
        "import serving.cluster, serving.guard.middleware",
        "import pipelines.__main__, pipelines.embedding.job, pipelines.embedding.workers",
    ],
)
def test_serving_side_never_loads_torch(statement: str) -> None:
    program = f"{statement}\nimport sys\nassert 'torch' not in sys.modules, 'torch was loaded'"
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_library_prints_nothing_and_reads_no_environment() -> None:
    for path in (CHECKOUT / "vaefeat").rglob("*.py"):
        text = path.read_text()
        # Of threads the environment is the only one who knows: joblib and Ray tell their workers by OMP_NUM_THREADS.
        assert path.name == "processors.py" or "os.environ" not in text, path
        assert "getenv" not in text, path
        assert path.name == "cli.py" or "sys.argv" not in text, path


def test_files_stay_readable() -> None:
    long = {
        str(path.relative_to(CHECKOUT)): lines
        for room in ("vaefeat", "pipelines", "serving", "tests", "benchmarks")
        for path in (CHECKOUT / room).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 450
    }
    assert long == {}, "past 450 lines a file wants a second room"


@pytest.mark.slow
def test_wheel_holds_the_library_alone(tmp_path: Path) -> None:
    subprocess.run(
        ["uv", "build", "--quiet", "--wheel", "--out-dir", str(tmp_path)],
        cwd=CHECKOUT,
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
        assert "vaefeat/py.typed" in archive.namelist()
    assert {top.split("-")[0] for top in tops} == {"vaefeat"}


@pytest.mark.parametrize(
    ("missing", "statement", "message"),
    [
        ("torch", "from vaefeat import pretrain", "pip install 'vaefeat[train]'"),
        ("skl2onnx", "from vaefeat import export_pipeline", "pip install 'vaefeat[export]'"),
        ("onnxscript", "from vaefeat import pretrain", "pip install 'vaefeat[train]'"),
        ("torch", "import runpy, sys; sys.argv = ['pipelines', 'run', 'pipelines/configs/digits.toml']\n"
                  "runpy.run_module('pipelines', run_name='__main__')", "pip install 'vaefeat[jobs]'"),
        ("orjson", "import runpy, sys; sys.argv = ['serving', 'nowhere']\n"
                   "runpy.run_module('serving', run_name='__main__')", "pip install 'vaefeat[serve]'"),
    ],
)  # fmt: skip
def test_missing_extra_names_the_command_that_installs_it(missing: str, statement: str, message: str) -> None:
    """A finder that finds nothing stands in for a package that is not installed; all else is real."""
    program = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {missing!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n" + statement
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert message in done.stderr
    if "runpy" in statement:
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
