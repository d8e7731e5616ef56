"""Commands of the page parse, and it names every file."""

import re
import shlex

import pytest

from cocoedit_jax.planning.topology import parse_topology
from tests.launch.recipes.calls import RECIPES, read_flags

TEXT = (RECIPES / "README.md").read_text()
(FLAGS,) = re.findall(r'^FLAGS="(.*)"$', TEXT, re.MULTILINE)
LINES = [
    shlex.split(line.replace("$FLAGS", FLAGS), comments=True)
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
]


def test_files():
    linked = set(re.findall(r"\]\(([\w.]+)\)", TEXT)) | {"in_pod.sh"}
    assert linked == {path.name for path in RECIPES.iterdir() if path.is_file()} - {"README.md", "__init__.py"}
    assert all(f"`{path}`" in TEXT for path in ["in_pod.sh"])


@pytest.mark.parametrize("module, count", [("train", 3), ("bench_sharding", 2), ("serve_judge", 1)])
def test_commands(module, count):
    lines = [line[line.index("-m") + 2 :] for line in LINES if f"launch.{module}" in line]
    # What follows the lone -- of launch.recipes.ray_train are flags of launch.train.
    lines += [
        line[len(line) - line[::-1].index("--") :]
        for line in LINES
        if module == "train" and "launch.recipes.ray_train" in line
    ]
    assert len(lines) == count
    for found in read_flags(f"launch.{module}", lines):
        assert "error" not in found and not found["rest"], found
    for topology in (word.partition("=")[2] for line in lines for word in line if word.startswith("--topology=")):
        parse_topology(topology)


def test_scripts_and_actions():
    used = [line for line in LINES if line[:1] in (["bash"], ["sbatch"], ["kubectl"])]
    files = [word for line in used for word in line if word.startswith("launch/recipes/")]
    assert len(files) >= 8 and all((RECIPES.parents[1] / file).is_file() for file in files)
    script = (RECIPES / "tpu_vm.sh").read_text()
    for line in used:
        if line[1].endswith("tpu_vm.sh"):
            assert re.search(rf"^{line[2]}\)", script, re.MULTILINE), line
