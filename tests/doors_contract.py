"""The house's second rule, for import-linter: from outside a room, only its doors are imported.

A room is a sub-package; its doors are the files that its `__all__` names. pyproject.toml has the
settings, `make lint` runs it.
"""

import ast
import importlib.util

import grimp
from importlinter import Contract, ContractCheck, fields, output


class DoorsContract(Contract):
    """Broken by an import past a room's doors, and by a room of more than `most` doors."""

    type_name = "doors"
    root = fields.StringField()
    most = fields.IntegerField(minimum=1)

    def check(self, graph: grimp.ImportGraph, verbose: bool) -> ContractCheck:
        faults = []
        for room in self._rooms(graph):
            files = {name for name in graph.find_children(room) if not graph.find_children(name)}
            doors = {f"{room}.{name}" for name in exported(room)} & graph.modules
            if len(doors) > self.most:  # type: ignore[operator]  # a field's value
                faults.append(f"{room} has {len(doors)} doors, more than {self.most}")
            for file in sorted(files - doors):
                importers = graph.find_modules_that_directly_import(file)
                faults += [
                    f"{importer} imports {file}, which is no door of {room}"
                    for importer in sorted(importers)
                    if not f"{importer}.".startswith(f"{room}.")
                ]
        return ContractCheck(kept=not faults, metadata={"faults": faults})

    def render_broken_contract(self, check: ContractCheck) -> None:
        for fault in check.metadata["faults"]:
            output.print_error(fault)

    def _rooms(self, graph: grimp.ImportGraph) -> list[str]:
        """Return every package below the root, nested ones too."""
        return sorted(m for m in graph.find_descendants(self.root) if graph.find_children(m))


def exported(package: str) -> list[str]:
    """Return the names in a package's `__all__`, without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    with open(spec.origin, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []
