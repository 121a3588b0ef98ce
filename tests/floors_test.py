"""Imports go down only, as the map of the house says, and no module waits for itself."""

import ast
import functools
import itertools
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOUSE = ["pallas_kernels", "sharding", "jaxlm", "benchmarks", "experiments"]
"""Top-level packages, bottom to top."""
FLOORS = [
  ["jaxlm.config", "jaxlm.config_json", "jaxlm.paths"],
  ["jaxlm.presets", "jaxlm.recipes"],
  ["jaxlm.data"],
  ["jaxlm.quant"],
  ["jaxlm.models"],
  ["jaxlm.quant.describe", "jaxlm.quant.first_step", "jaxlm.quant.pack_model"],
  ["jaxlm.quant.capture", "jaxlm.quant.kurtosis", "jaxlm.quant.scales"],
  ["jaxlm.quant.rotation", "jaxlm.quant.learned_rotation", "jaxlm.quant.super_weight"],
  ["jaxlm.quant.awq", "jaxlm.quant.mix_and_match"],
  ["jaxlm.objectives"],
  ["jaxlm.decode"],
  ["jaxlm.scaling"],
  ["jaxlm.interop"],
  ["jaxlm.train"],
  ["jaxlm.checkpoint"],
  ["jaxlm.run"],
  ["jaxlm.scaling.sweep"],
  ["jaxlm.report"],
  ["jaxlm.cli", "jaxlm.__main__"],
]
"""Rooms of jaxlm, bottom to top; the longest name that fits a module is its room."""


@functools.cache
def modules() -> dict[str, Path]:
  """Returns the name and file of every module of the house."""
  found = {}
  for package in HOUSE:
    for path in sorted((ROOT / package).rglob("*.py")):
      parts = path.relative_to(ROOT).with_suffix("").parts
      found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
  return found


@functools.cache
def imports(module: str) -> frozenset[str]:
  """Returns what a module imports, anywhere in it, as full names of modules."""
  path = modules()[module]
  package = module if path.name == "__init__.py" else module.rpartition(".")[0]
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
      origin = ".".join([*above, *([node.module] if node.module else [])])
      # `from package import module` imports the module, not the package's own names
      names = {f"{origin}.{alias.name}" for alias in node.names}
      found |= {name if name in modules() else origin for name in names}
  return frozenset(found)


def floor(module: str) -> int:
  """Returns the height of a module of jaxlm; the package's own __init__ lies below all."""
  fitting = [
    (len(room), height)
    for height, rooms in enumerate(FLOORS)
    for room in rooms
    if f"{module}.".startswith(f"{room}.")
  ]
  assert fitting or module == "jaxlm", f"{module} has no floor: give it one in FLOORS"
  return max(fitting)[1] if fitting else -1


def of_package(package: str) -> list[str]:
  return [module for module in modules() if module.partition(".")[0] == package]


def test_packages_import_only_packages_below_them():
  for height, package in enumerate(HOUSE):
    allowed = {*HOUSE[: height + 1]}
    for module in of_package(package):
      roots = {name.partition(".")[0] for name in imports(module)}
      above = roots & {*HOUSE, "tests"} - allowed
      assert not above, f"{module} imports {above}"


def test_rooms_of_jaxlm_import_only_rooms_below_them():
  empty = [
    room
    for room in itertools.chain(*FLOORS)
    if not any(f"{module}.".startswith(f"{room}.") for module in modules())
  ]
  assert not empty
  wrong = [
    f"{module} imports {name}"
    for module in of_package("jaxlm")
    for name in imports(module)
    if name.partition(".")[0] == "jaxlm" and floor(name) > floor(module)
  ]
  assert not wrong


def test_kernels_need_jax_and_numpy_alone():
  for module in of_package("pallas_kernels"):
    roots = {name.partition(".")[0] for name in imports(module)}
    foreign = roots - {"pallas_kernels", "jax", "numpy"} - sys.stdlib_module_names
    assert not foreign, f"{module} imports {foreign}"


def test_no_module_imports_itself_over_others():
  """Removes modules whose imports are all removed already, until only cycles are left."""
  left = {module: imports(module) & modules().keys() - {module} for module in modules()}
  while free := [module for module, needed in left.items() if not needed & left.keys()]:
    for module in free:
      del left[module]
  assert not left, "these are in cycles, or import one that is"


def test_the_configuration_and_the_errors_need_no_jax():
  """So that `--help` stays fast: whatever these import, directly or not, at the top of a module."""
  for start in ("jaxlm.config", "jaxlm.presets", "pallas_kernels.common.errors"):
    seen, waiting = set(), [start]
    while waiting:
      module = waiting.pop()
      if module in seen or module not in modules():
        assert module.partition(".")[0] != "jax", f"{start} imports jax"
        continue
      seen.add(module)
      waiting += [module.rpartition(".")[0]] if "." in module else []  # its __init__ runs first
      tree = ast.parse(modules()[module].read_text())
      for node in tree.body:
        if isinstance(node, ast.Import):
          waiting += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
          waiting += [node.module]
