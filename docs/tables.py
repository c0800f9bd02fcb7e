"""Tables of the site: the keys of a run's config and the jobs, read from the code without importing it."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Whose dataclasses hold all keys
CONFIGS = ("vmoe/training/config.py", "vmoe/data/config.py", "vmoe/data/sections.py", "vmoe/moe/config.py")


def config_keys() -> str:
    """A table per section of a run's config: each key with its values, default and meaning."""
    trees = [ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in CONFIGS]
    classes = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
    words = {
        ast.unparse(node.targets[0]): ast.unparse(node.value)
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.Assign)
    }
    return "\n".join(_section("TrainConfig", "", classes, words))


def jobs() -> str:
    """A table per group of jobs: the job and what it is for."""
    tree = ast.parse((ROOT / "vmoe" / "cli" / "main.py").read_text(encoding="utf-8"))
    named = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    lines = []
    for title, group in ast.literal_eval(named["GROUPS"]).items():
        lines += [f"## {title}", "", "| job | what it does |", "|---|---|"]
        lines += [*(f"| `vmoe {job}` | {text[0].upper()}{text[1:]}. |" for job, text in group.items()), ""]
    return "\n".join(lines)


def _section(name: str, prefix: str, classes: dict[str, ast.ClassDef], words: dict[str, str]) -> list[str]:
    """The tables of a config dataclass, whose keys begin with `prefix`, and of the sections in it."""
    meanings = _meanings(ast.get_docstring(classes[name]) or "")
    lines = [f"## {prefix.rstrip('.') or 'The run'}", "", "| key | values | default | meaning |", "|---|---|---|---|"]
    inner = []
    for field in classes[name].body:
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        key, kind = field.target.id, ast.unparse(field.annotation)
        section = next((part for part in re.findall(r"\w+", kind) if part in classes), None)
        if section is not None:
            inner += _section(section, f"{prefix}{key}.", classes, words)
            continue
        default = _default(field.value)
        cells = [f"`{prefix}{key}`", f"`{_values(kind, words)}`", f"`{default}`" if default else "", meanings[key]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, "", *inner]


def _meanings(docstring: str) -> dict[str, str]:
    """What the arguments of a docstring mean, by their names."""
    arguments = docstring.partition("\nArgs:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", arguments + "\n", re.MULTILINE | re.DOTALL)
    return {name: re.sub(r"\bNone\b", "null", " ".join(text.split())) for name, text in entries}


def _values(kind: str, words: dict[str, str]) -> str:
    """A field's type as a config file has it: the words of a Literal, or the kind of value."""
    kind = re.sub(r"\b[A-Z]\w+\b", lambda match: words.get(match[0], match[0]), kind)
    kind = re.sub(r"Literal\[([^\]]*)\]", lambda match: match[1].replace(", ", " or ").replace("'", ""), kind)
    kind = re.sub(r"\blist\[(.+)\]", r"list of \1", kind.replace("tuple[", "["))
    return kind.replace(" | ", " or ").replace("None", "null").replace("dict[str, Any]", "a section")


def _default(value: ast.expr | None) -> str:
    """A field's default as a config file has it."""
    if value is None:
        return ""
    if isinstance(value, ast.Call):  # field(default_factory=...)
        made = value.keywords[0].value
        if not isinstance(made, ast.Lambda):
            return {"dict": "{}", "list": "[]"}[ast.unparse(made)]
        value = made.body
    text = ast.unparse(value)
    return {"None": "null", "True": "true", "False": "false"}.get(text, text.strip("'"))
